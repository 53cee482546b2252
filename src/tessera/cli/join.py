"""`tessera join`: what joining means, the question, and then the work."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import typer
from anyio import to_thread
from rich.console import Console
from rich.table import Table

from tessera.cli.logs import configure_logs
from tessera.cli.options import choice, parse_size
from tessera.cli.running import run_until_signal
from tessera.cli.settings import current_settings
from tessera.cli.status import duration
from tessera.core.errors import Invalid
from tessera.devnet.node import NodeConfig, run_node
from tessera.devnet.preview import Preview
from tessera.models.parallel import Parallel, run_follower
from tessera.models.parallel_link import RankLink, parallel_world
from tessera.p2p.relay.bucket import parse_rate
from tessera.p2p.relay.url import RelayUrl
from tessera.training.gate import GateConfig
from tessera.training.home import Home
from tessera.training.joining import Offer
from tessera.training.seating import WorkerConfig

__all__ = ["JoinOptions", "parse_relay", "run_join", "show_preview"]


@dataclass(frozen=True)
class JoinOptions:
    """As typed."""

    state_dir: Path
    yes: bool
    probe_s: float
    device: str
    memory_limit: str
    parallel: str
    threads: int
    bind: str
    relays: tuple[str, ...]
    only_when_idle: bool
    hours: str
    disk_floor: str
    uplink: str
    claim_above: int
    until_stdin_closes: bool


def run_join(invitation: str, options: JoinOptions) -> None:
    """Look, show, ask, work. Raises what `run_node` raises; Invalid when it cannot ask and may not assume."""
    world = parallel_world()
    if world is None:
        _join(invitation, options, None)
        return
    with RankLink(world, world.device(options.device)) as link:
        if world.rank == 0:
            _join(invitation, options, link)
        else:  # of several processes one speaks; the others compute
            configure_logs("warning")
            run_follower(link)


def _join(invitation: str, options: JoinOptions, link: RankLink | None) -> None:
    if not options.yes and not sys.stdin.isatty():
        raise Invalid("nobody is here to be asked: add --yes to join without a question")
    configure_logs("info", options.state_dir / "logs" / "worker.log")
    config = NodeConfig(
        bind=options.bind,
        threads=options.threads,
        probe_s=options.probe_s,
        relays=tuple(parse_relay(text) for text in options.relays),
        uplink_bytes_s=parse_rate(options.uplink) if options.uplink else None,
        gate=GateConfig(
            only_when_idle=options.only_when_idle,
            hours=options.hours,
            disk_floor_bytes=parse_size("--disk-floor", options.disk_floor),
        ),
        worker=WorkerConfig(
            device=options.device,
            memory_limit=parse_size("--memory-limit", options.memory_limit) if options.memory_limit else 0,
            parallel=choice("--parallel", options.parallel, get_args(Parallel)),
            quota_bytes=current_settings().disk_quota_bytes,
            claim_above=options.claim_above,
        ),
    )

    async def agree(preview: Preview) -> bool:
        show_preview(preview, Console(stderr=True))
        if options.yes:
            return True
        agreed = await to_thread.run_sync(_ask, abandon_on_cancel=True)
        if not agreed:
            Console(stderr=True).print("Nothing was taken. The invitation is as good as before.")
        return agreed

    run_until_signal(
        lambda: run_node(Home(options.state_dir), invitation, config, agree=agree, link=link),
        until_stdin_closes=options.until_stdin_closes,
    )


def parse_relay(text: str) -> RelayUrl:
    """`http://host:port`, or with its token: `http://host:port#token`. Raises `Invalid`."""
    url, _, token = text.partition("#")
    return RelayUrl(url, token)


def show_preview(preview: Preview, console: Console) -> None:
    """What joining means, a line for each thing."""
    offer, manifest = preview.offer, preview.offer.manifest
    place = f"worker {offer.place} of at most {manifest.most_replicas} there"
    limit = {"stage": f"stage {preview.forecast.slowest} is the slowest", "cores": "stages share this machine's cores"}
    why = limit.get(preview.forecast.limit, "the links are the limit")
    guessed = manifest.model.stages - preview.known
    basis = f"{preview.known} of {manifest.model.stages} stages measured" + (
        ", the rest taken as yours" * bool(guessed)
    )
    now = f"; {offer.tokens_per_s:,.0f} now" if offer.tokens_per_s > 0 else ""
    rows = [
        ("run", f"{manifest.name}  {manifest.run_id[:16]}…, {offer.phase}, step {offer.step:,} of "
                f"{manifest.schedule.steps:,}"),
        ("your seat", _seat(offer, place)),
        ("memory", f"{preview.memory_bytes / 1e6:,.0f} MB for training it"),
        ("pace", f"{preview.forecast.tokens_per_s:,.0f} tokens/s expected{now} ({why}; {basis})"),
        ("time", f"{duration(preview.hours * 3600)} at that pace"),
        ("your part", f"{100 * preview.share:.1f} % of the model, if all that work is verified"),
        ("stake", _stake(offer)),
    ]  # fmt: skip
    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table, highlight=False)


def _seat(offer: Offer, place: str) -> str:
    if len(offer.stages) == 1:
        return f"stage {offer.stage} of {offer.manifest.model.stages}, {place}"
    likely = ", ".join(map(str, offer.stages))
    return (
        f"one of stages {likely}, drawn when you join; measured as stage {offer.stage} of {offer.manifest.model.stages}"
    )


def _stake(offer: Offer) -> str:
    settlement = offer.manifest.settlement
    if settlement.stake_units == 0:
        return "none is asked for; nothing of yours is at risk but your time"
    back = duration(settlement.delay_s)
    return f"{settlement.stake_units:,} units of {offer.coin}; back {back} after leaving, lost for failing an audit"


def _ask() -> bool:
    return typer.confirm("Join?", default=True, err=True)
