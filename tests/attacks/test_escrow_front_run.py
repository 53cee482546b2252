"""Front-running a signed payment: everything in the mempool is public, an EIP-3009 signature, too.

Known since the first contracts that pulled `transferWithAuthorization`: anybody executes the transfer alone, and the
contract that wanted to book it finds the nonce used. `receiveWithAuthorization` can be called by its payee only; here
its nonce says for which job, too.
"""

from __future__ import annotations

import pytest

from chain_support import CHAIN_ID, memory_chain
from escrow_world import CLIENT, FUNDED, GRACE, OPEN, PROVIDER, STRANGER, Escrow, escrow_world, local_escrow
from tessera.chain.faces import JobEscrow
from tessera.chain.jobs import funding_digest, funding_nonce
from tessera.core.errors import Conflict, Invalid, Refused, TesseraError

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world() -> Escrow:
    return await local_escrow()


async def test_nobody_takes_the_payment_from_under_the_escrow(world: Escrow) -> None:
    job = await world.open()
    after, before, *vrs = await world.authorization(job)
    nonce = funding_nonce(job, await world.escrow.jobs(job))
    terms = (CLIENT.account, world.escrow.address, 1_000, after, before, nonce)
    for attacker in (STRANGER, PROVIDER):
        with pytest.raises(Refused, match="caller must be the payee"):
            await world.coin.receiveWithAuthorization(attacker, *terms, *vrs)
        with pytest.raises(Invalid, match="invalid signature"):
            await world.coin.transferWithAuthorization(attacker, *terms, *vrs)
        with pytest.raises(Invalid, match="invalid signature"):
            await world.coin.receiveWithAuthorization(attacker, terms[0], attacker.account, *terms[2:], *vrs)
    assert await world.status(job) == OPEN


async def test_who_runs_ahead_does_the_clients_bidding(world: Escrow) -> None:
    job = await world.open()
    signed = await world.authorization(job)
    await world.escrow.fundWithAuthorization(STRANGER, job, 1_000, *signed)
    assert await world.status(job) == FUNDED
    with pytest.raises(Conflict, match="not open"):
        await world.escrow.fundWithAuthorization(CLIENT, job, 1_000, *signed)
    assert (await world.holdings())[3] == 1_000


async def test_the_signature_funds_no_other_job(world: Escrow) -> None:
    """Not even another job of the same client, with the same terms."""
    job, twin = await world.open(), await world.open()
    signed = await world.authorization(job)
    with pytest.raises(Invalid, match="invalid signature"):
        await world.escrow.fundWithAuthorization(STRANGER, twin, 1_000, *signed)


async def test_the_signature_funds_no_other_terms(world: Escrow) -> None:
    """The provider raises his price, or the client gives the job to another provider, while it is under way."""
    job = await world.open()
    signed = await world.authorization(job)
    await world.escrow.setBudget(PROVIDER, job, 2_000)
    for budget in (1_000, 2_000):
        with pytest.raises(TesseraError, match=r"another budget|invalid signature"):
            await world.escrow.fundWithAuthorization(PROVIDER, job, budget, *signed)
    await world.escrow.setBudget(PROVIDER, job, 1_000)
    await world.escrow.fundWithAuthorization(PROVIDER, job, 1_000, *signed)  # what was signed, again


async def test_a_block_that_is_undone_does_not_move_the_signature_to_another_job() -> None:
    """After a reorganisation the same number may be a job of the same client with another provider."""
    chain = memory_chain()
    world = await escrow_world(chain.client())
    snapshot = chain.snapshot()
    signed = await world.authorization(await world.open(500))
    assert chain.revert(snapshot)
    other = await world.open(500, provider=STRANGER.account)
    assert other == 1
    with pytest.raises(Invalid, match="invalid signature"):
        await world.escrow.fundWithAuthorization(STRANGER, other, 500, *signed)


async def test_the_signature_counts_on_one_chain_and_for_one_escrow(world: Escrow) -> None:
    job_id = await world.open()
    job = await world.escrow.jobs(job_id)
    second = await JobEscrow.deploy(world.chain, CLIENT, world.coin.address, GRACE)
    for chain_id, escrow in ((CHAIN_ID + 1, world.escrow.address), (CHAIN_ID, second.address)):
        digest = funding_digest(chain_id, world.coin.address, escrow, job_id, job, 0, 2**40)
        signature = CLIENT.sign_digest(digest)
        with pytest.raises(Invalid, match="invalid signature"):
            await world.escrow.fundWithAuthorization(
                STRANGER, job_id, 1_000, 0, 2**40, signature[64], signature[:32], signature[32:64]
            )


async def test_an_attackers_own_signature_does_not_fund_in_the_clients_name(world: Escrow) -> None:
    job = await world.open()
    with pytest.raises(Invalid, match="invalid signature"):
        await world.escrow.fundWithAuthorization(STRANGER, job, 1_000, *await world.authorization(job, signer=STRANGER))
