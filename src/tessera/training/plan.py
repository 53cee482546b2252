"""A step as its lead sees it: which worker has which microbatch at each stage, and what is done.

A path names one worker for each stage. When a worker is lost, each of his microbatches goes to another worker of his
stage and keeps the rest of its path: the neighbours on it send their codes and gradients again, and nobody else
computes anything twice. A step is complete when, for every microbatch, each worker on its path has it in his sums.

Pure: no input, no output, no clock but the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tessera.core.ids import PeerId
from tessera.training.routing import Router

__all__ = ["Order", "StepPlan"]

Path = tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """Have `worker` send microbatch `index` along `path`: begin with it at stage 0, or send its codes again."""

    worker: PeerId
    stage: int
    index: int
    path: Path
    again: bool


class StepPlan:
    """One step of `count` microbatches.

    Args:
        workers: for each stage, those who may get work; never empty.
        depth: most microbatches under way at once.
    """

    def __init__(self, count: int, workers: Sequence[Sequence[PeerId]], router: Router, depth: int) -> None:
        self._count, self._router, self._depth = count, router, depth
        self._workers = [list(stage) for stage in workers]
        self._paths: dict[int, Path] = {}
        self._done: dict[int, set[int]] = {}  # microbatch -> stages that have it in their sums
        self._open: set[int] = set()
        self._dropped: set[int] = set()

    @property
    def complete(self) -> bool:
        return len(self._paths) == self._count and not self._open

    @property
    def finished(self) -> int:
        """How many microbatches are done at every stage."""
        return len(self._paths) - len(self._open) - len(self._dropped)

    def path(self, index: int) -> Path:
        return self._paths[index]

    def open(self) -> list[int]:
        """Microbatches under way."""
        return sorted(self._open)

    def contributors(self, stage: int) -> dict[PeerId, list[int]]:
        """Who has what of the step in his sums at `stage`, by index."""
        held: dict[PeerId, list[int]] = {}
        for index in sorted(self._paths):
            if stage in self._done[index]:
                held.setdefault(self._paths[index][stage], []).append(index)
        return held

    def owes(self, worker: PeerId, stage: int) -> int:
        """How many microbatches `worker` has still to finish."""
        return sum(1 for i in self._open if self._paths[i][stage] == worker and stage not in self._done[i])

    def feed(self, now: float) -> list[Order]:
        """Begin with as many microbatches as may be under way."""
        orders = []
        while len(self._paths) < self._count and len(self._open) < self._depth:
            index = len(self._paths)
            path = tuple(self._router.choose(stage, now) for stage in self._workers)
            self._paths[index], self._done[index] = path, set()
            self._open.add(index)
            orders.append(Order(path[0], 0, index, path, again=False))
        return orders

    def done(self, worker: PeerId, index: int, now: float) -> bool:
        """`worker` has `index` in his sums. False for what he was not asked, or said before."""
        path = self._paths.get(index)
        if path is None or worker not in path:
            return False
        stage = path.index(worker)
        if stage in self._done[index]:
            return False
        self._done[index].add(stage)
        self._router.settle(worker, now)
        if len(self._done[index]) == len(path):
            self._open.discard(index)
        return True

    def lose(self, worker: PeerId, now: float) -> list[Order] | None:
        """Give all that `worker` had in this step to others. None when his stage has nobody else: the step is lost."""
        stage = next((s for s, workers in enumerate(self._workers) if worker in workers), None)
        if stage is None:
            return []
        self._workers[stage].remove(worker)
        self._router.release(worker)
        if not self._workers[stage]:
            return None
        mine = [index for index, path in self._paths.items() if path[stage] == worker and index not in self._dropped]
        return [self._reroute(index, stage, now) for index in sorted(mine)]

    def again(self, indexes: Iterable[int], stage: int) -> list[Order]:
        """Have the codes of these sent to `stage` again, along the same paths: a link broke and stands again."""
        return [self._order(index, stage) for index in indexes if index in self._open]

    def crossing(self, upper: PeerId, lower: PeerId) -> list[int]:
        """Microbatches under way whose path leads from `upper` to `lower`."""
        return [i for i in self.open() if (upper, lower) in zip(self._paths[i], self._paths[i][1:], strict=False)]

    def drop(self) -> list[int]:
        """Give up what is under way; the step ends without."""
        late = self.open()
        self._dropped.update(late)
        self._open.clear()
        return late

    def _reroute(self, index: int, stage: int, now: float) -> Order:
        path = self._paths[index]
        other = self._router.choose(self._workers[stage], now)
        self._paths[index] = (*path[:stage], other, *path[stage + 1 :])
        self._done[index].discard(stage)
        self._open.add(index)
        return self._order(index, stage)

    def _order(self, index: int, stage: int) -> Order:
        path = self._paths[index]
        return Order(path[max(stage - 1, 0)], max(stage - 1, 0), index, path, again=True)
