"""Time as an argument: whoever needs the hour is handed a `Clock`, so that tests own it."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "FakeClock", "SystemClock"]


class Clock(Protocol):
    """Seconds since 1970, UTC."""

    def time(self) -> float: ...


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        return time.time()


class FakeClock:
    """A clock that stands still until it is told to advance."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds
