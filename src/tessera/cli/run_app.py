"""`tessera run …`: the commands about runs, as typed. What they do is in `runs`, imported when one is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import AsJson, StateDir, choice, default_state_dir

__all__ = ["run_app"]

run_app = typer.Typer(
    help="Runs: draft a manifest, create its run, invite to it, pause and close it.", no_args_is_help=True
)

Run = Annotated[str, typer.Option("--run", help="The first digits of a run's id. Default: the newest here.")]

Database = Annotated[str, typer.Option(help="The host's --database, if it has one.")]


@run_app.command("draft")
def run_draft(
    out: Annotated[Path, typer.Argument(help="The manifest's file to write.")],
    data: Annotated[Path | None, typer.Option(help="A folder of text. Default: Python's standard library.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0 = the preset's.")] = 0,
    stages: Annotated[int, typer.Option(help="Stages, 2 to 8.")] = 4,
    replicas: Annotated[int, typer.Option(help="Workers that each stage has before the run starts.")] = 1,
    codec: Annotated[str, typer.Option(help="codec, reparam or dense.")] = "codec",
    name: Annotated[str, typer.Option(help="The model's name.")] = "tessera-py",
    chain_id: Annotated[int, typer.Option(help="The chain that will hold the shares.")] = 8402,
    stake: Annotated[int, typer.Option(help="Units of the coin that each worker bonds; 0 = none.")] = 0,
    window: Annotated[int, typer.Option(help="Seconds in which a proposed epoch can be struck.")] = 0,
    delay: Annotated[int, typer.Option(help="Seconds from leaving to the bond; more than the window.")] = 86_400,
    early_weight: Annotated[
        float, typer.Option(help="What the first epoch's work counts, 1 to 100; the last's: 1.")
    ] = 1,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Prepare the text of a run and write its manifest, to read, edit and share before it is created."""
    from tessera.cli.runs import draft_run, settlement_of
    from tessera.devnet.plan import UpConfig

    kind = choice("--codec", codec, ("codec", "reparam", "dense"))
    config = UpConfig(
        state_dir=state_dir, data=data, steps=steps, stages=stages, replicas=replicas, codec=kind, name=name,
        seats=stages * replicas, settlement=settlement_of(stake, window, delay, early_weight),
    )  # fmt: skip
    draft_run(out, config, chain_id)


@run_app.command("create")
def run_create(
    manifest: Annotated[Path, typer.Argument(help="A manifest, from `tessera run draft`.")],
    workers: Annotated[int, typer.Option(help="Seats that this machine takes itself.")] = 0,
    relay: Annotated[
        list[str] | None, typer.Option(help="A relay's URL, '#' and its token if it asks for one. Repeat for more.")
    ] = None,
    bind: Annotated[str, typer.Option(help="Address and UDP port for peers. Default: every one, gateway's port.")] = "",
    port: Annotated[int, typer.Option(help="Page and gateway; JSON-RPC one above. 0 = any free ports.")] = 8402,
    host: Annotated[str, typer.Option(help="Address that page, gateway and JSON-RPC listen on.")] = "127.0.0.1",
    chain: Annotated[str | None, typer.Option(help="JSON-RPC URL of an EVM network. Default: embedded.")] = None,
    database: Annotated[str, typer.Option(help="URL of every table. Default: files in the state directory.")] = "",
    engine: Annotated[str, typer.Option(help="Of the links: iroh, or zmq inside a network of one's own.")] = "iroh",
    blobs: Annotated[str, typer.Option(help="Where data lies: any fsspec URL, s3://bucket/path. Default: here.")] = "",
    requests: Annotated[int, typer.Option(help="Paid requests of a first buyer, once it is trained.")] = 0,
    once: Annotated[bool, typer.Option(help="End after one round of payments.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Open a run and host it until Ctrl-C: prints an invitation, seats who comes, settles, then sells the model."""
    from tessera.cli.join import parse_relay
    from tessera.cli.logs import configure_logs
    from tessera.cli.running import run_until_signal
    from tessera.cli.up import run_up
    from tessera.devnet.plan import UpConfig

    relays = [parse_relay(text) for text in relay or ()]
    config = UpConfig(
        state_dir=state_dir, manifest=manifest, own_workers=workers, bind=bind, port=port, host=host, chain_url=chain,
        database=database, engine=choice("--engine", engine, ("iroh", "zmq")), blobs=blobs, requests=requests,
        once=once, relays=tuple((relay.url, relay.token) for relay in relays),
    )  # fmt: skip
    configure_logs("warning", state_dir / "logs" / "host.log")
    run_until_signal(lambda: run_up(config, as_json=as_json))


@run_app.command("list")
def run_list(state_dir: StateDir = default_state_dir("up"), as_json: AsJson = False) -> None:
    """The runs that this state directory hosts or works in."""
    from tessera.cli.runs import list_runs

    list_runs(state_dir, as_json)


@run_app.command("show")
def run_show(
    run: Annotated[str, typer.Argument(help="A manifest's file, or the first digits of a run's id.")] = "",
    state_dir: StateDir = default_state_dir("up"),
    as_json: AsJson = False,
) -> None:
    """What a manifest says: its run id, stages, cost and who owns what."""
    from tessera.cli.runs import show_run

    show_run(run, state_dir, as_json)


@run_app.command("invite")
def run_invite(
    seats: Annotated[int, typer.Option(help="How many may join with it.")] = 1,
    hours: Annotated[float, typer.Option(help="How long it lasts.")] = 72.0,
    label: Annotated[str, typer.Option(help="Your own note: whom it is for.")] = "",
    run: Run = "",
    database: Database = "",
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Print another invitation to a run that is hosted here; the host may be at work."""
    from tessera.cli.runs import invite_to_run

    invite_to_run(state_dir, run, database, seats=seats, hours=hours, label=label)


@run_app.command("invitations")
def run_invitations(
    run: Run = "", database: Database = "", state_dir: StateDir = default_state_dir("up"), as_json: AsJson = False
) -> None:
    """The invitations to a run that is hosted here, and how much of each is used."""
    from tessera.cli.runs import list_invitations

    list_invitations(state_dir, run, database, as_json)


@run_app.command("revoke")
def run_revoke(
    invitation: Annotated[str, typer.Argument(help="The first digits of an invitation's id.")],
    run: Run = "",
    database: Database = "",
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Take an invitation back: who has a seat keeps it, nobody new gets one."""
    from tessera.cli.runs import revoke_invitation

    revoke_invitation(state_dir, run, database, invitation)


@run_app.command("pause")
def run_pause(run: Run = "", state_dir: StateDir = default_state_dir("up")) -> None:
    """Have a run that is hosted here stand still; nothing is lost."""
    from tessera.cli.runs import wish_run

    wish_run(state_dir, run, "pause")


@run_app.command("resume")
def run_resume(run: Run = "", state_dir: StateDir = default_state_dir("up")) -> None:
    """Have a paused or closed run go on."""
    from tessera.cli.runs import wish_run

    wish_run(state_dir, run, "work")


@run_app.command("close")
def run_close(run: Run = "", state_dir: StateDir = default_state_dir("up")) -> None:
    """End a run that is hosted here: the workers are told, shares and income stay claimable."""
    from tessera.cli.runs import wish_run

    wish_run(state_dir, run, "close")
