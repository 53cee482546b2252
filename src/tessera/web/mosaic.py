"""What the page draws itself, as numbers for SVG: stages as tiles that fill with verified work, and bars that add up.

Invariants: parts of a bar are in hundredths of a percent and sum to the whole bar; nothing is drawn for zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.devnet.snapshot import Boundary, Peer, Snapshot

__all__ = ["COLUMNS", "ROWS", "Part", "Tile", "income_bar", "ownership_bar", "tiles"]

COLUMNS, ROWS = 10, 5
STONES = COLUMNS * ROWS
WHOLE = 10_000
COLOURS = 8  # stage colours in the style sheet; more stages start over


@dataclass(frozen=True, slots=True)
class Tile:
    """A stage: of its stones, the first `verified` are solid, the next up to `trained` pale.

    Attributes:
        peers: its workers.
        boundary: what crosses to the next stage; None after the last.
    """

    stage: int
    colour: int
    peers: tuple[Peer, ...]
    verified: int
    trained: int
    boundary: Boundary | None

    @property
    def stones(self) -> list[tuple[int, int, str]]:
        """(column, row, class) of each stone."""
        return [(i % COLUMNS, i // COLUMNS, self._tone(i)) for i in range(STONES)]

    def _tone(self, stone: int) -> str:
        return "verified" if stone < self.verified else "trained" if stone < self.trained else "open"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a bar: `start` and `width` in hundredths of a percent, `style` a class name."""

    label: str
    style: str
    amount: int
    start: int
    width: int


def tiles(snapshot: Snapshot) -> list[Tile]:
    """The pipeline from the first stage to the last; a stage where nobody is has no peers."""
    boundaries = {boundary.index: boundary for boundary in snapshot.boundaries}
    seats: dict[int, list[Peer]] = {}
    for peer in snapshot.peers:
        if peer.stage is not None:
            seats.setdefault(peer.stage, []).append(peer)
    count = max(snapshot.model.stages, max(boundaries, default=-1) + 2 if boundaries else 0, len(seats))
    planned = snapshot.tokens * snapshot.steps // snapshot.step if snapshot.step > 0 else 0
    trained = _stones(snapshot.tokens, planned)
    return [
        Tile(
            stage=stage,
            colour=stage % COLOURS,
            peers=tuple(seats.get(stage, ())),
            verified=_stones(sum(peer.verified_tokens for peer in seats.get(stage, ())), planned),
            trained=trained,
            boundary=boundaries.get(stage, Boundary(stage)) if stage < count - 1 else None,
        )
        for stage in range(count)
    ]


def income_bar(snapshot: Snapshot) -> list[Part]:
    """Where the revenue is."""
    income = snapshot.income
    return _bar([(name, name, getattr(income, name)) for name in ("claimed", "unclaimed", "undistributed", "dust")])


def ownership_bar(snapshot: Snapshot) -> list[Part]:
    """Who holds the shares: workers by stage, then the other owners."""
    workers = [
        (
            peer.role if peer.stage is None else f"stage {peer.stage}",
            f"stage-{(peer.stage or 0) % COLOURS}",
            peer.shares,
        )
        for peer in snapshot.peers
    ]
    owners = [(owner.role, f"owner-{index % 4}", owner.shares) for index, owner in enumerate(snapshot.owners)]
    return _bar([*workers, *owners])


def _bar(amounts: Sequence[tuple[str, str, int]]) -> list[Part]:
    """Cumulative rounding: each edge is rounded once, so that parts meet and the last one ends at the whole."""
    total = sum(amount for _, _, amount in amounts)
    parts, below = [], 0
    for label, style, amount in amounts:
        if amount > 0:
            start = WHOLE * below // total
            parts.append(Part(label, style, amount, start, WHOLE * (below + amount) // total - start))
        below += amount
    return parts


def _stones(part: int, whole: int) -> int:
    return min(STONES, STONES * part // whole) if whole > 0 else 0
