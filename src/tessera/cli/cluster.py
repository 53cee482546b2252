"""`tessera cluster`: agents that work together under one mandate, and the account of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import AsJson, StateDir, choice, default_state_dir

__all__ = ["cluster_app"]

cluster_app = typer.Typer(no_args_is_help=True, help="Agents that hire each other under one mandate.")


@cluster_app.command()
def studio(
    fault: Annotated[str, typer.Option(help="Of the first narrator: none, silent, absent or dead.")] = "none",
    compare: Annotated[
        bool, typer.Option(help="Also buy of the same agents one by one, and report the value.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the generated prices.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Where to put the film too, as MP4.")] = None,
    port: Annotated[int, typer.Option(help="The page's. 0 = any free one.")] = 8404,
    host: Annotated[str, typer.Option(help="Address that the page listens on.")] = "127.0.0.1",
    once: Annotated[
        bool, typer.Option(help="End when the film is delivered, instead of showing it until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("studio"),
) -> None:
    """Four agents hire each other and deliver a market recap as a video, paid through an escrow. Offline."""
    from tessera.cli.logs import configure_logs
    from tessera.cli.running import run_until_signal
    from tessera.cli.studio import run_studio
    from tessera.devnet.studio.cast import StudioConfig

    kind = choice("--fault", fault, ("none", "silent", "absent", "dead"))
    config = StudioConfig(state_dir=state_dir, fault=kind, compare=compare, seed=seed)
    configure_logs("warning", state_dir / "logs" / "studio.log")
    run_until_signal(lambda: run_studio(config, host=host, port=port, once=once, out=out, as_json=as_json))


@cluster_app.command("list")
def list_productions(as_json: AsJson = False, state_dir: StateDir = default_state_dir("studio")) -> None:
    """What clusters have produced here."""
    from tessera.cli.studio import show_productions

    show_productions(state_dir, as_json=as_json)


@cluster_app.command()
def report(
    number: Annotated[int, typer.Option(help="Which production. 0 = the last one.")] = 0,
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("studio"),
) -> None:
    """The account of one production: every job, payment and refund."""
    from tessera.cli.studio import show_report

    show_report(state_dir, number, as_json=as_json)
