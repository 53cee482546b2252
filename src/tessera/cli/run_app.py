"""`tessera run …`: the commands about runs, as typed. What they do is in `runs`, imported when one is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import AsJson, StateDir, choice, default_state_dir

__all__ = ["run_app"]

run_app = typer.Typer(help="Describe runs: create a manifest, look at one.", no_args_is_help=True)


@run_app.command("create")
def run_create(
    out: Annotated[Path, typer.Argument(help="The manifest's file to write.")],
    data: Annotated[Path | None, typer.Option(help="A folder of text. Default: Python's standard library.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0 = the preset's.")] = 0,
    stages: Annotated[int, typer.Option(help="Stages, 2 to 8.")] = 4,
    codec: Annotated[str, typer.Option(help="codec, reparam or dense.")] = "codec",
    name: Annotated[str, typer.Option(help="The model's name.")] = "tessera-py",
    chain_id: Annotated[int, typer.Option(help="The chain that will hold the shares.")] = 8402,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Write the manifest of a run and prepare its text; `tessera up` with the same options then runs it."""
    from tessera.cli.runs import draft_run
    from tessera.devnet.plan import UpConfig

    kind = choice("--codec", codec, ("codec", "reparam", "dense"))
    config = UpConfig(state_dir=state_dir, data=data, steps=steps, stages=stages, codec=kind, name=name)
    draft_run(out, config, chain_id)


@run_app.command("show")
def run_show(
    manifest: Annotated[Path, typer.Argument(help="A manifest's file.")],
    as_json: AsJson = False,
) -> None:
    """What a manifest says: its run id, stages, cost and who owns what."""
    from tessera.cli.runs import show_run

    show_run(str(manifest), default_state_dir("up"), as_json)
