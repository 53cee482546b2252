"""The Python twin of `contracts/run.vy`: the same rules on plain objects, without signatures and storage.

Tests run both side by side, and each refusal must be the same one. Consent is here the set of who signed; the draw's
outcome is given, and only whether it may be one of the least served stages is checked. What the contract counts
(`served`, `bonded`) is here computed from the members, so that the two agree only if the contract counts right.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import IntEnum

from tessera.core.errors import Refused

__all__ = ["Member", "Pending", "RunTwin", "Status"]

BPS = 10_000
CANDIDATE_S = 3_600
MAX_WORKERS = 128


class Status(IntEnum):
    """In the order in which a member may pass through them; `SLASHED` can follow on `WORKER`, `LEAVING` and `LEFT`."""

    NOBODY = 0
    BONDED = 1
    DRAWN = 2
    WORKER = 4
    LEAVING = 8
    LEFT = 16
    WITHDRAWN = 32
    SLASHED = 64


@dataclass(slots=True)
class Member:
    """One account's seat. `since` as in the contract: seconds."""

    status: Status
    peer: str
    bond: int
    since: int
    stage: int = 0


@dataclass(frozen=True, slots=True)
class Pending:
    """A proposal that waits out its challenge window."""

    epoch: int
    shares: int
    opens_at: int


