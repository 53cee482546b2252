"""One picture of a run for a terminal, put together from what fits.

Invariants: no line wider than the terminal; from 24 lines on, no taller either; text from peers is never markup.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tessera.cli.live_curve import STYLES, draw_curve
from tessera.devnet import figures as fig
from tessera.devnet.snapshot import Boundary, Peer, Snapshot

__all__ = ["cells", "frame", "seat_name"]

STAGE_STYLES = ("blue", "green", "yellow", "magenta", "cyan", "red")
STATUS_STYLES = {"up": ("●", "green"), "down": ("●", "red"), "waiting": ("○", "yellow"), "left": ("·", "dim")}
QUIET = "bright_black"
EVENTS = 6
SAMPLE = 7  # lines of the sample
CURVE = range(5, 17)  # fewest and most lines of the curve
TILE, GAP = 13, 12  # columns of a stage and of what stands between two


def frame(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    """The picture; what matters least is left out first: the curve's height, the sample, events."""
    before = [_header(snapshot), *_reach(snapshot), _figures(snapshot)]
    after = [_pipeline(snapshot, width)] if snapshot.boundaries else []
    after += [_peers(snapshot)] if snapshot.peers else []
    tiles = 3 if snapshot.boundaries and _tiles_fit(_stages(snapshot), width) else 1
    spare = height - 6 - len(before) - tiles - (len(snapshot.peers) + 1 if snapshot.peers else 0)
    events = max(0, min(EVENTS, len(snapshot.events), spare - 10))
    sample = _sample_lines(snapshot)[: max(0, min(SAMPLE, spare - events - 12))]
    rows = min(CURVE[-1], spare - events - (len(sample) + 2 if sample else 0) - 2)
    if rows in CURVE:
        curve = draw_curve(snapshot, width - 4, rows)
        before.append(Panel(curve, title=_legend(), title_align="left", border_style=QUIET))
    if sample:
        after.append(Panel(Text("\n", QUIET).join(sample), title="it writes", title_align="left", border_style=QUIET))
    if events:
        after.append(_events(snapshot, events))
    return Group(*before, *after)


def _header(snapshot: Snapshot) -> RenderableType:
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


def _reach(snapshot: Snapshot) -> list[RenderableType]:
    """One line that says where to look and ask, once that is known."""
    urls = (("page", snapshot.urls.page), ("gateway", snapshot.urls.gateway), ("chain", snapshot.urls.chain))
    known = [(name, url) for name, url in urls if url]
    line = Text("   ", no_wrap=True, overflow="ellipsis").join(
        Text.assemble((f"{name} ", QUIET), url) for name, url in known
    )
    return [line] if known else []


def _sample_lines(snapshot: Snapshot) -> list[Text]:
    text = Text.assemble((snapshot.sample_prompt, QUIET), snapshot.sample, no_wrap=True, overflow="ellipsis")
    text.expand_tabs(4)
    return list(text.split("\n", allow_blank=True)) if text.plain.strip() else []


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
    stages = _stages(snapshot)
    if not _tiles_fit(stages, width):
        costs = (f"{index}│{index + 1} {_cost(boundary)}" for index, boundary in sorted(boundaries.items()))
        return Text("boundaries  " + "   ".join(costs), style=QUIET, no_wrap=True, overflow="ellipsis")
    seats: dict[int, list[Peer]] = {}
    for peer in snapshot.peers:
        if peer.stage is not None:
            seats.setdefault(peer.stage, []).append(peer)
    grid = Table.grid()
    tiles: list[RenderableType] = []
    for stage in range(stages):
        here = seats.get(stage, [])
        more = f" +{len(here) - 1}" if len(here) > 1 else ""
        holder = Text(f"{here[0].peer[:8]}…{more}" if here else "open seat", style="" if here else QUIET)
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


def _stages(snapshot: Snapshot) -> int:
    return max(snapshot.model.stages, len(snapshot.boundaries) + 1)


def _tiles_fit(stages: int, width: int) -> bool:
    return stages * TILE + (stages - 1) * GAP <= width


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
        seat = Text.assemble((sign, style), f" {seat_name(peer)}")
        rtt = fig.ABSENT if peer.rtt_ms is None else f"{peer.rtt_ms:.1f} ms"
        work = (fig.count(peer.verified_tokens), fig.shares_down(peer.shares), fig.money(peer.claimed, snapshot.income))
        table.add_row(seat, *cells(fig.short(peer.peer), fig.short(peer.account), *work, rtt))
    return table


def _events(snapshot: Snapshot, events: int) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for event in snapshot.events[-events:]:
        at = time.strftime("%H:%M:%S", time.localtime(event.time))
        table.add_row(Text(at, style=QUIET), Text(event.text, no_wrap=True, overflow="ellipsis"))
    return table


def seat_name(peer: Peer) -> str:
    return peer.role if peer.stage is None else f"stage {peer.stage}"


def cells(*texts: str) -> Iterator[Text]:
    """As they are: rich would read markup in plain strings."""
    return (Text(text) for text in texts)
