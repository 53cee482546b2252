"""How fast a peer is at the moment, and when it would be done with what is left."""

from __future__ import annotations

import math

__all__ = ["Pace"]

FADE_S = 5.0  # what happened longer ago counts for little
GUESS_BYTES, GUESS_S = 64 * 1024, 0.25  # of a peer about which we know nothing: 2 Mb/s, outweighed by its first piece


class Pace:
    """Bytes against the time in which at least one stream was open; silence counts as it passes."""

    def __init__(self) -> None:
        self.streams = 0
        self._bytes, self._seconds, self._last = float(GUESS_BYTES), GUESS_S, 0.0

    def begin(self, now: float) -> None:
        if not self.streams:
            self._last = now
        self.streams += 1

    def end(self, now: float) -> None:
        self._pass(now)
        self.streams -= 1

    def note(self, size: int, now: float) -> None:
        """`size` bytes have come."""
        self._pass(now)
        self._bytes += size

    def seconds(self, size: int, now: float, *, streams: int) -> float:
        """How long `size` more bytes take on one of so many streams."""
        waited = self._seconds + (now - self._last if self.streams else 0.0)
        return size * streams * waited / self._bytes

    def _pass(self, now: float) -> None:
        passed = now - self._last
        fade = math.exp(-passed / FADE_S)
        self._bytes, self._seconds, self._last = self._bytes * fade, self._seconds * fade + passed, now
