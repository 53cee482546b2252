"""A worker's commands, as typed: join, leave, pause, resume, status. What they do is imported when one is called."""

from __future__ import annotations

from typing import Annotated

import typer

from tessera.cli.options import AsJson, StateDir, default_state_dir

__all__ = ["join", "leave", "pause", "resume", "status"]


def join(
    invitation: Annotated[
        str, typer.Argument(help="What its host gave you. Nothing: the one that you joined with before.")
    ] = "",
    state_dir: StateDir = default_state_dir("worker"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, join.")] = False,
    probe_seconds: Annotated[float, typer.Option(help="How long to measure before asking; 0 = not at all.")] = 3.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")] = "auto",
    memory_limit: Annotated[str, typer.Option(help="Of each device's memory: 8GB. Empty = what is free.")] = "",
    parallel: Annotated[
        str, typer.Option(help="Several devices, under torchrun: replicate the stage, shard it, or auto.")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="Threads for training.")] = 1,
    bind: Annotated[str, typer.Option(help="Address and UDP port for peers, e.g. 0.0.0.0:4100.")] = "",
    relay: Annotated[
        list[str] | None, typer.Option(help="A relay's URL, '#' and its token if it asks for one. Repeat for more.")
    ] = None,
    only_when_idle: Annotated[bool, typer.Option(help="Give way to other programs and to people.")] = False,
    hours: Annotated[str, typer.Option(help="When to work, local time: 22:00-07:00.")] = "",
    disk_floor: Annotated[str, typer.Option(help="Pause while less than this is free on the disk.")] = "512MiB",
    uplink: Annotated[str, typer.Option(help="Most that this node may send: 40Mbit. Empty = measured.")] = "",
    claim_above: Annotated[int, typer.Option(help="Units of income that are worth a transaction.")] = 1,
    until_stdin_closes: Annotated[
        bool, typer.Option("--until-stdin-closes", help="Stop when the process that started this one is gone.")
    ] = False,
) -> None:
    """Take a seat in a run and work: train one stage, serve it, get paid. Shows first what that means, and asks."""
    from tessera.cli.join import JoinOptions, run_join

    options = JoinOptions(
        state_dir=state_dir, yes=yes, probe_s=probe_seconds, device=device, memory_limit=memory_limit,
        parallel=parallel, threads=threads, bind=bind, relays=tuple(relay or ()), only_when_idle=only_when_idle,
        hours=hours, disk_floor=disk_floor, uplink=uplink, claim_above=claim_above,
        until_stdin_closes=until_stdin_closes,
    )  # fmt: skip
    run_join(invitation, options)


def leave(
    state_dir: StateDir = default_state_dir("worker"),
    stay: Annotated[bool, typer.Option("--stay", help="Take it back: stay.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait here until it has left.")] = False,
) -> None:
    """Leave a run: work and be paid until the stage can do without this worker, then end."""
    from tessera.cli.status import run_leave

    run_leave(state_dir, stay=stay, wait=not no_wait)


def pause(state_dir: StateDir = default_state_dir("worker")) -> None:
    """Have the worker here stand still; the seat stays yours, the run waits for you."""
    from tessera.cli.status import run_pause

    run_pause(state_dir, "pause")


def resume(state_dir: StateDir = default_state_dir("worker")) -> None:
    """Have a paused worker go on."""
    from tessera.cli.status import run_pause

    run_pause(state_dir, "work")


def status(state_dir: StateDir = default_state_dir("worker"), as_json: AsJson = False) -> None:
    """Am I earning, and what holds me back?"""
    from tessera.cli.status import run_status

    run_status(state_dir, as_json)
