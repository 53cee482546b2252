"""Workers come and go: who may say so, what changes, and what stays."""

from __future__ import annotations

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, RUN_ID, WORKERS, World, key, local_world
from tessera.chain.face import decode_events
from tessera.chain.faces import ModelShare
from tessera.chain.settle import NOBODY, change_digest
from tessera.chain.types import Receipt
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
JOINER = key("joiner")
LEAVER = WORKERS[1]
MAX_WORKERS = 128


@pytest.fixture
async def world() -> World:
    return await local_world()


def digest(world: World, number: int = 0, joiner: Account = NOBODY, leaver: Account = NOBODY) -> bytes:
    return change_digest(CHAIN_ID, world.share.address, RUN_ID, number, joiner, leaver)


async def change(
    world: World, signers: list[AccountKey], *, number: int = 0, joiner: Account = NOBODY, leaver: Account = NOBODY
) -> Receipt:
    ordered = sorted(signers, key=lambda k: int(k.account, 16))
    signatures = [k.sign_digest(digest(world, number, joiner, leaver)) for k in ordered]
    return await world.share.change(key("stranger"), number, joiner, leaver, signatures)


async def present(world: World) -> set[Account]:
    return {await world.share.workers(i) for i in range(await world.share.worker_count())}


async def test_who_joins_signs_from_then_on_and_counts(world: World) -> None:
    receipt = await change(world, WORKERS[:3], joiner=JOINER.account)
    (event,) = decode_events(ModelShare.Changed, world.share.address, receipt)
    assert (event.number, event.joiner, event.leaver) == (0, JOINER.account, NOBODY)
    assert await present(world) == {*(k.account for k in WORKERS), JOINER.account}
    with pytest.raises(Refused, match="too few signatures"):  # three of five are not more than two thirds
        await world.post({key("holder").account: 5}, WORKERS[:3])
    signers = sorted([*WORKERS[:3], JOINER], key=lambda k: int(k.account, 16))
    await world.post({key("holder").account: 5}, signers)


async def test_who_leaves_signs_no_more_and_counts_no_more(world: World) -> None:
    await change(world, WORKERS[:3], leaver=LEAVER.account)
    assert await present(world) == {k.account for k in WORKERS if k is not LEAVER}
    assert not await world.share.is_worker(LEAVER.account)
    with pytest.raises(Invalid, match="not a worker's signature"):
        await world.post({key("holder").account: 5}, WORKERS[:3])
    with pytest.raises(Refused, match="too few signatures"):
        await world.post({key("holder").account: 5}, WORKERS[2:])
    await world.post({key("holder").account: 5}, [WORKERS[0], *WORKERS[2:]])


async def test_one_may_join_as_another_leaves(world: World) -> None:
    await change(world, WORKERS[:3], joiner=JOINER.account, leaver=LEAVER.account)
    assert await present(world) == {*(k.account for k in WORKERS if k is not LEAVER), JOINER.account}
    assert await world.share.worker_count() == 4


@pytest.mark.parametrize("place", range(4))
async def test_the_others_stay_whoever_leaves(place: int, world: World) -> None:
    signers = [k for k in WORKERS if k is not WORKERS[place]]
    await change(world, signers, leaver=WORKERS[place].account)
    assert await present(world) == {k.account for k in signers}


async def test_anybody_can_read_who_came_and_went(world: World) -> None:
    await change(world, WORKERS[:3], joiner=JOINER.account)
    await change(world, [*WORKERS[:3], JOINER], number=1, leaver=LEAVER.account)
    assert await world.share.change_count() == 2
    changes = [await world.share.changes(number) for number in range(3)]
    assert [(c.joiner, c.leaver) for c in changes] == [
        (JOINER.account, NOBODY), (NOBODY, LEAVER.account), (NOBODY, NOBODY),
    ]  # fmt: skip


async def test_what_the_leaver_has_earned_stays_his(world: World) -> None:
    await world.give({LEAVER.account: 10})
    tree = await world.post({LEAVER.account: 30})
    await change(world, WORKERS[:3], leaver=LEAVER.account)
    await world.share.redeem(LEAVER, 1, LEAVER.account, 30, tree.proof(0))
    await world.earn(4_000)
    assert await world.share.claimable(LEAVER.account) == 4_000


