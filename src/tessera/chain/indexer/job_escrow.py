"""What an escrow says (contracts/job_escrow.vy): jobs, who takes part in them, and where their money went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tessera.chain.faces import JobEscrow
from tessera.chain.indexer.facts import Fact, Reducer, Said, Value, item_id
from tessera.chain.indexer.queries import Figure, Queries
from tessera.core.ids import Account
from tessera.incentives.escrow_twin import JobStatus

__all__ = ["JOB_ESCROW", "Job", "JobView"]

_NOBODY = "0x" + "00" * 20
PAGE = 200  # jobs folded at once, where a status is looked for
_STATUS = {
    "created": JobStatus.OPEN,
    "funded": JobStatus.FUNDED,
    "submitted": JobStatus.SUBMITTED,
    "completed": JobStatus.COMPLETED,
    "rejected": JobStatus.REJECTED,
    "expired": JobStatus.EXPIRED,
}


def _created(event: JobEscrow.JobCreated) -> Iterator[Said]:
    item, detail = item_id(event.jobId), {"expires_at": event.expiredAt}
    yield Said("created", account=event.client, item=item, detail=detail)
    yield Said("appointed", account=event.evaluator, item=item)
    if event.provider != _NOBODY:
        yield Said("assigned", account=event.provider, item=item)


def _terms(event: JobEscrow.JobTerms) -> Iterator[Said]:
    detail: dict[str, Value] = {
        "description": event.description,
        "hook": event.hook,
        "on_silence": event.on_silence,
        "bond": event.bond,
    }
    yield Said("terms", item=item_id(event.jobId), detail=detail)


def _assigned(event: JobEscrow.ProviderSet) -> Iterator[Said]:
    yield Said("assigned", account=event.provider, item=item_id(event.jobId))


def _priced(event: JobEscrow.BudgetSet) -> Iterator[Said]:
    yield Said("priced", item=item_id(event.jobId), detail={"budget": event.amount})  # proposals do not add up


def _bonded(event: JobEscrow.BondPosted) -> Iterator[Said]:
    yield Said("bonded", account=event.evaluator, item=item_id(event.jobId), amount=event.amount)


def _returned(event: JobEscrow.BondReturned) -> Iterator[Said]:
    yield Said("bond_returned", account=event.evaluator, item=item_id(event.jobId), amount=event.amount)


def _slashed(event: JobEscrow.EvaluatorSlashed) -> Iterator[Said]:
    detail: dict[str, Value] = {"to_client": event.to_client, "to_provider": event.to_provider}
    amount = event.to_client + event.to_provider
    yield Said("slashed", account=event.evaluator, item=item_id(event.jobId), amount=amount, detail=detail)


def _funded(event: JobEscrow.JobFunded) -> Iterator[Said]:
    yield Said("funded", account=event.client, item=item_id(event.jobId), amount=event.amount)


def _submitted(event: JobEscrow.JobSubmitted) -> Iterator[Said]:
    detail = {"deliverable": item_id(event.deliverable)}
    yield Said("submitted", account=event.provider, item=item_id(event.jobId), detail=detail)


def _completed(event: JobEscrow.JobCompleted) -> Iterator[Said]:
    detail = {"reason": item_id(event.reason)}
    yield Said("completed", account=event.evaluator, item=item_id(event.jobId), detail=detail)


def _rejected(event: JobEscrow.JobRejected) -> Iterator[Said]:
    detail = {"reason": item_id(event.reason)}
    yield Said("rejected", account=event.rejector, item=item_id(event.jobId), detail=detail)


def _expired(event: JobEscrow.JobExpired) -> Iterator[Said]:
    yield Said("expired", item=item_id(event.jobId))


def _paid(event: JobEscrow.PaymentReleased) -> Iterator[Said]:
    yield Said("paid", account=event.provider, item=item_id(event.jobId), amount=event.amount)


def _refunded(event: JobEscrow.Refunded) -> Iterator[Said]:
    yield Said("refunded", account=event.client, item=item_id(event.jobId), amount=event.amount)


def _hook_failed(event: JobEscrow.HookFailed) -> Iterator[Said]:
    yield Said("hook_failed", item=item_id(event.jobId), detail={"selector": item_id(event.selector)})


def _owed(event: JobEscrow.PaymentFailed) -> Iterator[Said]:
    yield Said("owed", account=event.payee, amount=event.amount)


def _withdrawn(event: JobEscrow.Withdrawn) -> Iterator[Said]:
    yield Said("withdrawn", account=event.payee, amount=event.amount)


JOB_ESCROW = Reducer(
    "job_escrow",
    says={
        JobEscrow.JobCreated: _created,
        JobEscrow.JobTerms: _terms,
        JobEscrow.ProviderSet: _assigned,
        JobEscrow.BudgetSet: _priced,
        JobEscrow.BondPosted: _bonded,
        JobEscrow.BondReturned: _returned,
        JobEscrow.EvaluatorSlashed: _slashed,
        JobEscrow.JobFunded: _funded,
        JobEscrow.JobSubmitted: _submitted,
        JobEscrow.JobCompleted: _completed,
        JobEscrow.JobRejected: _rejected,
        JobEscrow.JobExpired: _expired,
        JobEscrow.PaymentReleased: _paid,
        JobEscrow.Refunded: _refunded,
        JobEscrow.HookFailed: _hook_failed,
        JobEscrow.PaymentFailed: _owed,
        JobEscrow.Withdrawn: _withdrawn,
    },
)


@dataclass(frozen=True, slots=True)
class Job:
    """One job as its events tell it; money in the smallest unit of the escrow's asset."""

    id: int
    client: Account
    provider: Account | None  # None until the client names one
    evaluator: Account
    status: JobStatus
    budget: int  # as proposed last
    paid: int  # to the provider, of the budget
    refunded: int  # to the client, of the budget
    bond: int
    slashed: int  # of the bond
    on_silence: int  # the provider's part, in 1/10,000
    expires_at: int  # seconds since 1970
    description: str
    deliverable: str  # 0x and 64 hex digits; empty before it is submitted
    proofs: Mapping[str, str]  # what happened ("funded", "paid", ...) -> its newest transaction


