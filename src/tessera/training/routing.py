"""Who takes a microbatch: the worker of a stage who will be free first.

    choose w with the least (charged_w + 1) · seconds_w

A worker is charged when a microbatch is promised to it, and settled when its gradient is in its sums; `seconds_w` is a
moving average of the time between its settlements while it had work. So a slow worker gets less, one that takes work
and does not finish it gets no more, and nobody's own word counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.core.ids import PeerId

__all__ = ["Router"]

KEEP = 0.8  # of the average, at each settlement
FIRST_S = 1.0  # of a worker that nobody has seen work: relative to others as new, its size does not matter


@dataclass(slots=True)
class _Account:
    charged: int = 0
    seconds: float | None = None  # for each microbatch
    since: float = 0.0  # the last settlement, or when it got work after having none


class Router:
    """Charges and settles. Times are the caller's, in seconds; they never go back."""

    def __init__(self) -> None:
        self._accounts: dict[PeerId, _Account] = {}

    def choose(self, workers: Sequence[PeerId], now: float) -> PeerId:
        """One of `workers`, charged for one microbatch; of equals the first. Cost: O(workers).

        >>> router = Router()
        >>> [router.choose(["a", "b"], 0.0) for _ in range(4)]
        ['a', 'b', 'a', 'b']
        """
        known = [a.seconds for w in workers if (a := self._account(w)).seconds is not None]
        usual = min(known, default=FIRST_S)  # a newcomer is tried as if he were as good as the best
        chosen = min(workers, key=lambda w: (self._account(w).charged + 1) * (self._account(w).seconds or usual))
        account = self._account(chosen)
        if account.charged == 0:
            account.since = now
        account.charged += 1
        return chosen

    def settle(self, worker: PeerId, now: float) -> None:
        """`worker` has finished one microbatch."""
        account = self._account(worker)
        if account.charged == 0:
            return
        took, account.since = max(now - account.since, 1e-9), now
        account.seconds = took if account.seconds is None else KEEP * account.seconds + (1 - KEEP) * took
        account.charged -= 1

    def release(self, worker: PeerId) -> None:
        """Whatever was promised to `worker` is somebody else's now, or over."""
        self._account(worker).charged = 0

    def seconds(self, worker: PeerId) -> float | None:
        """For a microbatch of his, lately; None before the first."""
        return self._account(worker).seconds

    def _account(self, worker: PeerId) -> _Account:
        return self._accounts.setdefault(worker, _Account())
