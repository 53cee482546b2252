"""`tessera keys …`: who this state directory is, and how its secrets are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import AsJson, StateDir, default_state_dir
from tessera.core.errors import Conflict, Invalid, Missing

if TYPE_CHECKING:
    from tessera.training.home import Home

__all__ = ["keys_app"]

keys_app = typer.Typer(
    help="Keys: show who this node is, protect, export and import its secrets.", no_args_is_help=True
)

Here = StateDir
WARNING = "Whoever has this secret is you: it moves your money and signs in your name. Never send it to anybody."


@keys_app.command("show")
def keys_show(state_dir: Here = default_state_dir("worker"), as_json: AsJson = False) -> None:
    """The addresses, and whether a passphrase protects them. Shows no secret, and asks for none."""
    from rich.console import Console
    from rich.table import Column, Table

    entries = _home(state_dir).keys.entries()
    if as_json:
        rows = [
            {"name": e.name, "kind": e.kind, "address": e.address or None, "protected": e.protected} for e in entries
        ]
        typer.echo(json.dumps({"state_dir": str(state_dir), "keys": rows}))
        return
    table = Table("name", "kind", Column("address", overflow="fold"), "at rest", box=None)
    for entry in entries:
        table.add_row(entry.name, entry.kind, entry.address, "protected" if entry.protected else "open")
    console = Console()
    console.print(table, highlight=False)
    if not all(entry.protected for entry in entries):
        console.print("Open keys are readable to whoever has this disk: tessera keys protect", style="dim")


@keys_app.command("protect")
def keys_protect(state_dir: Here = default_state_dir("worker")) -> None:
    """Encrypt every key with a passphrase. Commands that use a key ask for it from then on."""
    from tessera.cli.passphrases import new_passphrase

    with _locked(state_dir) as home:
        if all(entry.protected for entry in home.keys.entries()):
            raise Conflict("all keys are protected already; to choose another passphrase: unprotect, then protect")
        done = home.keys.protect(new_passphrase("for the keys (nobody can recover it)"))
    typer.echo(f"Protected: {', '.join(done)}. Without the passphrase they are lost: keep it where you keep no disk.")
    typer.echo("What was deleted may stay on an SSD: if the disk was ever out of your hands, make new keys.", err=True)


@keys_app.command("unprotect")
def keys_unprotect(state_dir: Here = default_state_dir("worker")) -> None:
    """Write the keys in the open again: files that only their owner may read."""
    from tessera.training.passphrase import ask_passphrase

    with _locked(state_dir) as home:
        if not home.keys.protected:
            raise Conflict("no key is protected")
        done = home.keys.unprotect(ask_passphrase("to open the keys"))
    typer.echo(f"Open: {', '.join(done)}")


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="What to call it: a-z, 0-9 and hyphens.")],
    state_dir: Here = default_state_dir("worker"),
) -> None:
    """Make a further account; prints its address."""
    from tessera.core.signing import AccountKey

    with _locked(state_dir) as home:
        _refuse_peer(name)
        typer.echo(home.keys.add(name, AccountKey.generate().secret).address)


@keys_app.command("export")
def keys_export(
    name: Annotated[str, typer.Argument(help="Which key: peer, account, or a name of yours.")],
    file: Annotated[Path, typer.Argument(help="The file to write; - with --plain prints.")],
    plain: Annotated[bool, typer.Option("--plain", help="The bare secret instead of an encrypted keystore.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    state_dir: Here = default_state_dir("worker"),
) -> None:
    """Copy a key out: as an encrypted keystore that wallets open, or bare with --plain."""
    from tessera.cli.passphrases import new_passphrase
    from tessera.training.sealing import SealingKey

    home = _home(state_dir)
    entry = next((entry for entry in home.keys.entries() if entry.name == name), None)
    if entry is None:
        raise Missing(f"there is no key {name!r} in {state_dir}: `tessera keys show` lists them")
    if plain and not yes:
        typer.confirm(f"{WARNING}\nWrite the bare secret of {name}?", abort=True, err=True)
    if str(file) == "-" and not plain:
        raise Invalid("- prints a bare secret, which needs --plain")
    secret = home.keys.secret(name)
    if plain:
        content = secret.hex().encode() + b"\n"
    else:
        sealing_key = SealingKey.from_passphrase(new_passphrase(f"for {file}"))
        content = sealing_key.seal(secret, entry.kind, entry.address or home.keys.address(name))
    if str(file) == "-":
        typer.echo(content.decode(), nl=False)
    else:
        _write_new(file, content)
        typer.echo(f"{name} is in {file}", err=True)
    typer.echo(WARNING, err=True)


@keys_app.command("import")
def keys_import(
    name: Annotated[str, typer.Argument(help="What it is here: account, peer, or a name of yours.")],
    file: Annotated[Path, typer.Argument(help="A keystore (Web3 version 3), or 64 hexadecimal digits.")],
    replace: Annotated[bool, typer.Option("--replace", help="Keep the present one under another name.")] = False,
    state_dir: Here = default_state_dir("worker"),
) -> None:
    """Take a key over from a wallet or another node. Never run one peer key on two machines."""
    from tessera.training.keystore import read_secret
    from tessera.training.passphrase import ask_passphrase

    with _locked(state_dir, create=True) as home:
        secret = read_secret(file, lambda: ask_passphrase(f"to open {file}"))
        entry = home.keys.add(name, secret, replace=replace)
    typer.echo(f"{entry.name}: {entry.address}")


# --- inside -----------------------------------------------------------------------------------------------------------


def _home(state_dir: Path) -> Home:
    from tessera.training.home import Home

    return Home.existing(state_dir)


@contextmanager
def _locked(state_dir: Path, *, create: bool = False) -> Iterator[Home]:
    from tessera.training.home import Home

    home = Home(state_dir) if create else Home.existing(state_dir)
    with home.locked():
        yield home


def _refuse_peer(name: str) -> None:
    if name == "peer" or name.startswith("peer-"):
        raise Invalid("the name peer is this node's own; a further key is an account")


def _write_new(file: Path, content: bytes) -> None:
    from tessera.training.files import write_atomic

    if file.exists():
        raise Conflict(f"{file} exists: nothing was written")
    try:
        write_atomic(file, content, mode=0o600, replace=False)
    except OSError as error:
        raise Invalid(f"cannot write {file}: {error.strerror}") from error
