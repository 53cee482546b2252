"""The commands, as typed. Each imports what it needs when it runs, so that `tessera --help` answers at once.

A command takes values and raises `TesseraError`: `tree.Configured` resolves its options (flags, variables, files of
settings) and turns a failure into one line. Commands that belong together are a sub-app in a module of their own,
registered at the end of this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera import __version__
from tessera.cli import work
from tessera.cli.agent import agent_app
from tessera.cli.backup import backup, restore
from tessera.cli.cluster import cluster_app
from tessera.cli.config import show_config
from tessera.cli.data import data_app
from tessera.cli.gateway_app import gateway_app
from tessera.cli.keys import keys_app
from tessera.cli.log_view import show_logs
from tessera.cli.models import models_app
from tessera.cli.options import AsJson, StateDir, choice, default_state_dir
from tessera.cli.relay import relay
from tessera.cli.run_app import run_app
from tessera.cli.serve import hold, serve
from tessera.cli.service import service_app
from tessera.cli.tree import Configured

__all__ = ["app"]

app = typer.Typer(
    cls=Configured,
    help="Train a model together, own it by verified work, sell access to it.",
    epilog="Every option may also stand in config.toml or in a variable TESSERA_…: see `tessera config`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tessera {__version__}")
        raise typer.Exit


@app.callback()
def root(
    log: Annotated[str | None, typer.Option(help="What is logged: debug, info, warning or error.")] = None,
    log_format: Annotated[str, typer.Option(help="On standard error: auto, console or json.")] = "auto",
    log_stderr: Annotated[bool, typer.Option(help="Log to standard error, not only to the log's file.")] = True,
    passphrase_file: Annotated[Path | None, typer.Option(help="A file with what opens protected keys.")] = None,
    disk_quota: Annotated[str | None, typer.Option(help="Most of the disk for a state directory: 50GB.")] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What holds for every command; `tree.Configured` reads it."""


# --- an economy -------------------------------------------------------------------------------------------------------


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="A folder of text. Default: Python's standard library.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0 = two to three minutes on two cores.")] = 0,
    stages: Annotated[int, typer.Option(help="Stages that the model is split into, 2 to 8.")] = 4,
    replicas: Annotated[int, typer.Option(help="Workers of each stage.")] = 1,
    codec: Annotated[str, typer.Option(help="What crosses a boundary: codec, reparam or dense.")] = "codec",
    port: Annotated[int, typer.Option(help="Page and gateway; JSON-RPC one above. 0 = any free ports.")] = 8402,
    host: Annotated[str, typer.Option(help="Address that page, gateway and JSON-RPC listen on.")] = "127.0.0.1",
    seats: Annotated[int, typer.Option(help="Seats left open for others, who join with the invitation.")] = 0,
    chain: Annotated[str | None, typer.Option(help="JSON-RPC URL of an EVM network. Default: embedded.")] = None,
    serving_bps: Annotated[int, typer.Option(help="Of income, in 10,000, to the workers who serve.")] = 0,
    once: Annotated[bool, typer.Option(help="End after one round of payments.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """A whole economy on this machine: chain, workers, training, shares, gateway, buyer, income."""
    from tessera.cli.logs import configure_logs
    from tessera.cli.running import run_until_signal
    from tessera.cli.up import run_up
    from tessera.devnet.plan import UpConfig

    kind = choice("--codec", codec, ("codec", "reparam", "dense"))
    config = UpConfig(
        state_dir=state_dir, data=data, steps=steps, stages=stages, replicas=replicas, codec=kind, host=host,
        port=port, seats=seats, chain_url=chain, serving_bps=serving_bps, once=once,
    )  # fmt: skip
    configure_logs("warning", state_dir / "logs" / "host.log")
    run_until_signal(lambda: run_up(config, as_json=as_json))


@app.command()
def chat(
    state_dir: StateDir = default_state_dir("up"),
    url: Annotated[str, typer.Option(help="Any OpenAI-compatible endpoint. Default: that of `tessera up`.")] = "",
    api_key: Annotated[str, typer.Option(help="What pays there. Default: test money of the state directory.")] = "",
    model: Annotated[str, typer.Option(help="Whom to talk to. Default: the first that is served.")] = "",
    prompt: Annotated[str, typer.Option(help="Ask once and end, instead of a conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer. 0 = half a context, up to 512.")] = 0,
) -> None:
    """Talk to a model, paying for each answer by its tokens."""
    from tessera.cli.chat import ChatOptions, run_chat

    options = ChatOptions(state_dir, url, api_key, model, prompt, max_tokens)
    if not run_chat(options):
        raise typer.Exit(1)


# --- a worker ---------------------------------------------------------------------------------------------------------


for command in (work.join, work.status, work.pause, work.resume, work.leave):
    app.command()(command)


@app.command()
def shares(state_dir: StateDir = default_state_dir("up"), as_json: AsJson = False) -> None:
    """Who owns how much of the model, and what it earned; read from the chain."""
    from tessera.cli.owners import run_shares
    from tessera.cli.running import run_until_signal

    run_until_signal(lambda: run_shares(state_dir, as_json))


@app.command()
def claim(state_dir: StateDir = default_state_dir("worker"), as_json: AsJson = False) -> None:
    """Redeem this worker's shares and pull the income that waits for it."""
    from tessera.cli.owners import run_claim
    from tessera.cli.running import run_until_signal

    run_until_signal(lambda: run_claim(state_dir, as_json))


@app.command()
def verify(
    seen: Annotated[list[Path] | None, typer.Option(help="Another member's file of heads. Repeat for more.")] = None,
    state_dir: StateDir = default_state_dir("worker"),
    as_json: AsJson = False,
) -> None:
    """Replay the host's embedded chain, and compare it with what you and other members were shown."""
    from tessera.cli.running import run_until_signal
    from tessera.cli.verify import run_verify

    run_until_signal(lambda: run_verify(state_dir, seen or [], as_json))


# --- a node -----------------------------------------------------------------------------------------------------------


@app.command()
def doctor(
    relay: Annotated[
        list[str] | None, typer.Option(help="A relay's URL, '#' and its token if it asks for one. Repeat for more.")
    ] = None,
    state_dir: StateDir = default_state_dir("worker"),
    as_json: AsJson = False,
) -> None:
    """What this machine can do, and what is wrong with its set-up."""
    from tessera.cli.doctor import run_doctor
    from tessera.cli.settings import current_settings

    run_doctor(state_dir, as_json, relays=relay or (), quota_bytes=current_settings().disk_quota_bytes)


app.command()(backup)
app.command()(restore)
app.command("logs")(show_logs)
app.command("config", context_settings={"allow_extra_args": True, "ignore_unknown_options": True,
                                        "allow_interspersed_args": False})(show_config)  # fmt: skip
app.command()(relay)
app.command()(serve)
app.command()(hold)
app.add_typer(run_app, name="run")
app.add_typer(cluster_app, name="cluster")
app.add_typer(agent_app, name="agent")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(gateway_app, name="gateway")
app.add_typer(keys_app, name="keys")
app.add_typer(service_app, name="service")
