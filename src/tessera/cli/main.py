"""The commands. Each imports what it needs when it runs, so that `tessera --help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.core.errors import Invalid, TesseraError

__all__ = ["app"]

app = typer.Typer(
    help="Train a model together, own it by verified work, sell access to it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
run_app = typer.Typer(help="Describe runs: create a manifest, look at one.", no_args_is_help=True)
app.add_typer(run_app, name="run")

StateDir = Annotated[
    Path, typer.Option("--state-dir", envvar="TESSERA_STATE_DIR", help="Keys, chain, model: everything that must last.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]


def default_state_dir(name: str) -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "tessera" / name


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="A folder of text. Default: Python's standard library.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0 = two to three minutes on two cores.")] = 0,
    stages: Annotated[int, typer.Option(help="Workers that the model is split over, 2 to 8.")] = 4,
    codec: Annotated[str, typer.Option(help="What crosses a boundary: codec, reparam or dense.")] = "codec",
    port: Annotated[int, typer.Option(help="Page and gateway; JSON-RPC one above. 0 = any free ports.")] = 8402,
    host: Annotated[str, typer.Option(help="Address that page, gateway and JSON-RPC listen on.")] = "127.0.0.1",
    seats: Annotated[int, typer.Option(help="Stages left open for others, who join with the ticket.")] = 0,
    chain: Annotated[str | None, typer.Option(help="JSON-RPC URL of an EVM network. Default: embedded.")] = None,
    once: Annotated[bool, typer.Option(help="End after one round of payments.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """A whole economy on this machine: chain, workers, training, shares, gateway, buyer, income."""
    from tessera.cli.up import run_up
    from tessera.devnet.plan import UpConfig

    def start() -> Coroutine[Any, Any, None]:
        kind = _choice("--codec", codec, ("codec", "reparam", "dense"))
        config = UpConfig(
            state_dir=state_dir, data=data, steps=steps, stages=stages, codec=kind, host=host, port=port,
            seats=seats, chain_url=chain, once=once,
        )  # fmt: skip
        return run_up(config, as_json=as_json)

    _run(start)


@app.command()
def join(
    ticket: Annotated[str, typer.Argument(help="The ticket that whoever runs it gave you.")],
    state_dir: StateDir = default_state_dir("worker"),
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads for training.")] = 1,
    bind: Annotated[str, typer.Option(help="Address and UDP port for peers, e.g. 0.0.0.0:4100.")] = "",
    claim_above: Annotated[int, typer.Option(help="Units of income that are worth a transaction.")] = 1,
) -> None:
    """Take a seat in a run and work: train one stage, serve it, get paid."""

    def start() -> Coroutine[Any, Any, None]:
        from tessera.cli.logs import configure_logs
        from tessera.devnet.node import NodeConfig, run_node
        from tessera.training.home import Home
        from tessera.training.worker import WorkerConfig

        configure_logs("info")  # after the quiet default of all other commands
        config = NodeConfig(bind=bind, threads=threads, worker=WorkerConfig(device=device, claim_above=claim_above))
        return run_node(Home(state_dir), ticket, config)

    _run(start)


@app.command()
def chat(
    state_dir: StateDir = default_state_dir("up"),
    url: Annotated[str, typer.Option(help="A gateway. Default: the one that `tessera up` runs.")] = "",
    prompt: Annotated[str, typer.Option(help="Ask once and end, instead of a conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 96,
) -> None:
    """Talk to the model, paying for each answer with test money."""
    from tessera.cli.chat import run_chat

    _run(lambda: run_chat(state_dir, url, prompt, max_tokens))


@app.command()
def shares(state_dir: StateDir = default_state_dir("up"), as_json: AsJson = False) -> None:
    """Who owns how much of the model, and what it earned; read from the chain."""
    from tessera.cli.owners import run_shares

    _run(lambda: run_shares(state_dir, as_json))


@app.command()
def claim(state_dir: StateDir = default_state_dir("worker"), as_json: AsJson = False) -> None:
    """Redeem this worker's shares and pull the income that waits for it."""
    from tessera.cli.owners import run_claim

    _run(lambda: run_claim(state_dir, as_json))


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
    from tessera.cli.runs import create_run
    from tessera.devnet.plan import UpConfig

    kind = _choice("--codec", codec, ("codec", "reparam", "dense"))
    _guard(
        lambda: create_run(
            out, UpConfig(state_dir=state_dir, data=data, steps=steps, stages=stages, codec=kind, name=name), chain_id
        )
    )


@run_app.command("show")
def run_show(
    manifest: Annotated[Path, typer.Argument(help="A manifest's file.")],
    as_json: AsJson = False,
) -> None:
    """What a manifest says: its run id, stages, cost and who owns what."""
    from tessera.cli.runs import show_run

    _guard(lambda: show_run(manifest, as_json))


@app.command()
def doctor(state_dir: StateDir = default_state_dir("up"), as_json: AsJson = False) -> None:
    """What this machine can do, and what is wrong with its set-up."""
    from tessera.cli.doctor import run_doctor

    _guard(lambda: run_doctor(state_dir, as_json))


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        _fail(Invalid(f"{option} is one of {', '.join(allowed)}, not {value!r}"))
    return value


def _run(start: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a command's coroutine; a named failure becomes one line, SIGTERM ends it in order."""
    from tessera.cli.running import run_until_signal

    _guard(lambda: run_until_signal(start))


def _guard(action: Callable[[], None]) -> None:
    from tessera.cli.logs import configure_logs

    configure_logs("warning")
    try:
        action()
    except TesseraError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(error: TesseraError) -> None:
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": error.to_dict()}, default=str))
    typer.echo(f"tessera: {error.message}", err=True)
    raise typer.Exit(2 if isinstance(error, Invalid) else 1)
