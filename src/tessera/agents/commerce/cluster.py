"""A cluster: jobs that need each other's work, under one mandate, with a budget, a deadline and an account at the end.

A part is ordered when the work that it needs is there; when a seller fails, the next candidate is asked, as long as
time, budget and candidates last. Then the cluster ends cleanly: nothing new is ordered, what is not funded is taken
back, what is funded goes its way. Invariants: what is paid and what lies in escrow is never more than the budget
together, and the mandate's caps stand above that; funded = paid + refunded once it is over; each attempt is one intent,
so that a cluster that is run again after a crash goes on and pays nothing twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import anyio
import structlog

from tessera.agents.commerce.buyer import Order, Progress
from tessera.agents.commerce.terms import Brief, Phase, Terms
from tessera.agents.intents import intent_id
from tessera.core.amount import Amount
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Late, Refused, TesseraError, Unavailable
from tessera.core.ids import Account

__all__ = ["MOST_CANDIDATES", "Attempt", "Cluster", "ClusterReport", "Hires", "Part", "Plan", "Value"]

log = structlog.get_logger()
MOST_PARTS, MOST_CANDIDATES = 64, 8
INPUT_LIMIT = 65_536  # bytes of a work that goes into another part's brief
State = Literal["waiting", "ordered", "done", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One job of a cluster.

    Args:
        candidates: who may do it, the one to ask first, first.
        price: in units, for whoever does it.
        after: the parts whose work goes into its brief, by name.
        within_s: from the order to the submitted work; each further candidate gets twice as long.
    """

    name: str
    kind: str
    title: str
    text: str
    candidates: tuple[Account, ...]
    evaluator: Account
    price: int
    inputs: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    within_s: int = 120


@dataclass(frozen=True, slots=True)
class Plan:
    """All parts, and what they may cost together. Raises: Invalid for a circle, a name twice, or too small a budget."""

    name: str
    mandate: str
    parts: tuple[Part, ...]
    budget: Amount
    deadline: int  # seconds since 1970
    purpose: str = ""

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not 0 < len(names) <= MOST_PARTS or len(set(names)) != len(names):
            raise Invalid(f"a cluster has 1 to {MOST_PARTS} parts with different names")
        known: set[str] = set()
        left = list(self.parts)
        while left:
            ready = [part for part in left if set(part.after) <= known]
            if not ready:
                raise Invalid(f"these parts wait for each other, or for what is not there: {[p.name for p in left]}")
            known |= {part.name for part in ready}
            left = [part for part in left if part.name not in known]
        for part in self.parts:
            if not 0 < len(part.candidates) <= MOST_CANDIDATES or part.price <= 0 or part.within_s <= 0:
                raise Invalid(f"{part.name} needs 1 to {MOST_CANDIDATES} candidates, a price and some time")
        if (least := sum(part.price for part in self.parts)) > self.budget.units:
            raise Invalid(f"the parts cost {least} units, the budget is {self.budget.units}")


class Hires(Protocol):
    """Who orders; `buyer.Buyer` does."""

    async def advance(self, order: Order) -> Progress: ...
    async def take_back(self, order: Order) -> Progress: ...
    async def collect(self, order: Order) -> bytes: ...
    def asked(self, intent: str) -> Terms | None: ...


@dataclass(frozen=True, slots=True)
class Attempt:
    """One order for a part, and what became of it."""

    part: str
    provider: Account
    order: Order
    progress: Progress

    @property
    def paid(self) -> int:
        return self.progress.outcome.paid if self.progress.outcome else 0

    @property
    def refunded(self) -> int:
        return self.progress.outcome.refunded if self.progress.outcome else 0

    @property
    def bound(self) -> int:
        """What it may still cost, or has cost."""
        return self.paid if self.progress.is_over else self.order.price.units

    def to_dict(self) -> dict[str, Any]:
        progress = self.progress
        proofs = progress.outcome.transactions if progress.outcome else ()
        return {"part": self.part, "provider": self.provider, "job": progress.job, "phase": progress.phase.name.lower(),
                "price": self.order.price.units, "paid": self.paid, "refunded": self.refunded,
                "transactions": list(proofs), "note": progress.note}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """What working together was worth, in units: income from outside minus what the work cost whoever did it."""

    income: int
    cost: int
    income_alone: int  # of the same agents, who sell what each can do by itself
    cost_alone: int

    @property
    def together(self) -> int:
        return self.income - self.cost

    @property
    def alone(self) -> int:
        return self.income_alone - self.cost_alone

    def to_dict(self) -> dict[str, int]:
        return {
            "income": self.income, "cost": self.cost, "value": self.together, "income_alone": self.income_alone,
            "cost_alone": self.cost_alone, "value_alone": self.alone, "gain": self.together - self.alone,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """The account of a cluster; sums are in units of `budget`'s asset."""

    name: str
    done: bool
    budget: Amount
    states: Mapping[str, State]
    attempts: tuple[Attempt, ...]

    @property
    def paid(self) -> int:
        return sum(attempt.paid for attempt in self.attempts)

    @property
    def refunded(self) -> int:
        return sum(attempt.refunded for attempt in self.attempts)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "done": self.done, "budget": self.budget.units, "asset": self.budget.asset,
                "paid": self.paid, "refunded": self.refunded, "parts": dict(self.states),
                "jobs": [attempt.to_dict() for attempt in self.attempts]}  # fmt: skip


