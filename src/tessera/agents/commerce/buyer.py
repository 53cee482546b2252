"""The client's side of a job: ask, agree, fund once, and know what became of the money.

    request ─▶ accepted ─▶ reserve ─▶ job on the chain ─▶ write that we sign ─▶ fund ─▶ consume ─▶ paid or refunded

`advance` takes one look and does what can be done now; it may be called at any time, by any process that has the key,
the ledger and the desk, also after a crash at any step. Invariants: money leaves only for an intent that the mandate
allowed and the ledger holds, to the escrow and nobody else; one intent is one job (see `jobs`), funded by a signature
that fits no other; nothing is funded that the provider has not accepted by signature; an intent is given up only when
its job was taken back or cannot be funded any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import anyio.to_thread

from tessera.agents.approvals import Approval
from tessera.agents.commerce.desk import Deal, Desk
from tessera.agents.commerce.jobs import Jobs, Outcome
from tessera.agents.commerce.messages import Message, Post, write_message
from tessera.agents.commerce.terms import Brief, Phase, Terms, phase_of
from tessera.agents.intents import Intent, job_resource
from tessera.agents.ledger import Entry, IntentLedger, Signing
from tessera.agents.mandates import FULL_BPS
from tessera.chain.jobs import PAY
from tessera.core.amount import Amount
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.incentives.escrow_twin import JobStatus

__all__ = ["Buyer", "Order", "Progress"]

T = TypeVar("T")
COUNTERS = 3  # prices that a provider may name for one order


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted.

    Args:
        intent: its name; the same name is the same job for ever.
        price: what is offered first; up to `most` is agreed to without asking again.
        deadline: until when the work must be submitted, in seconds since 1970.
    """

    intent: str
    mandate: str
    provider: Account
    evaluator: Account
    price: Amount
    deadline: int
    title: str
    brief: Brief
    most: Amount | None = None
    on_silence: int = PAY
    bond: int = 0
    purpose: str = ""

    def terms(self, client: Account) -> Terms:
        return Terms(
            client=client, provider=self.provider, evaluator=self.evaluator, price=self.price, deadline=self.deadline,
            title=self.title, brief=self.brief.hash, intent=self.intent, on_silence=self.on_silence, bond=self.bond,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an order stands. `outcome` is set once the money is where it stays; `note` says why it ended early."""

    phase: Phase
    job: int = 0
    outcome: Outcome | None = None
    note: str = ""
    transactions: tuple[str, ...] = field(default=())

    @property
    def is_over(self) -> bool:
        return self.phase >= Phase.COMPLETED


class Buyer:
    """An agent that hires.

    Args:
        key: the purse's, whose account is the mandates' agent and the jobs' client.
    """

    def __init__(
        self, key: AccountKey, jobs: Jobs, ledger: IntentLedger, desk: Desk, post: Post, *, clock: Clock | None = None
    ) -> None:
        self.account, self._key = key.account, key
        self._jobs, self._ledger, self._desk, self._post = jobs, ledger, desk, post
        self._clock = clock or SystemClock()

    async def advance(self, order: Order, approval: Approval | None = None) -> Progress:
        """One look, and all that can be done now.

        Raises: Refused with the mandate's limit as its rule, before anything was signed; Unavailable or Late when the
            chain cannot be asked: look again.
        """
        self._read_answers()
        deal = self._current(order)
        if deal is None:
            deal = self._ask(order.terms(self.account), order)
        await self._desk.flush(self._post)
        deal = self._current(order) or deal
        job = await self._jobs.find(self.account, order.intent)
        if job is not None:
            return await self._follow(order, deal, job.id, job.terms)
        entry = await _thread(lambda: self._ledger.find(order.intent))
        if entry is not None and entry.is_over:
            return Progress(Phase.EXPIRED, note=entry.note)
        if deal.answer == "decline":
            return await self._end(entry, Progress(Phase.REJECTED, note="the provider declined"))
        if self._clock.time() >= order.deadline:
            return await self._end(entry, Progress(Phase.EXPIRED, note="no agreement in time"))
        if deal.answer != "accept":
            return Progress(phase_of(None, bool(deal.answer)))
        await self._reserve(deal.terms, order, approval)
        await self._jobs.create(self._key, deal.terms)
        job = await self._jobs.find(self.account, order.intent)  # the first one, if another process made one too
        return Progress(Phase.NEGOTIATION) if job is None else await self._follow(order, deal, job.id, job.terms)

    def asked(self, intent: str) -> Terms | None:
        """The first terms that were asked for an intent: after a restart an order is made as it was."""
        deal = self._desk.asked(intent)
        return None if deal is None else deal.terms

    async def take_back(self, order: Order) -> Progress:
        """Give up what is not funded yet. What is funded goes its way."""
        job = await self._jobs.find(self.account, order.intent)
        if job is not None and (await self._jobs.job(job.id)).status == JobStatus.OPEN:
            await self._jobs.escrow.reject(self._key, job.id, b"\0" * 32)
        if job is None:
            entry = await _thread(lambda: self._ledger.find(order.intent))
            deal = self._current(order)
            if deal is not None:
                self._desk.note(deal, answer="decline", over=True)
            return await self._end(entry, Progress(Phase.REJECTED, note="taken back"))
        return await self.advance(order)

    async def collect(self, order: Order) -> bytes:
        """The work of a completed job, from its provider; it is what was paid for, or Misbehaviour.

        Raises: Conflict while the job is not completed; the provider's refusal; Unavailable.
        """
        found = await self._jobs.find(self.account, order.intent)
        if found is None:
            raise Conflict("there is no such job yet")
        job = await self._jobs.job(found.id)
        request = write_message(self._key, job.provider, "fetch", {"job": found.id}, self._clock.time())
        work = await self._post.fetch(request)
        check_work(await submitted_hash(self._jobs, found.id), work)
        return work

    async def reconcile(self) -> list[Entry]:
        """Bring every open intent of a job to what the chain says, without its order. Returns: those that ended."""
        ended = []
        for entry in await _thread(lambda: self._ledger.entries(open_only=True)):
            mandate = self._ledger.mandate(entry.intent.mandate)
            if not entry.intent.is_job or mandate.agent != self.account:
                continue
            job = await self._jobs.find(self.account, entry.intent.id)
            now = await self._book(entry, job.id) if job is not None else entry
            if now.is_over:
                ended.append(now)
        return ended

    # --- agreeing ---------------------------------------------------------------------------------------------------

    def _current(self, order: Order) -> Deal | None:
        """The newest terms that were asked for; a counter that is within `most` makes new ones."""
        deal = self._desk.deal(order.terms(self.account).digest, "client")
        most = order.most or order.price
        for _ in range(COUNTERS):
            if deal is None or not deal.answer.startswith("counter "):
                return deal
            price = Amount(int(deal.answer.removeprefix("counter ")), order.price.asset)
            if price > most:
                return replace(deal, answer="decline")
            terms = deal.terms.at(price)
            known = self._desk.deal(terms.digest, "client")
            deal = known or self._ask(terms, order)
        return deal if deal is None or not deal.answer.startswith("counter ") else replace(deal, answer="decline")

    def _ask(self, terms: Terms, order: Order) -> Deal:
        """Ask the provider, and tell the evaluator."""
        if terms.client != self.account or terms.price.asset != self._jobs.asset:
            raise Invalid(f"the escrow takes {self._jobs.asset}, not {terms.price.asset}")
        deal = Deal(terms, order.brief, "client")
        body = {"terms": terms.to_dict(), "brief": order.brief.to_dict()}
        now, life_s = self._clock.time(), max(60, terms.deadline + self._jobs.grace_s - int(self._clock.time()))
        letters = [write_message(self._key, terms.provider, "request", body, now, life_s=min(life_s, 7 * 86_400))]
        if terms.evaluator != self.account:
            letters.append(
                write_message(self._key, terms.evaluator, "appoint", body, now, life_s=min(life_s, 7 * 86_400))
            )
        self._desk.send(*letters, deal=deal)
        return deal

    def _read_answers(self) -> None:
        """Answers of providers to what was asked of them; anything else is put aside."""
        for message in self._desk.waiting("accept", "decline", "counter"):
            deal = self._answer(message)
            if deal is not None:
                self._desk.note(deal, answer=deal.answer)
            self._desk.handled(message)

    def _answer(self, message: Message) -> Deal | None:
        try:
            body = message.value()
        except Invalid:
            return None
        deal = self._desk.deal(str(body.get("terms")), "client")
        if deal is None or deal.answer or message.sender != deal.terms.provider:
            return None  # nobody asked, or it is answered: the first word counts
        if message.kind == "counter":
            units = body.get("units")
            if type(units) is not int or not 0 < units < 2**96:
                return None
            return replace(deal, answer=f"counter {units}")
        return replace(deal, answer=message.kind) if message.kind in ("accept", "decline") else None

    # --- paying -----------------------------------------------------------------------------------------------------

    async def _reserve(self, terms: Terms, order: Order, approval: Approval | None) -> Entry:
        chain = await _thread(lambda: self._ledger.chain(order.mandate))
        if chain[0].agent != self.account:
            raise Refused(f"the mandate's agent is {chain[0].agent}, not {self.account}", rule="agent")
        resource = job_resource(terms.digest)
        intent = Intent(order.intent, order.mandate, self._jobs.address, terms.price, resource, order.purpose)
        balance = None
        if any(node.balance_bps < FULL_BPS for node in chain):
            balance = await self._jobs.balance(self.account)
        return await _thread(lambda: self._ledger.reserve(intent, balance=balance, approval=approval))

    async def _follow(self, order: Order, deal: Deal, number: int, digest: str) -> Progress:
        """A job that is on the chain."""
        named = self._desk.deal(digest, "client")
        terms = named.terms if named is not None else deal.terms
        job = await self._jobs.agreed(number, terms)
        same = terms.digest == digest and terms.at(order.price) == order.terms(self.account)
        if job is None or not same:
            raise Conflict(f"job {number} has other terms than this order: an intent is one order for ever")
        status = JobStatus(job.status)
        if status is JobStatus.OPEN:
            if self._clock.time() >= terms.deadline or deal.answer == "decline":
                await self._jobs.escrow.reject(self._key, number, b"\0" * 32)
            else:
                await self._fund(order, terms, number)
        elif status in (JobStatus.FUNDED, JobStatus.SUBMITTED):
            await self._jobs.settle(self._key, number, self._clock.time())
        entry = await _thread(lambda: self._ledger.find(order.intent))
        if entry is not None:
            await self._book(entry, number)
        status = JobStatus((await self._jobs.job(number)).status)
        outcome = await self._jobs.outcome(number)
        if outcome is not None and named is not None:
            self._desk.note(named, job=number, over=True)
        return Progress(phase_of(status, True), number, outcome)

    async def _fund(self, order: Order, terms: Terms, number: int) -> None:
        await self._reserve(terms, order, None)  # known already, unless the ledger was lost
        job = await self._jobs.job(number)
        if job.budget != terms.price.units:
            await self._jobs.escrow.setBudget(self._key, number, terms.price.units)
            job = await self._jobs.job(number)
        if job.budget != terms.price.units or (job.bond and not job.bonded):
            return  # the provider moved the price, or the evaluator's bond is not there yet: look again
        block = await self._jobs.chain.block_number()
        await _thread(lambda: self._ledger.sign(order.intent, Signing(terms.deadline, block)))
        try:
            await self._jobs.fund(self._key, number, job)
        except Conflict:
            return  # another process of ours was first: the chain says so below

    async def _book(self, entry: Entry, number: int) -> Entry:
        """The ledger as the chain has the job."""
        if entry.is_over:
            return entry
        job = await self._jobs.job(number)
        status, intent = JobStatus(job.status), entry.intent.id
        if status is JobStatus.OPEN:
            return entry
        funded = await self._jobs.funding(number)
        if funded:
            return await _thread(lambda: self._ledger.consume(intent, funded))
        if status is not JobStatus.REJECTED:
            raise Unavailable(f"job {number} is funded, and the node does not show by what")
        return await _thread(lambda: self._ledger.release(intent, "taken back", seen=entry.signing))

    async def _end(self, entry: Entry | None, progress: Progress) -> Progress:
        """No job, and there will be none: what was reserved is free again."""
        if entry is not None and not entry.is_over:
            await _thread(lambda: self._ledger.release(entry.intent.id, progress.note, seen=entry.signing))
        return progress


async def submitted_hash(jobs: Jobs, number: int) -> bytes:
    """What the provider has handed in. Raises: Conflict while it has not."""
    found = await jobs.submission(number)
    if found is None:
        raise Conflict(f"job {number} has no work yet")
    return found


def check_work(submitted: bytes, work: bytes) -> None:
    """Raises: Misbehaviour when the work is not what was submitted."""
    if sha256(work) != submitted:
        raise Misbehaviour("the provider hands over other work than it has submitted", evidence=submitted.hex())


async def _thread(work: Callable[[], T]) -> T:
    """In a thread: neither a far server nor a slow disk holds up the event loop."""
    return await anyio.to_thread.run_sync(work)
