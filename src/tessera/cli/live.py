"""A run in the terminal: live where there is one, plain lines where there is none, and the table at the end.

Invariants: `PlainView` and `final_table` write no control characters; nothing that came from a peer is read as markup.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Protocol

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tessera.cli.live_curve import STYLES, draw_curve
from tessera.devnet import figures as fig
from tessera.devnet.snapshot import Boundary, Feed, Owner, Peer, Snapshot

__all__ = ["LiveView", "PlainView", "View", "choose_view", "final_table"]

FRAME_S = 0.2  # the terminal is redrawn at most five times a second
STAGE_STYLES = ("blue", "green", "yellow", "magenta", "cyan", "red")
STATUS_STYLES = {"up": ("●", "green"), "down": ("●", "red"), "waiting": ("○", "yellow")}
QUIET = "bright_black"
EVENTS_SHOWN = 6
CAPTION = "Shares are cut to four decimals here; the check is exact to the last of 18."
TILE, GAP = 13, 12  # columns of a stage and of what stands between two


class View(Protocol):
    """Shows a feed until it ends."""

    async def run(self, feed: Feed) -> None: ...


def choose_view(console: Console) -> View:
    """`LiveView` for a terminal that can move its cursor, else `PlainView`."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)


class LiveView:
    """One picture, redrawn in place; the last one stays on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def run(self, feed: Feed) -> None:
        console = self._console
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            async with aclosing(feed.changes()) as changes:
                async for snapshot in changes:
                    live.update(frame(snapshot, console.width, console.height), refresh=True)
                    await anyio.sleep(FRAME_S)


class PlainView:
    """One line for each change of note, for logs and pipes.

    Args:
        every: steps between two lines about the training.
    """

    def __init__(self, console: Console, every: int = 25) -> None:
        self._console = console
        self._every = max(1, every)

    async def run(self, feed: Feed) -> None:
        before: Snapshot | None = None
        async with aclosing(feed.changes()) as changes:
            async for snapshot in changes:
                for line in news(before, snapshot, self._every):
                    self._console.print(Text(line), soft_wrap=True, highlight=False)
                before = snapshot


def news(before: Snapshot | None, now: Snapshot, every: int = 25) -> Iterator[str]:
    """What changed, one line each. An event whose transaction another line tells is left out."""
    old = before or Snapshot()
    if before is None or (old.phase, old.phase_note) != (now.phase, now.phase_note):
        yield f"{now.phase}: {now.phase_note}" if now.phase_note else now.phase
    if now.run_id and now.run_id != old.run_id:
        yield f"run {now.run_id} on chain {now.chain_id}"
    if now.step // every != old.step // every or (now.step == now.steps != old.step):
        yield _step_line(now)
    told = set()
    for epoch in now.epochs:
        if epoch.number not in {known.number for known in old.epochs}:
            told.add(epoch.transaction)
            yield f"epoch {epoch.number}: {fig.shares_down(epoch.shares)} shares posted in {epoch.transaction}"
    for payment in (payment for payment in now.payments if payment not in old.payments):
        told.add(payment.transaction)
        yield f"payment: {fig.money(payment.units, now.income)} from {payment.payer} in {payment.transaction}"
    yield from _peer_lines(old, now)
    for event in (event for event in now.events if event not in old.events):
        if not event.transaction or event.transaction not in told:
            yield event.text


def _step_line(now: Snapshot) -> str:
    parts = [
        f"step {now.step}/{now.steps}",
        f"train {fig.loss_text(now.train_loss)}",
        f"val {fig.loss_text(now.val_loss)}",
    ]
    if now.bigram_loss is not None:
        parts.append(f"bigram {fig.loss_text(now.bigram_loss)}")
    parts += [f"{figure.value} {figure.unit}" for figure in fig.headlines(now) if figure.name in ("speed", "wire")]
    return "  ".join(parts)


def _peer_lines(old: Snapshot, now: Snapshot) -> Iterator[str]:
    before = {peer.peer: peer.status for peer in old.peers}
    for peer in now.peers:
        if before.get(peer.peer) != peer.status and (peer.peer in before or peer.status != "waiting"):
            yield f"{_seat(peer)} ({fig.short(peer.peer)}) is {peer.status}"


def frame(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    """The live picture, no taller than `height`; what matters least is left out first."""
    peers, pipeline, figures = _peers(snapshot), _pipeline(snapshot, width), _figures(snapshot)
    fixed = 2 + 3 + (4 if snapshot.boundaries else 0) + len(snapshot.peers) + 2
    spare = height - fixed - 1
    parts: list[RenderableType] = [_header(snapshot, width), figures]
    events = min(EVENTS_SHOWN, len(snapshot.events), max(0, spare - 10))
    rows = min(16, spare - events - 3)
    if rows >= 5:
        parts.append(
            Panel(draw_curve(snapshot, width - 4, rows), title=_legend(), title_align="left", border_style=QUIET)
        )
    if snapshot.boundaries:
        parts.append(pipeline)
    if snapshot.peers:
        parts.append(peers)
    if events:
        parts.append(_events(snapshot, events))
    return Group(*parts)


def _header(snapshot: Snapshot, width: int) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column()
    line.add_column(justify="right")
    name = Text.assemble(("▞ Tessera  ", "bold"), snapshot.model.name)
    if snapshot.run_id:
        name.append(f"  run {fig.short(snapshot.run_id)} · chain {snapshot.chain_id}", style=QUIET)
    line.add_row(name, Text(snapshot.phase, style="bold green" if snapshot.phase == "serving" else "bold"))
    note = Text(snapshot.phase_note, style=QUIET, no_wrap=True, overflow="ellipsis")
    done = ProgressBar(total=1.0, completed=fig.progress(snapshot), complete_style="blue", finished_style="green")
    steps = Text(f"step {fig.count(snapshot.step)} of {fig.count(snapshot.steps)}", style=QUIET)
    second = Table.grid(expand=True, padding=(0, 2, 0, 0))
    second.add_column(ratio=1)
    second.add_column(ratio=1)
    second.add_column(justify="right", no_wrap=True)
    second.add_row(note, done, steps)
    return Group(line, second)


def _figures(snapshot: Snapshot) -> RenderableType:
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    figures = fig.headlines(snapshot)
    for _ in figures:
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_row(*(Text(figure.label, style=QUIET) for figure in figures))
    table.add_row(*(Text.assemble((figure.value, "bold"), (f" {figure.unit}", "")) for figure in figures))
    table.add_row(*(Text(figure.note, style=QUIET) for figure in figures))
    return table


def _legend() -> Text:
    names = {"val": "validation", "train": "training", "bigram": "bigram model", "unigram": "unigram model"}
    parts = [(f"━ {text}  ", STYLES[name]) for name, text in names.items()]
    return Text.assemble(("loss  ", ""), *parts)


def _pipeline(snapshot: Snapshot, width: int) -> RenderableType:
    """The stages as tiles, and on each boundary what a token costs there; one line where tiles have no room."""
    boundaries = {boundary.index: boundary for boundary in snapshot.boundaries}
    stages = max(snapshot.model.stages, len(boundaries) + 1)
    if stages * TILE + (stages - 1) * GAP > width:
        costs = (f"{index}│{index + 1} {_cost(boundary)}" for index, boundary in sorted(boundaries.items()))
        return Text("boundaries  " + "   ".join(costs), style=QUIET, no_wrap=True, overflow="ellipsis")
    seats = {peer.stage: peer for peer in snapshot.peers if peer.stage is not None}
    grid = Table.grid()
    tiles: list[RenderableType] = []
    for stage in range(stages):
        seat = seats.get(stage)
        holder = Text(f"{seat.peer[:8]}…" if seat else "open seat", style="" if seat else QUIET)
        style = STAGE_STYLES[stage % len(STAGE_STYLES)]
        grid.add_column(width=TILE)
        tiles.append(Panel(holder, title=f"stage {stage}", border_style=style))
        if stage < stages - 1:
            boundary = boundaries.get(stage, Boundary(stage))
            grid.add_column(width=GAP)
            cost = f"{_cost(boundary)}\n◄────────►\n{fig.bytes_text(boundary.bytes_total)}"
            tiles.append(Text(cost, style=QUIET, justify="center"))
    grid.add_row(*tiles)
    return grid


def _cost(boundary: Boundary) -> str:
    return fig.ABSENT if boundary.bytes_per_token is None else f"{boundary.bytes_per_token:.1f} B/tok"


def _peers(snapshot: Snapshot) -> RenderableType:
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style=QUIET, pad_edge=False)
    for title in ("worker", "peer", "account"):
        table.add_column(title, no_wrap=True)
    for title in ("verified tokens", "shares", "claimed", "rtt"):
        table.add_column(title, justify="right", no_wrap=True)
    for peer in snapshot.peers:
        sign, style = STATUS_STYLES[peer.status]
        seat = Text.assemble((sign, style), f" {_seat(peer)}")
        rtt = fig.ABSENT if peer.rtt_ms is None else f"{peer.rtt_ms:.1f} ms"
        work = (fig.count(peer.verified_tokens), fig.shares_down(peer.shares), fig.money(peer.claimed, snapshot.income))
        table.add_row(seat, *_cells(fig.short(peer.peer), fig.short(peer.account), *work, rtt))
    return table


def _events(snapshot: Snapshot, events: int) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for event in snapshot.events[-events:]:
        at = time.strftime("%H:%M:%S", time.localtime(event.time))
        table.add_row(Text(at, style=QUIET), Text(event.text, no_wrap=True, overflow="ellipsis"))
    return table


def _seat(peer: Peer) -> str:
    return peer.role if peer.stage is None else f"stage {peer.stage}"


def final_table(snapshot: Snapshot) -> RenderableType:
    """Who owns the model and where its income went; both tables say whether they add up."""
    return Group(_ownership(snapshot), _income(snapshot))


def _ownership(snapshot: Snapshot) -> Table:
    held, total, income = snapshot.held_shares, snapshot.total_shares, snapshot.income
    verified = sum(peer.verified_tokens for peer in snapshot.peers)
    claimed = sum(holder.claimed for holder in snapshot.holders)
    check = "= all that were minted" if held == total else f"≠ {fig.shares_down(total, 4)} that were minted"
    sums = (
        fig.count(verified),
        fig.shares_down(held, 4),
        fig.percent_down(held, total),
        fig.money_column(claimed, income),
    )
    table = Table(title="Who owns the model", title_justify="left", show_footer=True, caption=CAPTION)
    table.add_column("holder", footer="all", no_wrap=True)
    table.add_column("account", footer=check)
    for title, footer in zip(("verified tokens", "shares", "of all", "claimed"), sums, strict=True):
        table.add_column(title, footer=Text(footer), justify="right", no_wrap=True)
    holders: list[tuple[str, str, Peer | Owner]] = [
        *((_seat(peer), fig.count(peer.verified_tokens), peer) for peer in snapshot.peers),
        *((owner.role, "", owner) for owner in snapshot.owners),
    ]
    for name, tokens, holder in holders:
        part = (fig.shares_down(holder.shares, 4), fig.percent_down(holder.shares, total))
        table.add_row(*_cells(name, fig.short(holder.account), tokens, *part, fig.money_column(holder.claimed, income)))
    return table


def _income(snapshot: Snapshot) -> Table:
    income = snapshot.income
    verdict = "= revenue" if income.adds_up else f"≠ revenue, {fig.money_column(income.revenue, income)}"
    table = Table(title="Where the income is", title_justify="left", show_footer=True)
    table.add_column("part", footer=Text(f"sum {verdict}"))
    table.add_column("amount", justify="right", footer=Text(fig.money_column(income.accounted, income)))
    for name in ("claimed", "unclaimed", "undistributed", "dust"):
        table.add_row(*_cells(name, fig.money_column(getattr(income, name), income)))
    return table


def _cells(*texts: str) -> Iterator[Text]:
    """As they are: rich would read markup in plain strings."""
    return (Text(text) for text in texts)
