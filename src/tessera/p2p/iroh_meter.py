"""What a QUIC peer has acknowledged, from an engine that tells only what was sent, what was lost, and the round trip.

What is acknowledged now was sent one round trip ago. The difference matters: a queue in front of a full uplink takes
what is sent too fast for a while, the bytes sent look like success, and only the round trip grows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio

__all__ = ["LOOK_S", "IrohMeter"]

LOOK_S = 0.05
LOOKS = 64  # 3.2 s: longer than any round trip that a live link has


class IrohMeter:
    """For `Pacer.add_meter`. `run` looks at the connection until it is cancelled.

    Args:
        connection: with `stats()` and `rtt()`, the latter in milliseconds, queues included.
    """

    def __init__(self, connection: Any, now: Callable[[], float] = anyio.current_time) -> None:
        self._connection, self._now = connection, now
        self._looks: deque[tuple[float, int]] = deque(maxlen=LOOKS)
        self._told = 0
        self._look()

    async def run(self) -> None:
        while True:
            await anyio.sleep(LOOK_S)
            self._look()

    def __call__(self) -> int:
        """Bytes so far, the engine's headers included. Never falls."""
        self._look()
        rtt_ms = self._connection.rtt()
        if rtt_ms is not None:  # None while no path is selected: before the first, and once the link is over
            self._told = max(self._told, int(self._sent_at(self._now() - rtt_ms / 1000)))
        return self._told

    def _look(self) -> None:
        stats = self._connection.stats()
        self._looks.append((self._now(), stats.udp_tx_bytes - stats.lost_bytes))

    def _sent_at(self, at: float) -> float:
        """Between two looks, as if it had been sent evenly."""
        after = bisect_right(self._looks, at, key=lambda look: look[0])
        if after == 0:
            return self._looks[0][1]
        if after == len(self._looks):
            return self._looks[-1][1]
        (start, sent), (end, sent_then) = self._looks[after - 1], self._looks[after]
        return sent + (sent_then - sent) * (at - start) / (end - start)
