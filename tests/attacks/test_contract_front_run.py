"""Somebody sees the signature under a stake before it is in a block, and runs ahead with it.

Known from USDC: `transferWithAuthorization` may be sent by anybody, so that a contract which pulls a payment by it
finds the nonce used and the money come without its call. `receiveWithAuthorization` only its receiver can send.
"""

from __future__ import annotations

import pytest

from chain_support import TERMS, WORKERS, World, key, local_world, peer_of, sign_payment, split
from tessera.core.errors import Conflict, Invalid, Refused

pytestmark = pytest.mark.anyio
JOINER, ATTACKER = key("joiner"), key("attacker")


@pytest.fixture
async def world() -> World:
    world = await local_world()
    await world.coin.mint(JOINER, JOINER.account, TERMS.stake)
    return world


async def values_of(world: World) -> tuple[object, ...]:
    nonce = (await world.consent()).bond_nonce(JOINER.account, peer_of(JOINER))
    return JOINER.account, world.run.address, TERMS.stake, 0, 2**40, nonce


async def test_who_runs_ahead_can_only_bond_him_who_signed(world: World) -> None:
    v, r, s = split(await world.authorization(JOINER, peer_of(JOINER), TERMS.stake))
    values = await values_of(world)
    with pytest.raises(Refused, match="caller must be the payee"):
        await world.coin.receiveWithAuthorization(ATTACKER, *values, v, r, s)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="coin: invalid signature"):  # a signature to receive is none to transfer
        await world.coin.transferWithAuthorization(ATTACKER, *values, v, r, s)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="coin: invalid signature"):  # for his own account
        await world.run.bond(ATTACKER, ATTACKER.account, peer_of(JOINER), 0, 2**40, v, r, s)
    with pytest.raises(Invalid, match="coin: invalid signature"):  # under a peer of his own
        await world.run.bond(ATTACKER, JOINER.account, peer_of(ATTACKER), 0, 2**40, v, r, s)
    with pytest.raises(Invalid, match="coin: invalid signature"):  # for longer than was signed
        await world.run.bond(ATTACKER, JOINER.account, peer_of(JOINER), 0, 2**41, v, r, s)
    await world.run.bond(ATTACKER, JOINER.account, peer_of(JOINER), 0, 2**40, v, r, s)  # runs ahead: he paid the gas
    member = await world.run.members(JOINER.account)
    assert (member.bond, member.peer) == (TERMS.stake, peer_of(JOINER))
    with pytest.raises(Conflict, match="account had a seat"):
        await world.run.bond(JOINER, JOINER.account, peer_of(JOINER), 0, 2**40, v, r, s)


async def test_another_runs_contract_cannot_take_the_stake(world: World) -> None:
    """A copy of the contract that the attacker made, with the same run's id: the receiver is signed."""
    copy = await type(world.run).deploy(
        world.chain, ATTACKER, world.coin.address, await world.run.run_id(), await world.run.terms()
    )
    signature = split(await world.authorization(JOINER, peer_of(JOINER), TERMS.stake))
    with pytest.raises(Invalid, match="coin: invalid signature"):
        await copy.bond(ATTACKER, JOINER.account, peer_of(JOINER), 0, 2**40, *signature)


async def test_a_payment_by_the_other_road_bonds_nobody_and_is_no_loss_of_the_runs(world: World) -> None:
    """Who signs a plain transfer to the run has made a gift: it bonds him not, and nobody else either."""
    values = await values_of(world)
    signature = split(await sign_payment(world.coin, JOINER, "TransferWithAuthorization", values))
    await world.coin.transferWithAuthorization(ATTACKER, *values, *signature)  # type: ignore[arg-type]
    assert (await world.run.members(JOINER.account)).status == 0
    received = split(await world.authorization(JOINER, peer_of(JOINER), TERMS.stake))
    await world.coin.mint(JOINER, JOINER.account, TERMS.stake)
    with pytest.raises(Conflict, match="authorization is used"):
        await world.run.bond(JOINER, JOINER.account, peer_of(JOINER), 0, 2**40, *received)


async def test_evidence_that_is_run_ahead_with_still_costs_the_liar_his_bond(world: World) -> None:
    """Whoever comes first has the reward, the liar too: then he still loses more than half."""
    liar, (one, other) = WORKERS[0], (b"\1" * 32, b"\2" * 32)
    consent = await world.consent()
    signatures = [liar.sign_digest(consent.receipt(one, content)) for content in (one, other)]
    before = await world.coin.balanceOf(liar.account)
    await world.run.contradict(liar, liar.account, one, one, signatures[0], other, signatures[1])
    gained = await world.coin.balanceOf(liar.account) - before
    assert gained == TERMS.stake * TERMS.reward_bps // 10_000 <= TERMS.stake // 2
    assert not await world.run.is_worker(liar.account)


async def test_a_verdicts_reward_cannot_be_run_ahead_with(world: World) -> None:
    """The challenger is signed."""
    digest = (await world.consent()).slash(WORKERS[0].account, b"\1" * 32, JOINER.account)
    verdict = [k.sign_digest(digest) for k in WORKERS[1:]]
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.run.slash(ATTACKER, WORKERS[0].account, b"\1" * 32, ATTACKER.account, verdict)
    await world.run.slash(ATTACKER, WORKERS[0].account, b"\1" * 32, JOINER.account, verdict)
    assert await world.coin.balanceOf(ATTACKER.account) == 0
