"""How long to wait for replicas, learned from how long they took: no timeout that somebody has to guess.

    next = median(recent) + 3 · median(|recent − median|), within [floor, cap]

Half of the replicas would have to be slow for the median to follow them, so one that stalls cannot hold up the rest for
long. What did not arrive counts as having taken two deadlines: were it left out, a stage that slows down as a whole
would never again be in time.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from tessera.core.errors import Invalid

__all__ = ["Deadline"]

SPREADS = 3.0  # of arrivals with a bell-shaped spread, 2 in 100 come later
REMEMBERED = 32  # arrivals
LATE = 2.0  # deadlines: when something counts as having arrived that never did


class Deadline:
    """Seconds, from a common start to an arrival.

    Args:
        floor_s: the least that `next_s` says: room for jitter when all arrivals are alike.
        cap_s: the most, and what it says before it knows anything.

    Raises: Invalid unless 0 < floor_s <= cap_s, both finite.

    >>> deadline = Deadline(floor_s=1.0, cap_s=60.0)
    >>> deadline.next_s()
    60.0
    >>> for seconds in (4.0, 5.0, 6.0): deadline.observe(seconds)
    >>> deadline.next_s()
    8.0
    """

    def __init__(self, floor_s: float, cap_s: float) -> None:
        if not 0 < floor_s <= cap_s < math.inf:
            raise Invalid(f"a deadline has 0 < floor <= cap, not floor {floor_s:g} s and cap {cap_s:g} s")
        self.floor_s, self.cap_s = floor_s, cap_s
        self._recent: deque[float] = deque(maxlen=REMEMBERED)

    def observe(self, seconds: float) -> None:
        """Something arrived after `seconds`. Raises: Invalid: negative or not finite."""
        if not 0 <= seconds < math.inf:
            raise Invalid(f"an arrival takes a finite time, not {seconds:g} s")
        self._recent.append(seconds)

    def missed(self) -> None:
        """Something did not arrive within `next_s()`."""
        self.observe(min(self.cap_s, LATE * self.next_s()))

    def next_s(self) -> float:
        """How long to wait next time."""
        if not self._recent:
            return self.cap_s
        middle = median(self._recent)
        spread = median(abs(seconds - middle) for seconds in self._recent)
        return min(self.cap_s, max(self.floor_s, middle + SPREADS * spread))
