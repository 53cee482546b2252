"""Bonds that are taken: by the verdict of the others, or by two receipts that contradict each other."""

from __future__ import annotations

import pytest

from chain_support import TERMS, WORKERS, World, ascending, key, local_world
from tessera.chain.consent import NOBODY
from tessera.chain.face import decode_events
from tessera.chain.faces import Run
from tessera.chain.types import Receipt
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
CHALLENGER, STRANGER, JOINER = key("challenger"), key("stranger"), key("joiner")
CHEAT, HONEST = WORKERS[0], WORKERS[1:]
EVIDENCE, SUBJECT = b"\x09" * 32, b"\x0a" * 32
ONE, OTHER = b"\x01" * 32, b"\x02" * 32
REWARD = TERMS.stake * TERMS.reward_bps // 10_000
SLASHED = 64


@pytest.fixture
async def world() -> World:
    return await local_world()


async def slash(
    world: World, worker: Account, signers: list[AccountKey], challenger: Account = CHALLENGER.account
) -> Receipt:
    digest = (await world.consent()).slash(worker, EVIDENCE, challenger)
    signatures = [k.sign_digest(digest) for k in ascending(signers)]
    return await world.run.slash(STRANGER, worker, EVIDENCE, challenger, signatures)


async def contradict(world: World, liar: AccountKey, worker: Account | None = None, other: bytes = OTHER) -> Receipt:
    receipt = (await world.consent()).receipt
    first, second = (liar.sign_digest(receipt(SUBJECT, content)) for content in (ONE, other))
    accused = worker or liar.account
    return await world.run.contradict(CHALLENGER, accused, SUBJECT, ONE, first, other, second)


async def test_more_than_two_thirds_of_the_others_take_a_bond(world: World) -> None:
    stage = (await world.run.members(CHEAT.account)).stage
    with pytest.raises(Refused, match="too few signatures"):
        await slash(world, CHEAT.account, HONEST[:2])
    receipt = await slash(world, CHEAT.account, HONEST)
    (event,) = decode_events(Run.Slashed, world.run.address, receipt)
    assert (event.worker, event.challenger, event.evidence) == (CHEAT.account, CHALLENGER.account, EVIDENCE)
    assert (event.amount, event.reward) == (TERMS.stake, REWARD)
    (changed,) = decode_events(Run.Changed, world.run.address, receipt)
    assert (changed.joiner, changed.leaver) == (NOBODY, CHEAT.account)
    member = await world.run.members(CHEAT.account)
    assert (member.status, member.bond) == (SLASHED, 0)
    assert not await world.run.is_worker(CHEAT.account)
    assert await world.run.served(stage) == 1
    assert await world.run.bonded() == 3 * TERMS.stake == await world.coin.balanceOf(world.run.address)
    assert await world.coin.balanceOf(CHALLENGER.account) == REWARD
    assert await world.coin.balanceOf(world.share.address) == TERMS.stake - REWARD


async def test_what_is_left_of_a_bond_is_income_of_the_shares(world: World) -> None:
    await world.give({STRANGER.account: 5})
    await slash(world, CHEAT.account, HONEST)
    await world.share.distribute(STRANGER)
    assert await world.share.claimable(STRANGER.account) == TERMS.stake - REWARD


async def test_the_accused_has_no_voice(world: World) -> None:
    with pytest.raises(Invalid, match="not a worker's signature"):
        await slash(world, CHEAT.account, [*HONEST, CHEAT])


async def test_one_alone_takes_nobodys_bond(world: World) -> None:
    """Two are left: either could otherwise rob the other, and name himself as the challenger."""
    for leaver in HONEST[1:]:
        await world.change(leaver=leaver.account)
        world.workers.remove(leaver)
    with pytest.raises(Refused, match="too few signatures"):
        await slash(world, CHEAT.account, HONEST[:1], HONEST[0].account)


async def test_a_bond_is_lost_once_and_never_comes_back(world: World) -> None:
    await slash(world, CHEAT.account, HONEST)
    for again in (slash(world, CHEAT.account, HONEST), contradict(world, CHEAT)):
        with pytest.raises(Refused, match="no bond to take"):
            await again
    await world.wait(2 * TERMS.delay_s)
    with pytest.raises(Refused, match="nothing to withdraw"):
        await world.run.withdraw(CHEAT, CHEAT.account)
    with pytest.raises(Invalid, match="not a worker"):
        await world.run.leave(CHEAT)
    with pytest.raises(Conflict, match="account had a seat"):
        await world.bond(CHEAT, peer=ONE)
    with pytest.raises(Conflict, match="peer had a seat"):
        await world.bond(JOINER, peer=(await world.run.members(CHEAT.account)).peer)
    assert await world.coin.balanceOf(CHEAT.account) == TERMS.stake  # only what `bond` minted in the attempt above


