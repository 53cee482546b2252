"""What the index tells of jobs is what the escrow says, and each figure's transaction proves it."""

from __future__ import annotations

import pytest

from escrow_world import CLIENT, DEADLINE, EVALUATOR, GRACE, NOW, PROVIDER, REASON, STRANGER, WORK, Escrow, local_escrow
from tessera.chain.face import decode_events
from tessera.chain.faces import JobEscrow
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.job_escrow import JOB_ESCROW, Job, JobView
from tessera.incentives.escrow_twin import JobStatus

pytestmark = pytest.mark.anyio


async def every_ending(world: Escrow) -> dict[str, int]:
    """A job for each way in which one can go, by name."""
    escrow = world.escrow
    jobs = {
        "open": await world.open(0, provider=None),
        "named later": await world.open(0, provider=None),
        "withdrawn": await world.open(),
        "funded": await world.funded(300),
        "completed": await world.submitted(1_000, bond=50),
        "rejected": await world.submitted(700),
        "silent": await world.submitted(1_001, bond=11, on_silence=5_000),
    }
    await escrow.setProvider(CLIENT, jobs["named later"], PROVIDER.account)
    await escrow.reject(CLIENT, jobs["withdrawn"], REASON)
    await escrow.complete(EVALUATOR, jobs["completed"], REASON)
    await escrow.reject(EVALUATOR, jobs["rejected"], REASON)
    await world.later(DEADLINE + GRACE - NOW)
    await escrow.claimRefund(STRANGER, jobs["silent"])
    return jobs


async def told_of(world: Escrow) -> tuple[Indexer, JobView]:
    index = Indexer(None, world.chain, [JOB_ESCROW.at(world.escrow.address)])
    await index.update()
    return index, JobView(index.queries)


@pytest.mark.slow
async def test_every_job_is_told_as_the_contract_has_it() -> None:
    world = await local_escrow()
    jobs = await every_ending(world)
    index, view = await told_of(world)
    for number in jobs.values():
        job, stored = view.job(number), await world.escrow.jobs(number)
        assert job is not None
        assert (job.client, job.evaluator, job.status, job.budget) == (
            stored.client,
            stored.evaluator,
            stored.status,
            stored.budget,
        )
        assert (job.bond, job.on_silence, job.expires_at) == (stored.bond, stored.on_silence, stored.expiredAt)
        assert int(job.provider or "0", 16) == int(stored.provider, 16)
        assert job.description == "Label 20 pictures"
        assert (job.deliverable != "") == ("submitted" in job.proofs)
    assert view.job(99) is None
    index.close()


async def test_money_of_jobs_goes_where_the_escrow_sent_it() -> None:
    world = await local_escrow()
    jobs = await every_ending(world)
    index, view = await told_of(world)

    def told(name: str) -> Job:
        job = view.job(jobs[name])
        assert job is not None
        return job

    assert [(told(n).paid, told(n).refunded, told(n).slashed) for n in ("completed", "rejected", "silent")] == [
        (1_000, 0, 0),
        (0, 700, 0),
        (500, 501, 11),
    ]
    funded, refunded = view.spent(CLIENT.account)
    assert (funded.amount, refunded.amount) == (300 + 1_000 + 700 + 1_001, 700 + 501)
    assert (view.earned(PROVIDER.account).amount, view.earned(PROVIDER.account).count) == (1_500, 2)
    assert told("completed").deliverable == "0x" + WORK.hex()
    receipt = await world.chain.receipt(told("completed").proofs["paid"])
    assert receipt is not None
    (paid,) = decode_events(JobEscrow.PaymentReleased, world.escrow.address, receipt)
    assert (paid.jobId, paid.amount) == (jobs["completed"], 1_000)
    assert view.owed(PROVIDER.account).amount == 0
    index.close()


async def test_jobs_are_found_by_party_and_status() -> None:
    world = await local_escrow()
    jobs = await every_ending(world)
    index, view = await told_of(world)
    everything = view.jobs(client=CLIENT.account)
    assert [job.id for job in everything] == sorted(jobs.values(), reverse=True)
    assert [job.id for job in view.jobs(limit=2)] == [job.id for job in everything[:2]]
    assert view.jobs(client=STRANGER.account) == []
    assert {job.id for job in view.jobs(provider=PROVIDER.account)} == set(jobs.values()) - {jobs["open"]}
    by_status = {
        status: [job.id for job in view.jobs(evaluator=EVALUATOR.account, status=status)] for status in JobStatus
    }
    assert by_status == {
        JobStatus.OPEN: [jobs["named later"], jobs["open"]],
        JobStatus.FUNDED: [jobs["funded"]],
        JobStatus.SUBMITTED: [],
        JobStatus.COMPLETED: [jobs["completed"]],
        JobStatus.REJECTED: [jobs["rejected"], jobs["withdrawn"]],
        JobStatus.EXPIRED: [jobs["silent"]],
    }
    index.close()
