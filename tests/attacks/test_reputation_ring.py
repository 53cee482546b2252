"""A self-feedback ring: an agent's owner praises himself, by his own accounts or by accounts that he has made up.

Known from every open rating. By his own accounts it fails. By made-up ones it costs a paid and completed job for each
word, and changes nothing for a reader, who counts only clients whom he knows.
"""

from __future__ import annotations

import pytest

from agent_world import AGENT, Agents, agents
from chain_support import NOW, WORKERS, key
from escrow_world import CLIENT, EVALUATOR, PROVIDER, REASON
from tessera.chain.agents import job_proof
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
SECOND = WORKERS[3]
PUPPETS = [key(f"puppet {number}") for number in range(3)]


@pytest.fixture
async def world() -> Agents:
    return await agents()


async def ready(world: Agents, who: AccountKey) -> None:
    await world.jobs.coin.mint(who, who.account, 10_000)
    await world.jobs.coin.approve(who, world.jobs.escrow.address, 10_000)


async def test_an_owner_cannot_be_the_client_of_his_own_job(world: Agents) -> None:
    with pytest.raises(Invalid, match="bad provider"):
        await world.jobs.open(10, client=PROVIDER)


async def test_an_owner_operator_or_wallet_cannot_praise_the_agent(world: Agents) -> None:
    """Even with a completed job: the wallet has done it, the owner has paid."""
    await ready(world, SECOND)
    job = await world.done(client=SECOND)
    for deed in ("operator", "approved", "owner"):
        if deed == "operator":
            await world.identity.setApprovalForAll(PROVIDER, SECOND.account, True)
        if deed == "approved":
            await world.identity.setApprovalForAll(PROVIDER, SECOND.account, False)
            await world.identity.approve(PROVIDER, SECOND.account, AGENT)
        if deed == "owner":
            await world.identity.transferFrom(PROVIDER, PROVIDER.account, SECOND.account, AGENT)
        with pytest.raises(Refused, match="self-feedback"):
            await world.rate(100, job, client=SECOND)


async def test_who_was_the_wallet_once_cannot_praise_the_agent(world: Agents) -> None:
    await ready(world, SECOND)
    job = await world.done(client=SECOND)
    digest = await world.identity.wallet_digest(AGENT, SECOND.account, NOW + 60)
    await world.identity.setAgentWallet(PROVIDER, AGENT, SECOND.account, NOW + 60, SECOND.sign_digest(digest))
    await world.identity.unsetAgentWallet(PROVIDER, AGENT)
    with pytest.raises(Refused, match="self-feedback"):
        await world.rate(100, job, client=SECOND)


async def test_puppets_are_worthless_to_a_reader_who_does_not_know_them(world: Agents) -> None:
    """Owner, evaluator and puppets are one person: the money goes round, the words do not count."""
    await world.rate(20, await world.done())
    before = await world.reputation.getSummary(AGENT, [CLIENT.account], "", "")
    for puppet in PUPPETS:
        await ready(world, puppet)
        await world.rate(100, await world.done(client=puppet), client=puppet)
    assert await world.reputation.getSummary(AGENT, [CLIENT.account], "", "") == before == (1, 20, 0)
    with pytest.raises(Invalid, match="clients required"):
        await world.reputation.getSummary(AGENT, [], "", "")


async def test_one_job_does_not_feed_a_whole_ring(world: Agents) -> None:
    """Neither more words, nor other mouths, nor another agent of the ring."""
    job = await world.done()
    await world.rate(100, job)
    await world.identity.register(PROVIDER, "ipfs://second")
    with pytest.raises(Conflict, match="job has voted"):
        await world.rate(100, job, agent=1)
    for puppet in PUPPETS:
        with pytest.raises(Refused, match="not the job's client"):
            await world.rate(100, job, client=puppet)


async def test_a_payment_that_is_no_job_is_no_proof(world: Agents) -> None:
    """Anybody sends coins in a circle for nothing; a contract cannot even read that he did."""
    await ready(world, PUPPETS[0])
    receipt = await world.jobs.coin.transfer(PUPPETS[0], PROVIDER.account, 5_000)
    for endpoint in (receipt.tx_hash, job_proof(1)[:4] + receipt.tx_hash):
        with pytest.raises(Invalid, match="no job in endpoint"):
            await world.reputation.giveFeedback(PUPPETS[0], AGENT, 100, 0, "", "", endpoint, "", bytes(32))


async def test_a_silent_evaluator_makes_no_proof(world: Agents) -> None:
    """A ring saves itself the evaluator: the job is paid by silence, but nobody has completed it."""
    job = await world.jobs.submitted(10, on_silence=10_000)
    await world.jobs.later((await world.jobs.escrow.jobs(job)).expiredAt - NOW + 3_600)
    await world.jobs.escrow.claimRefund(CLIENT, job)
    with pytest.raises(Refused, match="job not completed"):
        await world.rate(100, job)
    with pytest.raises(Conflict, match="not submitted"):
        await world.jobs.escrow.complete(EVALUATOR, job, REASON)
