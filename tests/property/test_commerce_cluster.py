"""A cluster conserves money and stays within its budget, whatever its members do, and always ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from chain_support import key
from tessera.agents.commerce.buyer import Order, Progress
from tessera.agents.commerce.cluster import Cluster, ClusterReport, Part, Plan
from tessera.agents.commerce.jobs import Outcome
from tessera.agents.commerce.terms import Phase, Terms
from tessera.agents.mandates import asset_id
from tessera.core.amount import Amount
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Missing, Refused, Unavailable
from tessera.incentives.escrow_twin import EscrowTwin, Job, JobStatus

CLUSTER, EVALUATOR = key("cluster").account, key("evaluator").account
MEMBERS = [key(f"member {number}").account for number in range(4)]
ASSET, NOW, GRACE = asset_id(1, key("coin").account), 1_800_000_000, 60
HABITS = ("good", "bad", "dead", "declines", "keeps the work", "silent judge", "refused by the mandate", "blinks")


@dataclass
class TwinHires:
    """Orders over the escrow's twin; each order's provider has a habit. Counts what is bound, as the chain would."""

    habits: dict[str, str]  # by title of the order
    clock: FakeClock
    twin: EscrowTwin = field(default_factory=lambda: EscrowTwin(GRACE))
    jobs: dict[str, Job] = field(default_factory=dict)
    funded: set[str] = field(default_factory=set)
    submitted: set[str] = field(default_factory=set)
    taken_back: set[str] = field(default_factory=set)
    highest: int = 0
    looks: int = 0

    def asked(self, intent: str) -> Terms | None:
        return None

    def habit(self, order: Order) -> str:
        return self.habits[f"{order.title} {MEMBERS.index(order.provider)}"]

    async def advance(self, order: Order) -> Progress:
        self.looks += 1
        habit, now = self.habit(order), int(self.clock.time())
        if habit == "blinks" and self.looks % 3:
            raise Unavailable("the node blinks")
        if habit == "refused by the mandate":
            raise Refused("too much", rule="per_payment")
        if order.intent in self.taken_back or habit == "declines":
            return Progress(Phase.REJECTED)
        job = self.jobs.get(order.intent)
        if job is None:
            job = Job(CLUSTER, order.provider, EVALUATOR, order.deadline, 10_000, 0, budget=order.price.units)
            self.twin.create(job, now)
            self.jobs[order.intent] = job
            return Progress(Phase.NEGOTIATION, len(self.jobs))
        self._on(order, job, habit, now)
        self.highest = max(self.highest, -self.twin.gains[CLUSTER])
        number = list(self.jobs).index(order.intent) + 1
        if job.status < JobStatus.COMPLETED:
            return Progress(Phase(job.status + 1), number)
        budget = job.budget if order.intent in self.funded else 0
        silent = job.status is JobStatus.EXPIRED and order.intent in self.submitted
        paid = budget if job.status is JobStatus.COMPLETED or silent else 0
        return Progress(Phase(job.status + 1), number, Outcome(job.status, paid, budget - paid, ("0x",)))

    def _on(self, order: Order, job: Job, habit: str, now: int) -> None:
        """One act of whoever has the next one."""
        late, later = now >= job.deadline, now >= job.deadline + GRACE
        if job.status is JobStatus.OPEN and late:
            self.twin.reject(job, CLUSTER, now)
        elif job.status is JobStatus.OPEN:
            self.twin.fund(job, CLUSTER, job.budget, now)
            self.funded.add(order.intent)
        elif (job.status is JobStatus.FUNDED and late) or (job.status is JobStatus.SUBMITTED and later):
            self.twin.claim_refund(job, now)
        elif job.status is JobStatus.FUNDED and habit != "dead":
            self.twin.submit(job, str(job.provider), now)
            self.submitted.add(order.intent)
        elif job.status is JobStatus.SUBMITTED and habit == "bad":
            self.twin.reject(job, EVALUATOR, now)
        elif job.status is JobStatus.SUBMITTED and habit != "silent judge":
            self.twin.complete(job, EVALUATOR, now)

    async def take_back(self, order: Order) -> Progress:
        self.taken_back.add(order.intent)
        return Progress(Phase.REJECTED)

    async def collect(self, order: Order) -> bytes:
        if self.habit(order) == "keeps the work":
            raise Missing("not here")
        if self.jobs[order.intent].status < JobStatus.COMPLETED:
            raise Conflict("not yet")
        return order.title.encode()


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Plan, dict[str, str]]:
    parts: list[Part] = []
    for number in range(draw(st.integers(1, 5))):
        names = [part.name for part in parts]
        after = tuple(draw(st.lists(st.sampled_from(names), unique=True, max_size=3))) if names else ()
        count = draw(st.integers(1, len(MEMBERS)))
        parts.append(
            Part(name=f"p{number}", kind="k", title=f"p{number}", text="", candidates=tuple(MEMBERS[:count]),
                 evaluator=EVALUATOR, price=draw(st.integers(1, 50)), after=after, within_s=draw(st.integers(10, 90)))
        )  # fmt: skip
    spare = draw(st.integers(0, 60))
    budget = Amount(sum(part.price for part in parts) + spare, ASSET)
    plan = Plan("random", "00" * 32, tuple(parts), budget, NOW + draw(st.integers(20, 400)))
    names = [f"{part.name} {member}" for part in parts for member in range(len(MEMBERS))]
    return plan, {name: draw(st.sampled_from(HABITS)) for name in names}


async def _live(plan: Plan, hires: TwinHires) -> ClusterReport:
    cluster = Cluster(plan, hires, clock=hires.clock)
    for _ in range(1_000):
        if cluster.is_over:
            return cluster.report
        await cluster.step()
        hires.clock.advance(3)
    raise AssertionError(f"it does not end: {cluster.report.states}")


@settings(max_examples=80)
@given(clusters())
def test_money_is_conserved_the_budget_holds_and_it_ends(drawn: tuple[Plan, dict[str, str]]) -> None:
    plan, habits = drawn
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    hires = TwinHires(habits, FakeClock(NOW))
    report = anyio.run(_live, plan, hires)
    assert hires.twin.held == 0  # nothing is left in escrow
    assert sum(hires.twin.gains.values()) == 0
    assert -hires.twin.gains[CLUSTER] == report.paid <= plan.budget.units
    assert hires.highest <= plan.budget.units  # at every moment
    funded = sum(hires.jobs[intent].budget for intent in hires.funded)
    assert report.paid + report.refunded == funded
    assert report.done == all(state == "done" for state in report.states.values())
    for part in plan.parts:  # no work without the work that it needs
        if report.states[part.name] == "done":
            assert all(report.states[name] == "done" for name in part.after)


def _plan(**changes: Any) -> Plan:
    part = Part(name="a", kind="k", title="a", text="", candidates=(MEMBERS[0],), evaluator=EVALUATOR, price=5)
    fields: dict[str, Any] = {"parts": (part,), "budget": Amount(5, ASSET)} | changes
    return Plan("small", "00" * 32, deadline=NOW + 100, **fields)


def test_a_plan_that_cannot_be_carried_out_is_refused() -> None:
    (part,) = _plan().parts

    wrong: list[dict[str, Any]] = [{"after": ("a",)}, {"after": ("b",)}, {"price": 6}, {"price": 0}, {"candidates": ()}]
    for parts in ((), (part, part), *((replace(part, **fields),) for fields in wrong)):
        with pytest.raises(Invalid):
            _plan(parts=parts)


def test_a_failed_member_is_replaced_within_the_budget() -> None:
    (part,) = _plan().parts
    plan = _plan(
        parts=(Part(**{name: getattr(part, name) for name in part.__slots__} | {"candidates": tuple(MEMBERS[:3])}),)
    )
    hires = TwinHires({"a 0": "bad", "a 1": "dead", "a 2": "good"}, FakeClock(NOW))
    report = anyio.run(_live, Plan(plan.name, plan.mandate, plan.parts, plan.budget, NOW + 10_000), hires)
    assert report.done
    assert [(attempt.paid, attempt.refunded) for attempt in report.attempts] == [(0, 5), (0, 5), (5, 0)]
    assert hires.highest == 5
