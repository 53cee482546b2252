"""One pacer for each node: bulk leaves room on the uplink, so that small messages do not wait behind it.

A full uplink fills the queue of the slowest router, and every message then waits there, whatever its stream's priority:
210 ms instead of 57 ms for 1 KiB behind two uploads at 80 Mb/s. So bulk streams of all links share a token bucket at
`CRUISE` of the uplink, and are written in pieces short enough that one of them is soon gone.

- With an owner's cap, the uplink is that cap, and everything that the node sends keeps to it: in any T seconds no more
  than cap × T and one piece, before the engine's own headers (2 to 4 % for full packets).
- Without, the uplink is measured (`uplink`), and only bulk is paced; until something is measured, nothing is.

Bulk streams take turns piece by piece, so each gets the same share, and each waits for tokens outside its engine's
locks. Under a cap, small messages and the one bulk piece whose turn it is queue in order of arrival: bulk never has
more than one place there, and never less.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import anyio.lowlevel

from tessera.core.errors import Invalid
from tessera.core.ids import PeerId
from tessera.p2p.uplink import CRUISE, TICK_S, UplinkEstimate

__all__ = ["BULK_PIECE", "Pacer"]

BULK_PIECE = 64 * 1024  # bytes
SMALLEST_PIECE = 4 * 1024
PIECE_S = 0.01  # a piece takes the uplink no longer than this, where it is slower than 6.5 MB/s
MIN_UPLINK = 1_000  # bytes per second
USED = 0.9  # of the limit: a tick in which it counts as used up
TAKEN = 0.88  # of what a peer was sent: all of it, but for what is on its way
LARGE = 0.1  # of everything that was sent: the least that says something of a peer
EPSILON = 1e-3  # bytes: what rounding may leave
SHORTEST_S = 1e-6  # a sleep that moves the clock, whatever the clock shows


class Pacer:
    """Shared by the transports of one node.

    Args:
        uplink_bytes_per_s: the owner's cap for everything; None: measure, and pace bulk alone.
        now: seconds that never go back. The default is the event loop's time, which is what sleeping follows.

    Raises: Invalid for a cap under 1 kB/s, or one that is no number.
    """

    def __init__(self, uplink_bytes_per_s: float | None = None, now: Callable[[], float] = anyio.current_time) -> None:
        if uplink_bytes_per_s is not None and not MIN_UPLINK <= uplink_bytes_per_s < math.inf:
            raise Invalid(f"an uplink has at least {MIN_UPLINK} bytes per second, not {uplink_bytes_per_s:g}")
        self._cap, self._now = uplink_bytes_per_s, now
        self._estimate = UplinkEstimate()
        self._bulk = _Bucket(self.bulk_bytes_per_s, now)
        self._all = _Bucket(lambda: self._cap, now)
        self._bulk_turn, self._turn = anyio.Lock(), anyio.Lock()  # queues: what is waited for is the wire
        self._meters: list[_Meter] = []
        self._sent: dict[PeerId, int] = {}  # in this tick
        self._senders, self._busy_s = 0, 0.0
        self._tick_at: float | None = None
        self._busy_at = 0.0

    @property
    def uplink_bytes_per_s(self) -> float | None:
        """The cap, or what was measured; None when neither is known."""
        return self._cap if self._cap is not None else self._estimate.bytes_per_s

    def bulk_bytes_per_s(self) -> float | None:
        """What bulk may send now, all streams together; None is no limit."""
        return CRUISE * self._cap if self._cap is not None else self._estimate.limit

    def piece_bytes(self, most: int, *, bulk: bool) -> int:
        """How much of a message to write at once, at most `most`."""
        rate = self.bulk_bytes_per_s() if bulk else self._cap
        if rate is None:
            return min(most, BULK_PIECE) if bulk else most
        return min(most, BULK_PIECE, max(SMALLEST_PIECE, int(rate * PIECE_S)))

    @asynccontextmanager
    async def sending(self, size: int, peer: PeerId, *, bulk: bool) -> AsyncIterator[None]:
        """Waits until `size` bytes may go to `peer`; the body writes them. Whoever stops waiting has used nothing."""
        if not bulk:
            await self._pass(size)
            self._count_sent(size, peer)
            yield
            return
        self._count_sender(1)
        try:
            async with self._bulk_turn:
                await self._bulk.wait(size)
                await self._pass(size)
                self._bulk.take(size)
            self._count_sent(size, peer)
            yield
        finally:
            self._count_sender(-1)

    async def _pass(self, size: int) -> None:
        if self._cap is not None:
            async with self._turn:
                await self._all.wait(size)
                self._all.take(size)

    # --- measuring --------------------------------------------------------------------------------------------------

    def add_meter(self, peer: PeerId, acknowledged: Callable[[], int]) -> Callable[[], None]:
        """Count what `peer` has acknowledged on a link: `acknowledged()` is the sum so far, in bytes, and never falls.

        Returns: what ends it.
        """
        meter = _Meter(peer, acknowledged, acknowledged())

        def end() -> None:
            meter.end()
            if not self._senders and meter in self._meters:  # no tick is under way that needs its last word
                self._meters.remove(meter)

        self._meters.append(meter)
        return end

    def _count_sent(self, size: int, peer: PeerId) -> None:
        if self._cap is None and self._senders:  # while nobody sends bulk, there is nothing to measure
            self._sent[peer] = self._sent.get(peer, 0) + size

    def _count_sender(self, change: int) -> None:
        if self._cap is not None:
            return
        now = self._now()
        if self._senders:
            self._busy_s += now - self._busy_at
        self._senders, self._busy_at = self._senders + change, now
        if self._tick_at is None:
            self._tick_at = now
            self._taken()
        elif now - self._tick_at >= TICK_S:
            self._tick(now - self._tick_at)
            self._tick_at, self._busy_s = now, 0.0

    def _tick(self, elapsed_s: float) -> None:
        taken, sent, limit = self._taken(), self._sent, self._estimate.limit
        self._sent = {}
        total = sum(sent.values())
        used_up = limit is not None and total >= USED * limit * elapsed_s
        clear = used_up and any(
            size >= LARGE * total and taken.get(peer, 0) >= TAKEN * size for peer, size in sent.items()
        )
        self._estimate.tick(sum(taken.values()), elapsed_s, self._busy_s, clear=clear)

    def _taken(self) -> dict[PeerId, int]:
        """What each peer has acknowledged since the last call."""
        taken: dict[PeerId, int] = {}
        for meter in self._meters:
            taken[meter.peer] = taken.get(meter.peer, 0) + meter.since()
        self._meters = [meter for meter in self._meters if not meter.over]
        return taken


@dataclass(eq=False, slots=True)
class _Meter:
    peer: PeerId
    acknowledged: Callable[[], int]
    told: int
    over: bool = False

    def since(self) -> int:
        """What is new since the last call."""
        now = self.acknowledged()
        new, self.told = max(0, now - self.told), max(now, self.told)
        return new

    def end(self) -> None:
        """What it shows now is its last word, which the tick that is under way still counts."""
        if not self.over:
            last = self.acknowledged()
            self.over, self.acknowledged = True, lambda: last


class _Bucket:
    """Tokens come at `rate()` bytes per second, up to one piece's worth; a piece is taken whole or not at all."""

    def __init__(self, rate: Callable[[], float | None], now: Callable[[], float]) -> None:
        self._rate, self._now = rate, now
        self._level: float | None = None  # full
        self._at = 0.0

    async def wait(self, size: int) -> None:
        """Until `size` bytes may go. Whoever waits must be the only one."""
        while True:
            rate = self._rate()
            if rate is None:
                await anyio.lowlevel.checkpoint()
                return
            burst = _burst(rate)
            missing = min(size, burst) - self._refill(rate, burst)
            if missing <= EPSILON:
                await anyio.lowlevel.checkpoint()
                return
            await anyio.sleep(max(missing / rate, SHORTEST_S))

    def take(self, size: int) -> None:
        rate = self._rate()
        if rate is not None:
            self._level = self._refill(rate, _burst(rate)) - size

    def _refill(self, rate: float, burst: float) -> float:
        now = self._now()
        level = burst if self._level is None else min(burst, self._level + max(0.0, now - self._at) * rate)
        self._level, self._at = level, now
        return level


def _burst(rate: float) -> float:
    return min(BULK_PIECE, max(SMALLEST_PIECE, int(rate * PIECE_S)))
