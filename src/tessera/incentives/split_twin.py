"""The Python twin of `contracts/income_split.vy`: the same rules on plain objects, without signatures and proofs.

Tests run both side by side, and each refusal must be the same one. Consent is here how many of how many workers signed.
What the contract sums up (`passed`, `assigned`, `claimed`) is here computed from what was paid and posted, so that the
two agree only if the contract's sums are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from tessera.core.errors import Refused

__all__ = ["SplitTwin", "TallyTwin"]


@dataclass(frozen=True, slots=True)
class TallyTwin:
    """What a tally gives to whom, and from when on it can be posted."""

    number: int
    leaves: Mapping[str, int]
    opens_at: int

    @property
    def amount(self) -> int:
        return sum(self.leaves.values())


@dataclass(slots=True)
class SplitTwin:
    """One split. Methods raise `Refused` with the contract's reason as `rule`, and then change nothing."""

    workers_part: Fraction
    window_s: int
    workers: int
    arrived: int = 0  # not divided yet
    received: int = 0  # divided, over all time
    to_shares: int = 0
    paid: Counter[tuple[int, str]] = field(default_factory=Counter)  # by tally and worker
    posted: list[TallyTwin] = field(default_factory=list)
    waiting: TallyTwin | None = None
    struck: int = 0

    @property
    def assigned(self) -> int:
        return sum(tally.amount for tally in self.posted)

    @property
    def claimed(self) -> int:
        return self.paid.total()

    @property
    def unassigned(self) -> int:
        """Of the workers' part, rounded down, what no posted tally has given out."""
        return int(self.received * self.workers_part) - self.assigned

    @property
    def held(self) -> int:
        """The coins that the contract must have."""
        return self.arrived + self.received - self.to_shares - self.claimed

    def distribute(self) -> int:
        """What had arrived; the shares' part is theirs at once."""
        income, self.arrived = self.arrived, 0
        self.received += income
        self.to_shares = self.received - int(self.received * self.workers_part)
        return income

    def propose(self, number: int, leaves: Mapping[str, int], signers: int, now: int) -> None:
        tally = TallyTwin(number, dict(leaves), now + self.window_s)
        if self.waiting is not None:
            raise _refuse("a tally is waiting")
        if number != len(self.posted):
            raise _refuse("not the next tally")
        if not 0 < tally.amount <= self.unassigned:
            raise _refuse("more than the workers' part")
        if 3 * signers <= 2 * self.workers:
            raise _refuse("too few signatures")
        self.waiting = tally

    def strike(self, signers: int, now: int) -> None:
        if self.waiting is None:
            raise _refuse("not the waiting tally")
        if now >= self.waiting.opens_at:
            raise _refuse("challenge window is over")
        if signers == 0 or 3 * signers < self.workers:
            raise _refuse("too few signatures")
        self.waiting = None
        self.struck += 1

    def post(self, now: int) -> None:
        if self.waiting is None:
            raise _refuse("not the waiting tally")
        if now < self.waiting.opens_at:
            raise _refuse("challenge window is open")
        self.posted.append(self.waiting)
        self.waiting = None

    def claim(self, number: int, worker: str, amount: int) -> int:
        if self.paid[number, worker]:
            raise _refuse("already paid")
        if number >= len(self.posted) or self.posted[number].leaves.get(worker) != amount:
            raise _refuse("bad proof")
        self.paid[number, worker] = amount
        return amount


def _refuse(reason: str) -> Refused:
    return Refused(f"the split refuses: {reason}", rule=f"income_split: {reason}")
