"""How fast the uplink is, as seen from what peers acknowledged.

Time is cut into ticks. A tick says something when bulk transfers wanted to send during all of it:

- without a limit, or with one above the estimate (a *probe*), what was acknowledged is what the uplink can do;
- unless the limit was used up and some peer took all that it was sent (the tick is *clear*): then the uplink carried
  the limit, and whoever took less is slow himself;
- below the limit that stood, something behind us is slower than we thought;
- at the limit, the limit was the bottleneck, and the tick says nothing about the uplink.

The estimate is the larger of what the last `MEMORY` probes found, or the largest of `SHORTS` ticks in a row below the
limit: one bad second does not lower it. A limit that is never exceeded would hide an uplink that is faster than it, so
now and then a tick probes above the estimate; as long as that finds more, the next tick does too, and one well below
the estimate then drains the queue that a fruitless probe has built.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

__all__ = ["CRUISE", "TICK_S", "UplinkEstimate"]

TICK_S = 0.5
BUSY = 0.9  # the part of a tick in which bulk must want to send, for the tick to say something
CRUISE = 0.8  # of the estimate: what bulk may use, so that small messages find the queue empty
CRUISE_TICKS = 10
PROBE = 1.25  # a probe leaves a queue of at most 0.25 × TICK_S
DRAIN = 0.5
FOUND = 1.05  # × estimate: an acknowledged rate from which on a probe has found more
SHORT = 0.9  # × limit: a rate under which the limit was not the bottleneck
STEADY = 1.25  # without a limit: growth from tick to tick under which the rate has settled
MEMORY = 2  # probes
SHORTS = 4  # ticks


class _Phase(Enum):
    UNLIMITED = "unlimited"
    CRUISING = "cruising"
    PROBING = "probing"
    DRAINING = "draining"


class UplinkEstimate:
    """Fed by `tick`; `bytes_per_s` is None until something was measured. Cost: O(1) for each tick, and no task."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._phase, self._gain, self._left = _Phase.UNLIMITED, CRUISE, 0
        self._heard: deque[float] = deque(maxlen=MEMORY)
        self._short: list[float] = []  # the ticks in a row in which the limit was not the bottleneck
        self._before: float | None = None  # the rate of the last busy tick without a limit

    @property
    def limit(self) -> float | None:
        """What bulk may send now, in bytes per second; None is no limit."""
        return None if self.bytes_per_s is None else self._gain * self.bytes_per_s

    def tick(self, acknowledged: float, elapsed_s: float, busy_s: float, *, clear: bool = False) -> None:
        """`acknowledged` bytes in `elapsed_s`, during `busy_s` of which bulk wanted to send."""
        rate, busy = acknowledged / elapsed_s, busy_s >= BUSY * elapsed_s
        if clear and busy and self.bytes_per_s is not None:
            rate = max(rate, self._gain * self.bytes_per_s)
        if self.bytes_per_s is None:
            self._first(rate, busy)
            return
        if self._phase is _Phase.PROBING:
            self._probed(rate, busy, self.bytes_per_s)
        elif self._phase is _Phase.DRAINING:
            self._enter(_Phase.CRUISING, CRUISE, CRUISE_TICKS)
        else:
            self._cruised(rate, busy, self.bytes_per_s)

    def _first(self, rate: float, busy: bool) -> None:
        before, self._before = self._before, rate if busy else None
        if before is not None and busy and 0 < rate < STEADY * before:
            self._hear(rate)
            self._enter(_Phase.DRAINING, DRAIN, 1)

    def _cruised(self, rate: float, busy: bool, estimate: float) -> None:
        if rate > estimate:
            self._hear(rate)
        if not busy:
            return
        self._short = [*self._short, rate] if 0 < rate < SHORT * self._gain * estimate else []
        if len(self._short) == SHORTS:
            self._heard.clear()
            self._hear(max(self._short))
            self._short = []
        self._left -= 1
        if self._left <= 0:
            self._enter(_Phase.PROBING, PROBE, 1)

    def _probed(self, rate: float, busy: bool, estimate: float) -> None:
        if busy and rate > 0:
            self._hear(rate)
        if busy and rate >= FOUND * estimate:
            self._enter(_Phase.PROBING, PROBE, 1)
        else:
            self._enter(_Phase.DRAINING, DRAIN, 1)

    def _hear(self, rate: float) -> None:
        if rate > 0:
            self._heard.append(rate)
            self.bytes_per_s = max(self._heard)

    def _enter(self, phase: _Phase, gain: float, ticks: int) -> None:
        self._phase, self._gain, self._left = phase, gain, ticks
