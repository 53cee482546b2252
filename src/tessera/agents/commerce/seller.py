"""The provider's side: answer what is asked, do what is funded, hand the work to whom it is due.

Invariants: nothing is worked on before its job is funded on the chain under the very terms that were accepted; work is
kept on disk before its hash is submitted, so that a crash loses neither; the evaluator may look at submitted work, and
the client gets it when it is paid for and not before. A brief is read by the worker and by nothing else: it changes no
price, no party and no permission.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from tessera.agents.commerce.buyer import submitted_hash
from tessera.agents.commerce.desk import Deal, Desk
from tessera.agents.commerce.jobs import Jobs
from tessera.agents.commerce.messages import Message, Post, write_message
from tessera.agents.commerce.terms import Brief, Terms
from tessera.chain.jobs import PAY
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, Late, Missing, Refused, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.incentives.escrow_twin import ENDED, JobStatus

__all__ = ["Seller", "Service", "Shelf", "Worker"]

log = structlog.get_logger()
Worker = Callable[[Brief], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Service:
    """One kind of work, and on which terms it is taken.

    Args:
        units: the least price.
        worker: does it; raises Invalid or Refused when it cannot be done, and then the client gets the money back.
        notice_s: the least time until the deadline.
        on_silence: the least part, in 1/10,000, that a silent evaluator must leave us.
    """

    units: int
    worker: Worker
    notice_s: int = 5
    on_silence: int = PAY


class Shelf:
    """Finished work in a directory, by its hash."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, job: int, work: bytes) -> bytes:
        """Keep it for a job, whole or not at all. Returns: its hash. What is there for the job stays."""
        file = self._file(job)
        if not file.exists():
            part = file.with_suffix(".part")
            part.write_bytes(work)
            part.replace(file)
        return sha256(file.read_bytes())

    def get(self, job: int) -> bytes | None:
        file = self._file(job)
        return file.read_bytes() if file.exists() else None

    def _file(self, job: int) -> Path:
        return self._directory / f"job-{job:d}.work"


