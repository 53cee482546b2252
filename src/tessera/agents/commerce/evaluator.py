"""The evaluator's side: look at submitted work, and say whether it is paid for.

He judges what he was appointed for: terms whose digest the job names, with their brief. Work that is not what was
submitted, or that the provider does not hand over until the deadline, is rejected. An evaluator who cannot tell says
nothing, and the job ends by its terms. Invariants: he judges each job once, by one function of brief and work; no
text in either changes what that function is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import structlog

from tessera.agents.commerce.buyer import check_work, submitted_hash
from tessera.agents.commerce.desk import Deal, Desk
from tessera.agents.commerce.jobs import Jobs
from tessera.agents.commerce.messages import Message, Post, write_message
from tessera.agents.commerce.terms import Brief, Terms
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.signing import AccountKey
from tessera.incentives.escrow_twin import ENDED, JobStatus

__all__ = ["Evaluator", "Judge"]

log = structlog.get_logger()
Judge = Callable[[Brief, bytes], Awaitable[str]]  # "" accepts; anything else is the reason to refuse


class Evaluator:
    """An agent that judges.

    Args:
        judges: by kind of brief; no other kind is taken on.
        most_bond: the largest bond, in units, that it locks for one job.
    """

    def __init__(
        self,
        key: AccountKey,
        jobs: Jobs,
        desk: Desk,
        post: Post,
        judges: Mapping[str, Judge],
        *,
        most_bond: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self.account, self._key = key.account, key
        self._jobs, self._desk, self._post = jobs, desk, post
        self._judges, self._most_bond = dict(judges), most_bond
        self._clock = clock or SystemClock()

    async def step(self) -> None:
        """Take on what came, judge what is submitted. To be called again and again."""
        for message in self._desk.waiting("appoint"):
            self._desk.handled(message, deal=self._appointed(message))
        for message in self._desk.waiting("resign"):
            await self._release(message)
        for deal in self._desk.deals("evaluator"):
            try:
                await self._follow(deal)
            except TesseraError as error:
                log.info("job_not_judged", job=deal.job, code=error.code, reason=error.message)

    def _appointed(self, message: Message) -> Deal | None:
        """The deal, when it is one that he may judge."""
        try:
            body = message.value()
            terms, brief = Terms.from_dict(body.get("terms")), Brief.from_dict(body.get("brief"))
        except Invalid as error:
            log.info("appointment_refused", sender=message.sender, reason=error.message)
            return None
        fits = terms.evaluator == self.account and message.sender == terms.client and brief.hash == terms.brief
        return Deal(terms, brief, "evaluator") if fits and brief.kind in self._judges else None

    async def _release(self, message: Message) -> None:
        """A provider gives up: the client has the money back now, and not at the deadline. Only the provider may."""
        try:
            number = message.value().get("job")
            if type(number) is int and 0 < number < 2**63:
                job = await self._jobs.job(number)
                ours = job.evaluator == self.account and job.provider == message.sender
                if ours and JobStatus(job.status) in (JobStatus.FUNDED, JobStatus.SUBMITTED):
                    await self._jobs.escrow.reject(self._key, number, sha256(b"resigned"))
        except (Unavailable, Late):
            return  # the chain is away: the message waits
        except TesseraError as error:
            log.info("resignation_refused", sender=message.sender, reason=error.message)
        self._desk.handled(message)

    async def _follow(self, deal: Deal) -> None:
        number, now = deal.job or await self._jobs.of(deal.terms), self._clock.time()
        if not number:
            if now >= deal.terms.deadline:
                self._desk.note(deal, over=True)
            return
        job = await self._jobs.agreed(number, deal.terms)
        if job is None or JobStatus(job.status) in ENDED:
            self._desk.note(deal, over=True)
            return
        if not deal.job:
            self._desk.note(deal, job=number)
        if job.status == JobStatus.OPEN and job.bond and not job.bonded:
            await self._lock(number, job.bond)
        elif job.status == JobStatus.SUBMITTED and now < deal.terms.deadline + self._jobs.grace_s:
            await self._judge(number, deal)
        else:
            await self._jobs.settle(self._key, number, now)

    async def _lock(self, number: int, bond: int) -> None:
        if bond > self._most_bond:
            raise Refused(f"a bond of {bond} units, at most {self._most_bond}", rule="bond")
        await self._jobs.coin.approve(self._key, self._jobs.address, bond)
        await self._jobs.escrow.postBond(self._key, number)

    async def _judge(self, number: int, deal: Deal) -> None:
        reason = await self._reason(number, deal)
        if reason is None:
            return
        word = sha256((reason or "accepted").encode())
        act = self._jobs.escrow.reject if reason else self._jobs.escrow.complete
        try:
            await act(self._key, number, word)
        except Conflict:  # judged already, before a crash
            log.info("job_ended_already", job=number)
        log.info("job_judged", job=number, accepted=not reason, reason=reason)

    async def _reason(self, number: int, deal: Deal) -> str | None:
        """Why not; "" accepts, None is too early to say."""
        request = write_message(self._key, deal.terms.provider, "fetch", {"job": number}, self._clock.time())
        try:
            work = await self._post.fetch(request)
            check_work(await submitted_hash(self._jobs, number), work)
        except (Unavailable, Late, Missing) as error:
            late = self._clock.time() >= deal.terms.deadline
            return f"not handed over: {error.code}" if late else None
        except (Misbehaviour, Refused, Invalid) as error:
            return f"not what was submitted: {error.code}"
        return await self._judges[deal.brief.kind](deal.brief, work)
