"""A run in the terminal: live where there is one, plain lines where there is none, and the table at the end.

Invariants: `PlainView` and `final_table` write no control characters; nothing that came from a peer is read as markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from typing import Protocol

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tessera.cli.live_frame import cells, frame, seat_name
from tessera.devnet import figures as fig
from tessera.devnet.snapshot import Feed, Owner, Peer, Snapshot

__all__ = ["LiveView", "PlainView", "View", "choose_view", "final_table"]

FRAME_S = 0.4  # between two pictures: one costs some 15 ms of the cores that train
CAPTION = "Shares are cut to four decimals here; the check is exact to the last of 18."


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
    for name in ("page", "gateway", "chain"):
        url = getattr(now.urls, name)
        if url and url != getattr(old.urls, name):
            yield f"{name} at {url}"
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
    if now.sample and now.sample != old.sample:
        yield "it writes:"
        yield from (f"  | {line.expandtabs(4)}" for line in (now.sample_prompt + now.sample).splitlines())


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
            yield f"{seat_name(peer)} ({fig.short(peer.peer)}) is {peer.status}"


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
        *((seat_name(peer), fig.count(peer.verified_tokens), peer) for peer in snapshot.peers),
        *((owner.role, "", owner) for owner in snapshot.owners),
    ]
    for name, tokens, holder in holders:
        part = (fig.shares_down(holder.shares, 4), fig.percent_down(holder.shares, total))
        table.add_row(*cells(name, fig.short(holder.account), tokens, *part, fig.money_column(holder.claimed, income)))
    return table


def _income(snapshot: Snapshot) -> Table:
    income = snapshot.income
    verdict = "= revenue" if income.adds_up else f"≠ revenue, {fig.money_column(income.revenue, income)}"
    table = Table(title="Where the income is", title_justify="left", show_footer=True)
    table.add_column("part", footer=Text(f"sum {verdict}"))
    table.add_column("amount", justify="right", footer=Text(fig.money_column(income.accounted, income)))
    for name in ("claimed", "unclaimed", "undistributed", "dust"):
        table.add_row(*cells(name, fig.money_column(getattr(income, name), income)))
    return table