async def test_the_change_digest_is_what_eip_712_says(world: World) -> None:
    value = {"runId": bytes.fromhex(RUN_ID), "number": 0, "joiner": JOINER.account, "leaver": LEAVER.account}
    kinds = ("bytes32", "uint256", "address", "address")
    signable = encode_typed_data(
        {"name": "Tessera model share", "version": "1", "chainId": CHAIN_ID, "verifyingContract": world.share.address},
        {"Change": [{"name": name, "type": kind} for name, kind in zip(value, kinds, strict=True)]},
        value,
    )
    signed = EthAccount.sign_message(signable, LEAVER.secret)
    on_chain = await world.share.change_digest(0, JOINER.account, LEAVER.account)
    assert bytes(signed.message_hash) == digest(world, 0, JOINER.account, LEAVER.account) == on_chain


async def test_two_thirds_of_the_workers_are_not_enough(world: World) -> None:
    with pytest.raises(Refused, match="too few signatures"):
        await change(world, WORKERS[:2], joiner=JOINER.account)


async def test_strangers_signatures_do_not_count(world: World) -> None:
    with pytest.raises(Invalid, match="not a worker's signature"):
        await change(world, [*WORKERS[:2], JOINER], joiner=JOINER.account)


async def test_signatures_serve_one_change(world: World) -> None:
    await change(world, WORKERS[:3], joiner=JOINER.account)
    with pytest.raises(Conflict, match="not the next change"):
        await change(world, WORKERS[:3], joiner=JOINER.account)
    with pytest.raises(Conflict, match="not the next change"):
        await change(world, WORKERS[:3], number=2, joiner=key("another").account)


async def test_signatures_for_one_change_make_no_other(world: World) -> None:
    signatures = [k.sign_digest(digest(world, joiner=JOINER.account)) for k in WORKERS[:3]]
    for joiner, leaver in (
        (key("another").account, NOBODY), (NOBODY, JOINER.account), (JOINER.account, LEAVER.account),
    ):  # fmt: skip
        with pytest.raises(Invalid, match="not a worker's signature"):
            await world.share.change(WORKERS[0], 0, joiner, leaver, signatures)


async def test_nobody_works_twice_and_nobody_is_nobody(world: World) -> None:
    with pytest.raises(Invalid, match="worker named twice"):
        await change(world, WORKERS[:3], joiner=WORKERS[3].account)
    with pytest.raises(Invalid, match="empty change"):
        await change(world, WORKERS[:3])
    with pytest.raises(Invalid, match="empty change"):
        await change(world, WORKERS[:3], joiner=JOINER.account, leaver=JOINER.account)
    with pytest.raises(Invalid, match="no such worker"):
        await change(world, WORKERS[:3], leaver=JOINER.account)


async def test_the_last_worker_cannot_leave(world: World) -> None:
    left = list(WORKERS)
    for number in range(3):
        await change(world, left, number=number, leaver=left[-1].account)
        left.pop()
    with pytest.raises(Refused, match="last worker"):
        await change(world, left, number=3, leaver=left[0].account)
    await world.post({key("holder").account: 5}, left)


@pytest.mark.slow
async def test_there_are_at_most_128_workers(world: World) -> None:
    workers = list(WORKERS)
    for number in range(MAX_WORKERS - len(workers)):
        joiner = key(f"joiner {number}")
        await change(world, workers, number=number, joiner=joiner.account)
        workers.append(joiner)
    with pytest.raises(Refused, match="too many workers"):
        await change(world, workers, number=MAX_WORKERS - 4, joiner=JOINER.account)
    await change(world, workers, number=MAX_WORKERS - 4, leaver=workers[0].account)
    assert await world.share.worker_count() == MAX_WORKERS - 1


async def test_a_leaver_may_come_back_by_another_change(world: World) -> None:
    await change(world, WORKERS[:3], leaver=LEAVER.account)
    await change(world, [WORKERS[0], *WORKERS[2:]], number=1, joiner=LEAVER.account)
    assert await present(world) == {k.account for k in WORKERS}
