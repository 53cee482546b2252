"""How much may pass: a token bucket, and rates as people write them."""

from __future__ import annotations

import math
import re

from tessera.core.errors import Invalid

__all__ = ["TokenBucket", "parse_rate"]

BURST_S = 0.1
MIN_BURST = 64 * 1024  # bytes: one frame passes at any rate
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]?)(?:bit|bit/s|bps)", re.IGNORECASE)
_SCALE = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


class TokenBucket:
    """Lets `rate` bytes/s pass on average and a tenth of a second's worth at once. Spending may go into debt: what has
    been read from a socket cannot be put back, so the debt says how long to wait before reading on.

    Args:
        rate: bytes/s; infinite for no limit.
        now: seconds on the clock that `spend` is told.
    """

    __slots__ = ("_at", "_burst", "_level", "rate")

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._burst = max(MIN_BURST, rate * BURST_S)
        self._level, self._at = self._burst, now

    def spend(self, size: int, now: float) -> float:
        """Take `size` bytes out. Returns the seconds until more may pass; 0.0 for now."""
        if self.rate == math.inf:
            return 0.0
        self._level = min(self._burst, self._level + (now - self._at) * self.rate) - size
        self._at = now
        return max(0.0, -self._level / self.rate)


def parse_rate(text: str) -> float:
    """Bytes/s from bits/s. Raises `Invalid`.

    >>> parse_rate("20Mbit")
    2500000.0
    """
    if text in ("0", "unlimited"):
        return math.inf
    match = _RATE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise Invalid(f"a rate looks like 20Mbit, 512kbit or unlimited, not {text[:40]!r}")
    rate = float(match[1]) * _SCALE[match[2].lower()] / 8
    if rate < 1000:
        raise Invalid(f"{text} is {rate:g} bytes/s, at which no link stands; give at least 8kbit")
    return rate
