"""`tessera models …`: bring in checkpoints made elsewhere, list what is here, write one back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import AsJson, StateDir, choice, default_state_dir

if TYPE_CHECKING:
    from tessera.models.card import ModelCard

__all__ = ["IMPORT_HELP", "Boundary", "Context", "Stages", "models_app"]

models_app = typer.Typer(
    help="Models to serve: import a checkpoint folder, list, export, remove.", no_args_is_help=True
)

IMPORT_HELP = "A Llama, Mistral, Qwen2 or Qwen3 checkpoint: config.json, tokenizer.json, safetensors."
Stages = Annotated[int, typer.Option(help="Stages that it is cut into; at most one for each layer.")]
Boundary = Annotated[str, typer.Option(help="What crosses between stages: dense (bfloat16) or int8.")]
Context = Annotated[int, typer.Option(help="Most tokens of a session. Default: what it was made for.")]


@models_app.command("import")
def models_import(
    path: Annotated[Path, typer.Argument(help=IMPORT_HELP)],
    name: Annotated[str, typer.Option(help="What requests call it. Default: the folder's name.")] = "",
    stages: Stages = 4,
    boundary: Boundary = "dense",
    context: Context = 0,
    compute: Annotated[str, typer.Option(help="float32 or bfloat16. Default: the checkpoint's.")] = "",
    state_dir: StateDir = default_state_dir("serve"),
    as_json: AsJson = False,
) -> None:
    """Cut a checkpoint into stages and keep them here, one at a time in memory."""
    from tessera.devnet.library import Import, import_model
    from tessera.training.home import Home

    how = Import(
        stages=stages, boundary=choice("--boundary", boundary, ("dense", "int8")), context=context,
        compute=choice("--compute", compute, ("", "float32", "bfloat16")),
    )  # fmt: skip
    card = import_model(
        Home(state_dir), path, name or path.resolve().name, how,
        progress=lambda done, total: None if as_json else typer.echo(f"stage {done} of {total}", err=True),
    )  # fmt: skip
    _show([card], as_json=as_json, many=False)


@models_app.command("list")
def models_list(state_dir: StateDir = default_state_dir("serve"), as_json: AsJson = False) -> None:
    """The models that this state directory can serve."""
    from tessera.devnet.library import known_models
    from tessera.training.home import Home

    _show(known_models(Home.existing(state_dir)), as_json=as_json, many=True)


@models_app.command("export")
def models_export(
    name: Annotated[str, typer.Argument(help="Its name, or the first digits of its digest.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    state_dir: StateDir = default_state_dir("serve"),
) -> None:
    """Write a model as a checkpoint folder that transformers, vLLM and others read."""
    from tessera.devnet.library import export_model, find_model
    from tessera.training.home import Home

    home = Home.existing(state_dir)
    export_model(home, find_model(home, name), folder)
    typer.echo(f"{name} is in {folder}")


@models_app.command("export-run")
def models_export_run(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    run: Annotated[str, typer.Option("--run", help="The first digits of a run's id. Default: the newest here.")] = "",
    others: Annotated[
        list[Path] | None, typer.Option("--from", help="Another worker's state directory. Repeat for more.")
    ] = None,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Write the model that a run trained as a checkpoint folder, from the checkpoints of its workers."""
    from tessera.cli.runs import find_manifest
    from tessera.devnet.trained import export_run
    from tessera.training.home import Home

    manifest = find_manifest(run, state_dir)
    step = export_run(Home.existing(state_dir), manifest, others or [], folder)
    typer.echo(f"{manifest.name} after step {step} is in {folder}")


@models_app.command("remove")
def models_remove(
    name: Annotated[str, typer.Argument(help="Its name, or the first digits of its digest.")],
    state_dir: StateDir = default_state_dir("serve"),
) -> None:
    """Forget a model and drop its files."""
    from tessera.devnet.library import remove_model
    from tessera.training.home import Home

    card = remove_model(Home.existing(state_dir), name)
    typer.echo(f"{card.name} is gone, {card.size_bytes / 1e6:,.1f} MB with it")


def _show(cards: list[ModelCard], *, as_json: bool, many: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    rows = [_facts(card) for card in cards]
    if as_json:
        typer.echo(json.dumps(rows if many else rows[0]))
        return
    if not rows:
        Console().print("No model yet. `tessera models import PATH` brings one in.")
        return
    right = [Column(name, justify="right") for name in ("params", "stages", "on disk", "context")]
    table = Table(
        Column("model", overflow="fold"), "family", *right, "boundary", Column("digest", no_wrap=True), box=None
    )
    for row, card in zip(rows, cards, strict=True):
        table.add_row(
            card.name, card.family, _short(card.params), str(card.spec.stages), f"{_short(card.size_bytes)}B",
            f"{card.spec.model.context:,}", str(row["boundary"]), card.digest[:8],
        )  # fmt: skip
    Console().print(table, highlight=False)


def _short(number: int) -> str:
    """
    >>> _short(999), _short(7_241_732_096)
    ('999', '7.2 G')
    """
    size, units = float(number), ["", " k", " M", " G", " T"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.1f}{units[0]}" if units[0] else str(number)


def _facts(card: ModelCard) -> dict[str, object]:
    return {
        "name": card.name,
        "digest": card.digest,
        "family": card.family,
        "stages": [stage.model_dump() for stage in card.stages],
        "params": card.params,
        "size_bytes": card.size_bytes,
        "context": card.spec.model.context,
        "boundary": "int8" if card.spec.codec.wire == "int8" else "dense",
        "boundary_bytes_per_token": card.spec.message_bytes_per_token(),
        "compute": card.spec.model.compute,
        "chat_template": bool(card.template),
        "ends": list(card.ends),
    }
