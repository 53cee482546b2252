"""The order in which a run reads its data sets: by name, from any window on, a few shards at a time.

Window n of a run is fixed by the run's name and n alone, so every worker finds the same tokens, and one that starts
again in the middle needs nothing from before.

**Which set.** With weights w_s (divided by their greatest common divisor) and W = Σ w_s, each W consecutive windows,
a *cycle*, hold exactly w_s windows of set s, in a shuffled order. So after n windows a set has had n·w_s/W of them,
give or take w_s.

**Which window of a set.** A *pass* reads the set's shards in a shuffled order, `active` at a time, a *group*; the
windows of a group come shuffled together. A shard of `room` = tokens - length possible starts gives a pass

    n = max(1, floor(room / length)) windows, starting at (U + floor(i · room / n)) mod room, i = 0 … n - 1

with U uniform in [0, room), new in each pass. Hence, over U, each start in a shard is equally likely in a pass: n/room.
That lies within (1/length)·(1 - length/room) … 1/length for every shard with room ≥ length, so two windows of a set
differ by less than the factor length/room of the smaller shard; targets of different windows of a pass never overlap.
A shard that is shorter than that gives one window, one with no room none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core.errors import Invalid
from tessera.models.noise import integers

__all__ = ["Mix", "Reading", "WindowOrder", "permutation"]

GROUP_LIMIT = 2**24  # windows that are shuffled together: 128 MB
_KEPT = 4  # passes, groups and cycles whose numbers are kept: the present one, the next, and one of a neighbour's step


@dataclass(frozen=True, slots=True)
class Reading:
    """One window: token `start` of shard `shard` of its set."""

    shard: int
    start: int


def permutation(count: int, *name: Any) -> NDArray[np.int64]:
    """0 … count - 1, shuffled by name. Cost: O(n log n)."""
    return np.argsort(integers(count, 2**63, *name), kind="stable")


class Mix:
    """Which set each window of a run comes from.

    Args:
        weights: one for each set, ≥ 1.
        name: what seeds the order, any canonical-encodable parts.
    """

    def __init__(self, weights: Sequence[int], *name: Any) -> None:
        if not weights or min(weights) < 1:
            raise Invalid("a mix needs a weight of at least 1 for each set")
        divisor = gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        self._cycle, self._name = sum(self._weights), name
        self._of_cycle = lru_cache(_KEPT)(self._draw)

    def locate(self, window: int) -> tuple[int, int]:
        """Window `window` of the run: its set, and its number within the set."""
        cycle, place = divmod(window, self._cycle)
        drawn = self._of_cycle(cycle)
        chosen = int(drawn[place])
        return chosen, cycle * self._weights[chosen] + int(np.count_nonzero(drawn[:place] == chosen))

    def count(self, chosen: int, window: int) -> int:
        """How many of the windows before `window` come from set `chosen`."""
        cycle, place = divmod(window, self._cycle)
        return cycle * self._weights[chosen] + int(np.count_nonzero(self._of_cycle(cycle)[:place] == chosen))

    def _draw(self, cycle: int) -> NDArray[np.int64]:
        sets = np.repeat(np.arange(len(self._weights)), self._weights)
        return sets if len(sets) == 1 else sets[permutation(self._cycle, *self._name, "cycle", cycle)]


class WindowOrder:
    """The windows of one data set in the order of reading.

    Args:
        sizes: tokens of each shard.
        length: targets of a window, which has one token more.
        active: shards that are mixed.
        name: what seeds the order.

    Raises: Invalid: no shard has room for a window, or a group would hold over 2^24 windows.
    """

    def __init__(self, sizes: Sequence[int], *, length: int, active: int, name: Sequence[Any]) -> None:
        room = np.maximum(np.asarray(sizes, dtype=np.int64) - length, 0)
        self._room = room
        self._counts = np.where(room > 0, np.maximum(room // length, 1), 0)
        self._usable = np.flatnonzero(self._counts)
        self._active, self._name = active, tuple(name)
        if self._usable.size == 0:
            raise Invalid(f"no shard of {max(sizes, default=0)} tokens or less holds a window of {length} + 1")
        largest = int(np.sort(self._counts)[-active:].sum())
        if largest > GROUP_LIMIT:
            raise Invalid(f"{active} shards at once hold {largest} windows of {length}: mix fewer or lengthen them")
        self.windows = int(self._counts.sum())  # of a pass
        self._of_pass = lru_cache(_KEPT)(self._plan_pass)
        self._of_group = lru_cache(_KEPT)(self._plan_group)

    def locate(self, number: int) -> Reading:
        """Window `number`, 0 and up, over all passes."""
        turn, within = divmod(number, self.windows)
        group = self._group(turn, within)
        _, ends, starts = self._of_pass(turn)
        shards, places = self._of_group(turn, group)
        place = within - (int(ends[group - 1]) if group else 0)
        shard, i = int(shards[place]), int(places[place])
        room, count = int(self._room[shard]), int(self._counts[shard])
        return Reading(shard, (int(starts[shard]) + i * room // count) % room)

    def shards_of(self, number: int) -> tuple[tuple[int, ...], int]:
        """The shards mixed at window `number`, and the first window after their group."""
        turn, within = divmod(number, self.windows)
        group = self._group(turn, within)
        order, ends, _ = self._of_pass(turn)
        return tuple(order[self._slice(group)].tolist()), turn * self.windows + int(ends[group])

    def _group(self, turn: int, within: int) -> int:
        return int(np.searchsorted(self._of_pass(turn)[1], within, side="right"))

    def _slice(self, group: int) -> slice:
        return slice(group * self._active, (group + 1) * self._active)

    def _plan_pass(self, turn: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The order of the shards, where each group ends, and each shard's U. O(shards)."""
        order = self._usable[permutation(self._usable.size, *self._name, "shards", turn)]
        firsts = np.arange(0, order.size, self._active)
        ends = np.cumsum(np.add.reduceat(self._counts[order], firsts))
        words = integers(self._room.size, 2**63, *self._name, "starts", turn)
        return order, ends, words % np.maximum(self._room, 1)

    def _plan_group(self, turn: int, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and number within it of each window of the group, shuffled. O(n log n) in its windows."""
        shards = self._of_pass(turn)[0][self._slice(group)]
        counts = self._counts[shards]
        shuffled = permutation(int(counts.sum()), *self._name, "windows", turn, group)
        whose = np.repeat(shards, counts)
        place = np.arange(whose.size) - np.repeat(np.cumsum(counts) - counts, counts)
        return whose[shuffled], place[shuffled]
