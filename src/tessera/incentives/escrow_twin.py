"""The Python twin of `contracts/job_escrow.vy`: the same rules over plain objects, without packing or a token.

Tests run both side by side. Balances are counted from zero: a payment in is negative, one out positive, so that over
all accounts and the escrow they sum to nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from enum import IntEnum

from tessera.core.errors import Conflict, Invalid, Late, Refused

__all__ = ["EscrowTwin", "Job", "JobStatus"]

WHOLE = 10_000


class JobStatus(IntEnum):
    """As the contract counts them. A job only moves forward."""

    OPEN = 0
    FUNDED = 1
    SUBMITTED = 2
    COMPLETED = 3
    REJECTED = 4
    EXPIRED = 5


ENDED = (JobStatus.COMPLETED, JobStatus.REJECTED, JobStatus.EXPIRED)


@dataclass(slots=True)
class Job:
    client: str
    provider: str | None
    evaluator: str
    deadline: int
    on_silence: int
    bond: int
    budget: int = 0
    bonded: bool = False
    status: JobStatus = JobStatus.OPEN


@dataclass(slots=True)
class EscrowTwin:
    """Jobs, and what each account has gained by them. `grace` and times are seconds, money is in whole units.

    Invariants: sum of gains + what live jobs hold = 0; a job that has ended holds nothing.
    """

    grace: int
    jobs: list[Job] = field(default_factory=list)
    gains: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def held(self) -> int:
        """Budgets and bonds of all live jobs."""
        budgets = sum(job.budget for job in self.jobs if job.status in (JobStatus.FUNDED, JobStatus.SUBMITTED))
        return budgets + sum(job.bond for job in self.jobs if job.bonded)

    def create(self, job: Job, now: int) -> None:
        if job.provider in (job.client, job.evaluator):
            raise Invalid("the provider has another part in the job")
        if job.deadline <= now:
            raise Invalid("the deadline is over")
        self.jobs.append(job)

    def set_provider(self, job: Job, who: str, provider: str) -> None:
        self._expect(job, JobStatus.OPEN)
        self._only(who, job.client)
        if job.provider is not None:
            raise Conflict("there is a provider")
        if provider in (job.client, job.evaluator):
            raise Invalid("the provider has another part in the job")
        job.provider = provider

    def set_budget(self, job: Job, who: str, amount: int) -> None:
        self._expect(job, JobStatus.OPEN)
        self._only(who, job.client, job.provider)
        job.budget = amount

    def post_bond(self, job: Job, who: str) -> None:
        self._expect(job, JobStatus.OPEN)
        self._only(who, job.evaluator)
        if job.bonded or job.bond == 0:
            raise Conflict("no bond is due")
        job.bonded = True
        self.gains[who] -= job.bond

    def withdraw_bond(self, job: Job, who: str) -> None:
        self._expect(job, JobStatus.OPEN)
        self._only(who, job.evaluator)
        if not job.bonded:
            raise Refused("no bond is here", rule="no_bond")
        self._return_bond(job)

    def fund(self, job: Job, who: str, expected: int, now: int) -> None:
        self._expect(job, JobStatus.OPEN)
        self._only(who, job.client)
        if job.provider is None or job.budget != expected or expected == 0 or (job.bond and not job.bonded):
            raise Refused("the terms are not met", rule="terms")
        if now >= job.deadline:
            raise Late("the deadline is over")
        job.status = JobStatus.FUNDED
        self.gains[who] -= job.budget

    def submit(self, job: Job, who: str, now: int) -> None:
        self._expect(job, JobStatus.FUNDED)
        self._only(who, job.provider)
        if now >= job.deadline:
            raise Late("the deadline is over")
        job.status = JobStatus.SUBMITTED

    def complete(self, job: Job, who: str, now: int) -> None:
        self._expect(job, JobStatus.SUBMITTED)
        self._judge(job, who, now)
        job.status = JobStatus.COMPLETED
        self._pay(job.provider, job.budget)
        self._return_bond(job)

    def reject(self, job: Job, who: str, now: int) -> None:
        if job.status in ENDED:
            raise Conflict("the job has ended")
        if job.status is JobStatus.OPEN:
            self._only(who, job.client)
        else:
            self._judge(job, who, now)
            self._pay(job.client, job.budget)
        job.status = JobStatus.REJECTED
        self._return_bond(job)

    def claim_refund(self, job: Job, now: int) -> None:
        """Anybody's. Silence costs the bond: each party gets the part of it that it did not get of the budget."""
        self._expect(job, JobStatus.FUNDED, JobStatus.SUBMITTED)
        silent = job.status is JobStatus.SUBMITTED
        if now < job.deadline + (self.grace if silent else 0):
            raise Refused("not over yet", rule="not_expired")
        job.status = JobStatus.EXPIRED
        if not silent:
            self._pay(job.client, job.budget)
            self._return_bond(job)
            return
        paid, solace = job.budget * job.on_silence // WHOLE, job.bond * job.on_silence // WHOLE
        job.bonded = False
        self._pay(job.provider, paid + job.bond - solace)
        self._pay(job.client, job.budget - paid + solace)

    def _return_bond(self, job: Job) -> None:
        if job.bonded:
            job.bonded = False
            self._pay(job.evaluator, job.bond)

    def _pay(self, who: str | None, amount: int) -> None:
        if who is None:
            raise Invalid("a payment to nobody")
        self.gains[who] += amount

    def _judge(self, job: Job, who: str, now: int) -> None:
        self._only(who, job.evaluator)
        if now >= job.deadline + self.grace:
            raise Late("the time to judge is over")

    @staticmethod
    def _expect(job: Job, *statuses: JobStatus) -> None:
        if job.status not in statuses:
            raise Conflict(f"the job is {job.status.name}")

    @staticmethod
    def _only(who: str, *allowed: str | None) -> None:
        if who not in allowed:
            raise Refused(f"{who} may not", rule="role")
