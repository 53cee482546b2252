"""`tessera data …`: turn an owner's files into a data set that manifests can name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import AsJson, StateDir, default_state_dir
from tessera.core.errors import Invalid

if TYPE_CHECKING:
    from tessera.devnet.datasets import KnownSet
    from tessera.models.dataset_prepare import Progress
    from tessera.training.home import Home

__all__ = ["data_app"]

data_app = typer.Typer(
    help="Data sets: prepare text, JSON lines or Parquet for runs; list and show what is here.", no_args_is_help=True
)


@data_app.command("add")
def data_add(
    path: Annotated[Path, typer.Argument(help="A file or folder: text, .jsonl or .parquet.")],
    field: Annotated[str, typer.Option(help="The field or column that holds the text of a row.")] = "text",
    account: Annotated[str, typer.Option(help="Who owns the text and is paid for it. Default: the owner here.")] = "",
    tokenizer: Annotated[
        str, typer.Option(help="A blob id, a tokenizer's or manifest's file, or 'new'. Default: the sets' here.")
    ] = "",
    name: Annotated[str, typer.Option(help="What to call the set. Default: the file's or folder's name.")] = "",
    vocabulary: Annotated[int, typer.Option(help="Tokens of a new tokenizer, 257 to 65536.")] = 1024,
    state_dir: StateDir = default_state_dir("up"),
    as_json: AsJson = False,
) -> None:
    """Tokenise an owner's text once, into shards that workers fetch. Interrupted, it goes on where it stopped."""
    from tessera.core.ids import parse_account
    from tessera.devnet.datasets import add_set
    from tessera.training.home import Home

    home = Home(state_dir)
    owner = parse_account(account or _owner(home))
    with _bar(path, quiet=as_json) as progress:
        known = add_set(
            home, path, field=field, name=name or path.resolve().name, account=owner, tokenizer=tokenizer,
            vocabulary=vocabulary, now=int(time.time()), progress=progress,
        )  # fmt: skip
    _show(home, known, as_json, sample=False)


@data_app.command("list")
def data_list(state_dir: StateDir = default_state_dir("up"), as_json: AsJson = False) -> None:
    """The data sets that were prepared in this state directory."""
    from rich.console import Console
    from rich.table import Column, Table

    from tessera.devnet.datasets import known_sets
    from tessera.training.home import Home

    sets = known_sets(Home.existing(state_dir))
    if as_json:
        typer.echo(json.dumps([_facts(known) for known in sets]))
        return
    if not sets:
        Console().print("No data set yet. `tessera data add PATH` prepares one.")
        return
    table = Table("set", "name", Column("tokens", justify="right"), "shards", "tokenizer", "owner", box=None)
    for known in sets:
        table.add_row(
            f"{known.index[:16]}…", known.name, f"{known.tokens:,}", str(known.shards), f"{known.tokenizer[:8]}…",
            f"{known.account[:10]}…",
        )  # fmt: skip
    Console().print(table, highlight=False)


@data_app.command("show")
def data_show(
    what: Annotated[str, typer.Argument(metavar="ID", help="The first digits of a set's id, or its name.")],
    state_dir: StateDir = default_state_dir("up"),
    as_json: AsJson = False,
) -> None:
    """What a data set holds, how its text reads, and the line that puts it into a manifest."""
    from tessera.devnet.datasets import find_set
    from tessera.training.home import Home

    home = Home.existing(state_dir)
    _show(home, find_set(home, what), as_json, sample=True)


def _owner(home: Home) -> str:
    """The account that a run of this directory pays for its text. Needs no passphrase."""
    home.keys.ensure("data-owner")
    return next(entry.address for entry in home.keys.entries() if entry.name == "data-owner")


def _facts(known: KnownSet) -> dict[str, object]:
    return {**asdict(known), "entry": known.entry.model_dump(mode="json")}


def _show(home: Home, known: KnownSet, as_json: bool, *, sample: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from tessera.devnet.datasets import sample_of

    if as_json:
        typer.echo(json.dumps(_facts(known)))
        return
    console, table = Console(), Table("", Column("", overflow="fold"), show_header=False, box=None)
    for label, value in (
        ("set", known.index),
        ("name", known.name),
        ("owner", known.account),
        ("from", known.path),
        ("text", f"{known.text_bytes:,} bytes"),
        (
            "tokens",
            f"{known.tokens:,}, shards to train on: {known.shards}",
        ),
        ("tokenizer", f"{known.tokenizer} ({known.vocab_size:,} tokens)"),
    ):
        table.add_row(label, Text(value))
    console.print(table, highlight=False)
    if known.skipped_files or known.skipped_rows:
        console.print(Text(f"Skipped {known.skipped_files} files and {known.skipped_rows} rows:", style="yellow"))
        for reason in known.reasons:
            console.print(Text(f"  {reason}"))
    if sample:
        console.print(Text(sample_of(home, known), style="dim"))
    console.print("\nIn a manifest's data.sets, and its owner in allocation.data:", style="dim")
    console.print(Text(json.dumps(known.entry.model_dump(mode="json"))), soft_wrap=True, highlight=False)


@contextmanager
def _bar(path: Path, *, quiet: bool) -> Iterator[Progress]:
    """A bar on standard error while text is read, when somebody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("tokenising", total=_size(path))
        yield lambda text_bytes, shards: bar.update(
            task, completed=text_bytes, description=f"tokenising, {shards} shards"
        )


def _size(path: Path) -> int | None:
    """Bytes to read, about; None when that takes long to find out."""
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        raise Invalid(f"no such file or folder: {path}")
    total = 0
    for count, file in enumerate(path.rglob("*")):
        if count > 100_000:
            return None
        total += file.stat().st_size if file.is_file() else 0
    return total