async def test_who_has_left_is_at_risk_until_the_bond_is_paid(world: World) -> None:
    await world.change(leaver=CHEAT.account)
    await world.wait(2 * TERMS.delay_s)
    world.workers.remove(CHEAT)
    count = await world.run.change_count()
    await slash(world, CHEAT.account, HONEST)
    assert await world.run.change_count() == count  # he was no worker any more
    with pytest.raises(Refused, match="nothing to withdraw"):
        await world.run.withdraw(CHEAT, CHEAT.account)


async def test_who_has_been_paid_or_was_never_a_worker_has_no_bond_to_take(world: World) -> None:
    await world.candidate(JOINER)
    await world.change(leaver=CHEAT.account)
    await world.wait(TERMS.delay_s)
    await world.run.withdraw(CHEAT, CHEAT.account)
    for worker in (CHEAT.account, JOINER.account, STRANGER.account):
        with pytest.raises(Refused, match="no bond to take"):
            await slash(world, worker, HONEST)


async def test_who_announced_to_leave_can_be_slashed_and_his_stage_is_counted_once(world: World) -> None:
    stage = (await world.run.members(CHEAT.account)).stage
    await world.run.leave(CHEAT)
    assert await world.run.served(stage) == 1
    await slash(world, CHEAT.account, HONEST)
    assert await world.run.served(stage) == 1
    assert await world.run.worker_count() == 3


async def test_the_challenger_is_somebody_else_than_nobody_and_the_contract(world: World) -> None:
    for challenger in (NOBODY, world.run.address):
        with pytest.raises(Invalid, match="bad challenger"):
            await slash(world, CHEAT.account, HONEST, challenger)


async def test_a_verdict_names_worker_evidence_and_challenger(world: World) -> None:
    consent = await world.consent()
    for digest in (
        consent.slash(WORKERS[1].account, EVIDENCE, CHALLENGER.account),
        consent.slash(CHEAT.account, SUBJECT, CHALLENGER.account),
        consent.slash(CHEAT.account, EVIDENCE, STRANGER.account),
    ):
        signatures = [k.sign_digest(digest) for k in HONEST]
        with pytest.raises(Invalid, match="not a worker's signature"):
            await world.run.slash(STRANGER, CHEAT.account, EVIDENCE, CHALLENGER.account, signatures)


async def test_two_receipts_that_contradict_each_other_take_a_bond_without_anybodys_consent(world: World) -> None:
    receipt = await contradict(world, CHEAT)
    (event,) = decode_events(Run.Slashed, world.run.address, receipt)
    assert (event.worker, event.challenger, event.evidence) == (CHEAT.account, CHALLENGER.account, SUBJECT)
    assert await world.coin.balanceOf(CHALLENGER.account) == REWARD
    with pytest.raises(Refused, match="no bond to take"):
        await contradict(world, CHEAT)


async def test_saying_the_same_twice_is_no_contradiction(world: World) -> None:
    with pytest.raises(Invalid, match="receipts agree"):
        await contradict(world, CHEAT, other=ONE)


async def test_only_the_accuseds_own_receipts_count(world: World) -> None:
    with pytest.raises(Invalid, match="not his receipt"):
        await contradict(world, STRANGER, CHEAT.account)
    consent = await world.consent()
    his = CHEAT.sign_digest(consent.receipt(SUBJECT, ONE))
    for forged in (
        STRANGER.sign_digest(consent.receipt(SUBJECT, OTHER)),
        CHEAT.sign_digest(consent.receipt(ONE, OTHER)),
    ):
        for pair in ((ONE, his, OTHER, forged), (OTHER, forged, ONE, his)):
            with pytest.raises(Invalid, match="not his receipt"):
                await world.run.contradict(CHALLENGER, CHEAT.account, SUBJECT, *pair)


async def test_a_malformed_signature_accuses_nobody(world: World) -> None:
    """What recovers to no account is not the account zero's receipt."""
    with pytest.raises(Refused, match="no bond to take"):
        await world.run.contradict(CHALLENGER, NOBODY, SUBJECT, ONE, b"", OTHER, bytes(65))


@pytest.mark.parametrize("shape", ["high s", "v 0", "64 bytes", "empty", "r 0"])
async def test_a_malformed_signature_does_not_count(world: World, shape: str) -> None:
    order = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
    digest = (await world.consent()).slash(WORKERS[3].account, EVIDENCE, CHALLENGER.account)
    good = [k.sign_digest(digest) for k in WORKERS[:3]]
    r, s, v = good[0][:32], int.from_bytes(good[0][32:64], "big"), good[0][64]
    bad = {
        "high s": r + (order - s).to_bytes(32, "big") + bytes([55 - v]),  # the twin that ecrecover would accept
        "v 0": good[0][:64] + bytes([v - 27]),
        "64 bytes": good[0][:64],
        "empty": b"",
        "r 0": bytes(32) + good[0][32:],
    }[shape]
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.run.slash(STRANGER, WORKERS[3].account, EVIDENCE, CHALLENGER.account, [bad, *good[1:]])
    await world.run.slash(STRANGER, WORKERS[3].account, EVIDENCE, CHALLENGER.account, good)