class Seller:
    """An agent that is hired.

    Args:
        services: by kind of brief.
        evaluators: whose judgement it accepts; None is anybody's but the client's own.
    """

    def __init__(
        self,
        key: AccountKey,
        jobs: Jobs,
        desk: Desk,
        post: Post,
        shelf: Shelf,
        services: Mapping[str, Service],
        *,
        evaluators: frozenset[Account] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.account, self._key = key.account, key
        self._jobs, self._desk, self._post, self._shelf = jobs, desk, post, shelf
        self._services, self._evaluators = dict(services), evaluators
        self._clock = clock or SystemClock()

    async def step(self) -> None:
        """Answer what came, do what is funded. To be called again and again; raises nothing that a later call mends."""
        for message in self._desk.waiting("request"):
            self._reply(message)
        await self._desk.flush(self._post)
        for deal in self._desk.deals("provider"):
            try:
                await self._serve(deal)
            except TesseraError as error:
                log.info("job_not_served", job=deal.job, code=error.code, reason=error.message)

    async def hand_over(self, message: Message) -> bytes:
        """What a `fetch` gets. Raises: Refused for whom it is not due; Missing; Invalid, Late."""
        message.verify(self.account, self._clock.time())
        number = message.value().get("job")
        if message.kind != "fetch" or type(number) is not int or not 0 < number < 2**63:
            raise Invalid("a fetch names a job by its number")
        job = await self._jobs.job(number)
        if job.provider != self.account:
            raise Refused(f"job {number} is not ours", rule="not_ours")
        await self._check_due(message.sender, number, JobStatus(job.status), job.client, job.evaluator)
        work = self._shelf.get(number)
        if work is None:
            raise Missing(f"the work of job {number} is not here")
        return work

    async def _check_due(
        self, who: Account, number: int, status: JobStatus, client: Account, evaluator: Account
    ) -> None:
        if who == evaluator and status in (JobStatus.SUBMITTED, JobStatus.COMPLETED):
            return
        if who != client:
            raise Refused(f"{who} has no part in job {number}", rule="no_part")
        outcome = await self._jobs.outcome(number)
        if outcome is None or outcome.paid == 0:
            raise Refused(f"job {number} is not paid", rule="unpaid")

    # --- answering --------------------------------------------------------------------------------------------------

    def _reply(self, message: Message) -> None:
        deal, answer, digest = None, "decline", ""
        extra: dict[str, object] = {}
        try:
            body = message.value()
            terms, brief = Terms.from_dict(body.get("terms")), Brief.from_dict(body.get("brief"))
            digest = terms.digest
            if message.sender != terms.client or terms.provider != self.account or brief.hash != terms.brief:
                raise Invalid("these terms are between others, or about another brief")
            answer, extra = self._judge(terms, brief)
            if answer == "accept":
                deal = Deal(terms, brief, "provider", answer)
        except TesseraError as error:
            extra = {"reason": error.message[:200]}
        reply = {"terms": digest, **extra}
        kind = "accept" if answer == "accept" else "counter" if answer == "counter" else "decline"
        letter = write_message(self._key, message.sender, kind, reply, self._clock.time())  # type: ignore[arg-type]
        self._desk.handled(message, answers=[letter], deal=deal)

    def _judge(self, terms: Terms, brief: Brief) -> tuple[str, dict[str, object]]:
        """Raises: Refused for terms that are never accepted."""
        service = self._services.get(brief.kind)
        if service is None:
            raise Refused(f"no such service: {brief.kind[:40]!r}", rule="service")
        trusted = terms.evaluator != terms.client if self._evaluators is None else terms.evaluator in self._evaluators
        if not trusted:
            raise Refused("we do not trust this evaluator", rule="evaluator")
        if terms.on_silence < service.on_silence:
            raise Refused("silence would leave us unpaid", rule="on_silence")
        if terms.price.asset != self._jobs.asset:
            raise Refused("another asset", rule="asset")
        if self._clock.time() + service.notice_s > terms.deadline:
            raise Late("too little time for this work")
        if terms.price.units < service.units:
            return "counter", {"units": service.units}
        return "accept", {}

    # --- working ----------------------------------------------------------------------------------------------------

    async def _serve(self, deal: Deal) -> None:
        number = deal.job or await self._jobs.of(deal.terms)
        if not number:
            if self._clock.time() >= deal.terms.deadline:
                self._desk.note(deal, over=True)
            return
        job = await self._jobs.agreed(number, deal.terms)
        if job is None:
            self._desk.note(deal, over=True)
            raise Refused(f"job {number} is not what was agreed", rule="changed_terms")
        if not deal.job:
            self._desk.note(deal, job=number)
        status, now = JobStatus(job.status), self._clock.time()
        if status in ENDED:
            self._desk.note(deal, over=True)
        elif status is JobStatus.FUNDED and now < deal.terms.deadline:
            await self._work(number, deal)
        elif status in (JobStatus.FUNDED, JobStatus.SUBMITTED):
            await self._jobs.settle(self._key, number, now)

    async def _work(self, number: int, deal: Deal) -> None:
        work = self._shelf.get(number)
        if work is None:
            try:
                work = await self._services[deal.brief.kind].worker(deal.brief)
            except (Invalid, Refused) as error:  # it cannot be done: let the client have the money back at once
                letter = write_message(self._key, deal.terms.evaluator, "resign", {"job": number}, self._clock.time())
                self._desk.send(letter)
                self._desk.note(deal, over=True)
                await self._desk.flush(self._post)
                log.warning("job_resigned", job=number, reason=error.message)
                return
        hash = self._shelf.put(number, work)
        try:
            await self._jobs.escrow.submit(self._key, number, hash)
        except Conflict:
            if await submitted_hash(self._jobs, number) != hash:
                raise
