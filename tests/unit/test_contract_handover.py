"""A worker leaves and another takes his stage: who may say so, what changes, and what stays."""

from __future__ import annotations

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, RUN_ID, WORKERS, World, key, local_world
from tessera.chain.face import decode_events
from tessera.chain.faces import ModelShare
from tessera.chain.settle import handover_digest
from tessera.chain.types import Receipt
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
SUCCESSOR = key("successor")
STAGE = 1
LEAVER = WORKERS[STAGE]
FROM_STEP = 40


@pytest.fixture
async def world() -> World:
    return await local_world()


def digest(world: World, number: int = 0, stage: int = STAGE, successor: Account = SUCCESSOR.account) -> bytes:
    return handover_digest(CHAIN_ID, world.share.address, RUN_ID, number, stage, successor, FROM_STEP)


async def hand_over(world: World, signers: list[AccountKey], **changes: int | Account) -> Receipt:
    named = {"number": 0, "stage": STAGE, "successor": SUCCESSOR.account, **changes}
    signatures = [k.sign_digest(digest(world, **named)) for k in signers]  # type: ignore[arg-type]
    return await world.share.hand_over(
        key("stranger"), named["number"], named["stage"], named["successor"], FROM_STEP, signatures
    )


async def test_the_successor_signs_from_then_on_and_the_leaver_no_more(world: World) -> None:
    receipt = await hand_over(world, WORKERS[:3])
    (event,) = decode_events(ModelShare.HandedOver, world.share.address, receipt)
    assert (event.number, event.leaver, event.successor) == (0, LEAVER.account, SUCCESSOR.account)
    assert (event.stage, event.from_step) == (STAGE, FROM_STEP)
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.post({key("holder").account: 5}, WORKERS[:3])
    present = sorted([WORKERS[0], WORKERS[2], SUCCESSOR], key=lambda k: int(k.account, 16))
    await world.post({key("holder").account: 5}, present)
    assert await world.share.workers(STAGE) == SUCCESSOR.account
    assert await world.share.worker_count() == 4


async def test_anybody_can_read_who_left_and_when(world: World) -> None:
    await hand_over(world, WORKERS[:3])
    past = await world.share.handovers(0)
    assert (past.stage, past.leaver, past.from_step) == (STAGE, LEAVER.account, FROM_STEP)
    assert await world.share.handover_count() == 1


async def test_what_the_leaver_has_earned_stays_his(world: World) -> None:
    await world.give({LEAVER.account: 10})
    tree = await world.post({LEAVER.account: 30})
    await hand_over(world, WORKERS[:3])
    await world.share.redeem(LEAVER, 1, LEAVER.account, 30, tree.proof(0))
    await world.earn(4_000)
    assert await world.share.claimable(LEAVER.account) == 4_000


async def test_the_handover_digest_is_what_eip_712_says(world: World) -> None:
    value = {
        "runId": bytes.fromhex(RUN_ID), "number": 0, "stage": STAGE, "successor": SUCCESSOR.account,
        "fromStep": FROM_STEP,
    }  # fmt: skip
    kinds = ("bytes32", "uint256", "uint256", "address", "uint256")
    signable = encode_typed_data(
        {"name": "Tessera model share", "version": "1", "chainId": CHAIN_ID, "verifyingContract": world.share.address},
        {"Handover": [{"name": name, "type": kind} for name, kind in zip(value, kinds, strict=True)]},
        value,
    )
    signed = EthAccount.sign_message(signable, LEAVER.secret)
    on_chain = await world.share.handover_digest(0, STAGE, SUCCESSOR.account, FROM_STEP)
    assert bytes(signed.message_hash) == digest(world) == on_chain


async def test_two_thirds_of_the_workers_are_not_enough(world: World) -> None:
    with pytest.raises(Refused, match="too few signatures"):
        await hand_over(world, WORKERS[:2])


async def test_strangers_signatures_do_not_count(world: World) -> None:
    signers = sorted([*WORKERS[:2], SUCCESSOR], key=lambda k: int(k.account, 16))
    with pytest.raises(Invalid, match="not a worker's signature"):
        await hand_over(world, signers)


async def test_signatures_serve_one_handover(world: World) -> None:
    await hand_over(world, WORKERS[:3])
    with pytest.raises(Conflict, match="not the next handover"):
        await hand_over(world, WORKERS[:3])
    with pytest.raises(Conflict, match="not the next handover"):
        await hand_over(world, WORKERS[:3], number=2)


async def test_signatures_for_one_stage_do_not_open_another(world: World) -> None:
    signatures = [k.sign_digest(digest(world)) for k in WORKERS[:3]]
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.share.hand_over(WORKERS[0], 0, STAGE + 1, SUCCESSOR.account, FROM_STEP, signatures)
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.share.hand_over(WORKERS[0], 0, STAGE, SUCCESSOR.account, FROM_STEP + 1, signatures)


async def test_nobody_holds_two_stages_and_nobody_is_nobody(world: World) -> None:
    with pytest.raises(Invalid, match="worker named twice"):
        await hand_over(world, WORKERS[:3], successor=WORKERS[3].account)
    with pytest.raises(Invalid, match="bad worker"):
        await hand_over(world, WORKERS[:3], successor=Account("0x" + "00" * 20))
    with pytest.raises(Invalid, match="no such stage"):
        await hand_over(world, WORKERS[:3], stage=4)


async def test_a_leaver_may_come_back_at_another_handover(world: World) -> None:
    await hand_over(world, WORKERS[:3])
    present = sorted([WORKERS[0], WORKERS[2], SUCCESSOR], key=lambda k: int(k.account, 16))
    await hand_over(world, present, number=1, successor=LEAVER.account)
    assert await world.share.workers(STAGE) == LEAVER.account
    assert not await world.share.is_worker(SUCCESSOR.account)