class Cluster:
    """Carries a plan out.

    Args:
        hires: orders with the plan's mandate.
        changed: told of each change, with the report as it stands.
    """

    def __init__(
        self,
        plan: Plan,
        hires: Hires,
        *,
        clock: Clock | None = None,
        changed: Callable[[ClusterReport], None] = lambda report: None,
    ) -> None:
        self.plan, self._hires, self._clock, self._changed = plan, hires, clock or SystemClock(), changed
        self.works: dict[str, bytes] = {}
        self._states: dict[str, State] = {part.name: "waiting" for part in plan.parts}
        self._attempts: dict[str, list[Attempt]] = {part.name: [] for part in plan.parts}

    @property
    def report(self) -> ClusterReport:
        attempts = tuple(attempt for part in self.plan.parts for attempt in self._attempts[part.name])
        done = all(state == "done" for state in self._states.values())
        return ClusterReport(self.plan.name, done, self.plan.budget, dict(self._states), attempts)

    @property
    def is_over(self) -> bool:
        settled = all(attempt.progress.is_over for attempt in self.report.attempts)
        return settled and all(state in ("done", "failed", "skipped") for state in self._states.values())

    async def run(self, pause: Callable[[], Awaitable[None]] | None = None) -> ClusterReport:
        """Until it is over, also when it fails. Cancel it and run it again as you like.

        Args:
            pause: between two looks; None is a fifth of a second.
        """
        while not self.is_over:
            before = self.report
            await self.step()
            if self.report != before:
                self._changed(self.report)
            if not self.is_over:
                await (anyio.sleep(0.2) if pause is None else pause())
        return self.report

    async def step(self) -> None:
        """One look at every part."""
        for part in self.plan.parts:
            state = self._states[part.name]
            if state == "waiting" and self._failing:
                self._states[part.name] = "skipped"
            elif state == "waiting" and all(self._states[name] == "done" for name in part.after):
                self._states[part.name] = "ordered"
            if self._states[part.name] == "ordered":
                try:
                    await self._advance(part)
                except (Unavailable, Late) as error:  # look again, while there is time
                    log.info("part_not_seen", part=part.name, code=error.code)

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _failing(self) -> bool:
        return "failed" in self._states.values()

    async def _advance(self, part: Part) -> None:
        attempts = self._attempts[part.name]
        if not attempts or attempts[-1].progress.is_over:
            await self._begin(part)
            return
        last = attempts[-1]
        progress = await self._look(last)
        attempts[-1] = Attempt(part.name, last.provider, last.order, progress)
        if attempts[-1].paid:
            await self._collect(part, attempts[-1])

    async def _begin(self, part: Part) -> None:
        """Collect what is paid, or ask the next candidate, or give the part up."""
        attempts = self._attempts[part.name]
        if attempts and attempts[-1].paid:
            await self._collect(part, attempts[-1])
            return
        why = "the cluster ends" if self._failing else "no candidate is left"
        if not self._failing and len(attempts) < len(part.candidates):
            try:
                attempts.append(self._order(part, len(attempts)))
                return
            except TesseraError as error:
                why = error.message
        self._states[part.name] = "failed"
        log.warning("part_failed", part=part.name, reason=why)

    async def _look(self, attempt: Attempt) -> Progress:
        if self._failing and not attempt.progress.job:
            return await self._hires.take_back(attempt.order)
        try:
            return await self._hires.advance(attempt.order)
        except (Unavailable, Late):
            raise
        except TesseraError as error:  # the mandate says no, for one: nothing was signed
            log.warning("order_refused", part=attempt.part, code=error.code, reason=error.message)
            return await self._hires.take_back(attempt.order)

    async def _collect(self, part: Part, attempt: Attempt) -> None:
        try:
            self.works[part.name] = await self._hires.collect(attempt.order)
        except TesseraError as error:
            if isinstance(error, (Unavailable, Late)) and self._clock.time() < self.plan.deadline:
                raise
            self._states[part.name] = "failed"  # a silent evaluator had it paid, and it was not handed over
            log.warning("work_not_collected", part=part.name, code=error.code)
            return
        self._states[part.name] = "done"
        log.info("part_done", part=part.name, job=attempt.progress.job, bytes=len(self.works[part.name]))

    def _order(self, part: Part, number: int) -> Attempt:
        """The next candidate's. Raises: Refused without budget; Late without time."""
        intent = intent_id("cluster", self.plan.name, part.name, number)
        asked = self._hires.asked(intent)
        now = int(self._clock.time())
        deadline = asked.deadline if asked is not None else min(now + part.within_s * 2**number, self.plan.deadline)
        if asked is None:
            bound = sum(attempt.bound for attempt in self.report.attempts)
            waiting = sum(other.price for other in self.plan.parts if self._states[other.name] == "waiting")
            if bound + part.price + waiting > self.plan.budget.units:
                raise Refused(f"{part.name}: {bound} units are bound, {waiting} are for what waits", rule="budget")
            if deadline <= now:
                raise Refused(f"{part.name}: the cluster's deadline is over", rule="deadline")
        provider = part.candidates[number] if asked is None else asked.provider
        price = Amount(part.price, self.plan.budget.asset)
        order = Order(
            intent, self.plan.mandate, provider, part.evaluator, price, deadline, part.title, self._brief(part),
            purpose=self.plan.purpose,
        )  # fmt: skip
        return Attempt(part.name, provider, order, Progress(Phase.REQUEST))

    def _brief(self, part: Part) -> Brief:
        inputs = dict(part.inputs)
        for name in part.after:
            inputs[name] = text_of(name, self.works[name])
        return Brief(part.kind, part.text, inputs)


def text_of(name: str, work: bytes) -> str:
    """Work as an input of other work. Raises: Invalid for what is no short text."""
    try:
        text = work.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"the work of {name} is no text: it cannot go into a brief") from error
    if len(work) > INPUT_LIMIT:
        raise Invalid(f"the work of {name} has {len(work)} bytes, at most {INPUT_LIMIT} go into a brief")
    return text