@dataclass(slots=True)
class RunTwin:
    """One run. Methods raise `Refused` with the contract's reason as `rule`, and then change nothing.

    `paid` is what the contract has paid out, by receiver; the share contract is called "share".
    """

    stages: int
    most: int
    stake: int
    window_s: int
    delay_s: int
    reward_bps: int
    epochs: int
    early_bps: int
    epoch_shares: int
    members: dict[str, Member] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    begun: bool = False
    changes: int = 0
    attempt: int = 0
    pending: Pending | None = None
    posted: list[int] = field(default_factory=list)  # shares, by epoch
    paid: dict[str, int] = field(default_factory=dict)

    @property
    def workers(self) -> set[str]:
        return {name for name, member in self.members.items() if member.status in (Status.WORKER, Status.LEAVING)}

    @property
    def bonded(self) -> int:
        return sum(member.bond for member in self.members.values())

    def served(self, stage: int) -> int:
        """Who is there, or on his way there, and stays."""
        staying = (Status.DRAWN, Status.WORKER)
        return sum(member.stage == stage and member.status in staying for member in self.members.values())

    def least_served(self) -> set[int]:
        """The stages of which the draw is one; empty when all are full."""
        counts = [self.served(stage) for stage in range(self.stages)]
        return {stage for stage, count in enumerate(counts) if count == min(counts) < self.most}

    def cap(self, epoch: int) -> int:
        if epoch >= self.epochs:
            return 0
        extra = (self.early_bps - BPS) * (self.epochs - 1 - epoch) // max(self.epochs - 1, 1)
        return self.epoch_shares * (BPS + extra) // BPS

    def status(self, account: str) -> Status:
        return self.members[account].status if account in self.members else Status.NOBODY

    # --- coming and going -------------------------------------------------------------------------------------------

    def bond(self, account: str, peer: str, now: int) -> None:
        _require(account not in self.members, "account had a seat")
        _require(peer not in self.peers, "peer had a seat")
        self.members[account] = Member(Status.BONDED, peer, self.stake, now)

    def draw(self, account: str, stage: int | None, now: int) -> None:
        """`stage` is what the contract drew; None when it refused."""
        _require(self.status(account) is Status.BONDED, "no candidate without a stage")
        _require(bool(self.least_served()), "every stage is full")
        _require(stage in self.least_served(), "not a least served stage")
        assert stage is not None
        member = self.members[account]
        member.status, member.stage, member.since = Status.DRAWN, stage, now

    def expire(self, account: str, now: int) -> None:
        """By a stranger, of a run that has begun."""
        _require(self.status(account) in (Status.BONDED, Status.DRAWN), "no candidate")
        _require(now > self.members[account].since + CANDIDATE_S, "candidate may still be taken in")
        _require(self.begun, "has not begun")
        self._release(account, now)

    def begin(self, founders: Collection[str]) -> None:
        for founder in founders:
            self._admit(founder)
        _require({self.members[f].stage for f in founders} == set(range(self.stages)), "a stage without a worker")
        self.begun = True

    def change(self, joiner: str | None, leaver: str | None, signers: Collection[str], now: int) -> None:
        _require(joiner != leaver, "empty change")
        self._require_majority(signers)
        workers = self.workers
        _require(leaver is None or leaver in workers, "not a worker")
        if joiner is not None:
            self._may_join(joiner, len(workers) - (leaver is not None))
        _require(len(workers) + (joiner is not None) > (leaver is not None), "last worker")
        if leaver is not None:
            self._release(leaver, now)
        if joiner is not None:
            self._admit(joiner)
        self.changes += 1

    def leave(self, account: str, now: int) -> None:
        _require(self.status(account) is Status.WORKER, "not a worker")
        self.members[account].status, self.members[account].since = Status.LEAVING, now

    def exit(self, account: str, now: int) -> None:
        _require(self.status(account) is Status.LEAVING, "has not announced to leave")
        _require(now >= self.members[account].since + self.delay_s, "too early to leave alone")
        self._release(account, now)
        self.changes += 1

    def withdraw(self, account: str, now: int) -> None:
        _require(self.status(account) is Status.LEFT, "nothing to withdraw")
        _require(now >= self.members[account].since, "bond is still at risk")
        self._pay(account, self._take(account, Status.WITHDRAWN))

    # --- epochs -----------------------------------------------------------------------------------------------------

    def propose(self, epoch: int, shares: int, signers: Collection[str], now: int) -> None:
        _require(self.pending is None, "a proposal is waiting")
        _require(epoch == len(self.posted), "not the next epoch")
        _require(shares <= self.cap(epoch), "too many shares")
        self._require_majority(signers)
        self.pending = Pending(epoch, shares, now + self.window_s)

    def strike(self, signers: Collection[str], now: int) -> None:
        _require(self.pending is not None, "not the waiting proposal")
        assert self.pending is not None
        _require(now < self.pending.opens_at, "challenge window is over")
        self._require_workers(signers, self.workers)
        _require(len(signers) > 0 and 3 * len(signers) >= len(self.workers), "too few signatures")
        self.pending, self.attempt = None, self.attempt + 1

    def post(self, now: int) -> None:
        _require(self.pending is not None, "not the waiting proposal")
        assert self.pending is not None
        _require(now >= self.pending.opens_at, "challenge window is open")
        self.posted.append(self.pending.shares)
        self.pending = None

    # --- disputes ---------------------------------------------------------------------------------------------------

    def slash(self, worker: str, challenger: str, signers: Collection[str]) -> None:
        others = self.workers - {worker}
        self._require_workers(signers, others)
        _require(len(signers) > 1 and 3 * len(signers) > 2 * len(others), "too few signatures")
        self.lose(worker, challenger)

    def lose(self, worker: str, challenger: str) -> None:
        """Of two receipts that contradict each other: no consent is needed."""
        _require(self.status(worker) in (Status.WORKER, Status.LEAVING, Status.LEFT), "no bond to take")
        self.changes += worker in self.workers
        bond = self._take(worker, Status.SLASHED)
        reward = bond * self.reward_bps // BPS
        self._pay(challenger, reward)
        self._pay("share", bond - reward)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _require_majority(self, signers: Collection[str]) -> None:
        self._require_workers(signers, self.workers)
        _require(3 * len(signers) > 2 * len(self.workers), "too few signatures")

    def _require_workers(self, signers: Collection[str], may_sign: Collection[str]) -> None:
        _require(all(signer in may_sign for signer in signers), "not a worker's signature")

    def _may_join(self, account: str, workers: int) -> None:
        _require(self.status(account) is Status.DRAWN, "no candidate with a stage")
        _require(workers < MAX_WORKERS, "too many workers")
        _require(self.members[account].peer not in self.peers, "peer had a seat")

    def _admit(self, account: str) -> None:
        self._may_join(account, len(self.workers))
        self.peers[self.members[account].peer] = account
        self.members[account].status = Status.WORKER

    def _release(self, account: str, now: int) -> None:
        member = self.members[account]
        member.status, member.since = Status.LEFT, now + self.delay_s

    def _take(self, account: str, status: Status) -> int:
        member = self.members[account]
        bond, member.bond, member.status = member.bond, 0, status
        return bond

    def _pay(self, receiver: str, amount: int) -> None:
        self.paid[receiver] = self.paid.get(receiver, 0) + amount


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise Refused(reason, rule=f"run: {reason}")