class JobView:
    """The jobs of one escrow."""

    def __init__(self, queries: Queries, source: str = "job_escrow") -> None:
        self._queries, self._source = queries, source

    def job(self, number: int) -> Job | None:
        history = self._queries.histories(self._source, [str(number)])[str(number)]
        return _job(history) if history else None

    def jobs(
        self,
        *,
        client: Account | None = None,
        provider: Account | None = None,
        evaluator: Account | None = None,
        status: JobStatus | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Those in which all of these take part, the newest first.

        Cost: by a status it looks at the jobs of these parties one by one, the newest first, until it has enough.
        """
        parties = {"created": client, "assigned": provider, "appointed": evaluator}
        kind = next((kind for kind, account in parties.items() if account), "created")
        found: list[Job] = []
        last: Fact | None = None
        while len(found) < limit:
            facts = self._queries.facts(self._source, kind, parties[kind] or "", limit=PAGE, before=last)
            if not facts:
                break
            last = facts[-1]
            histories = self._queries.histories(self._source, [fact.item for fact in facts])
            jobs = [_job(histories[fact.item]) for fact in facts if histories[fact.item]]
            found += [job for job in jobs if _fits(job, client, provider, evaluator, status)]
        return found[:limit]

    def earned(self, provider: Account) -> Figure:
        """What jobs have paid a provider; `count` is the number of payments."""
        return self._queries.figure(self._source, "paid", account=provider)

    def spent(self, client: Account) -> tuple[Figure, Figure]:
        """What a client has put into jobs, and what came back."""
        funded = self._queries.figure(self._source, "funded", account=client)
        return funded, self._queries.figure(self._source, "refunded", account=client)

    def owed(self, payee: Account) -> Figure:
        """What could not be paid to somebody, and waits for `withdraw`."""
        owed = self._queries.figure(self._source, "owed", account=payee)
        return owed.plus(self._queries.figure(self._source, "withdrawn", account=payee), -1)


def _fits(
    job: Job, client: Account | None, provider: Account | None, evaluator: Account | None, status: JobStatus | None
) -> bool:
    wanted = ((client, job.client), (provider, job.provider), (evaluator, job.evaluator), (status, job.status))
    return all(want is None or want == has for want, has in wanted)


def _job(history: Sequence[Fact]) -> Job:
    """A job is what the newest of its facts say."""
    newest = {fact.kind: fact for fact in history}
    created, terms = newest["created"], newest["terms"].detail
    assigned, priced, submitted = newest.get("assigned"), newest.get("priced"), newest.get("submitted")

    def total(kind: str) -> int:
        return sum(fact.amount for fact in history if fact.kind == kind)

    return Job(
        id=int(created.item),
        client=Account(created.account),
        provider=Account(assigned.account) if assigned else None,
        evaluator=Account(newest["appointed"].account),
        status=max(_STATUS[kind] for kind in newest if kind in _STATUS),
        budget=priced.detail["budget"] if priced else 0,
        paid=total("paid"),
        refunded=total("refunded"),
        bond=terms["bond"],
        slashed=total("slashed"),
        on_silence=terms["on_silence"],
        expires_at=created.detail["expires_at"],
        description=terms["description"],
        deliverable=submitted.detail["deliverable"] if submitted else "",
        proofs={kind: fact.tx_hash for kind, fact in newest.items()},
    )
