"""Redeeming late: nothing is lost by it, nothing can be won by it, and what was struck out cannot be redeemed ever."""

from __future__ import annotations

import pytest

from chain_support import TERMS, WORKERS, World, key, local_world
from tessera.core.errors import Conflict, Invalid

pytestmark = pytest.mark.anyio
LATE, EARLY, ATTACKER = key("late"), key("early"), key("attacker")
YEAR_S = 365 * 86_400
EVIDENCE = b"\x09" * 32
SLOW = TERMS._replace(window_s=600)


@pytest.fixture
async def world() -> World:
    return await local_world(SLOW)


async def test_years_later_nothing_is_lost_and_nothing_was_taken_from_the_others(world: World) -> None:
    tree = await world.epoch({LATE.account: 30, EARLY.account: 10})
    await world.share.redeem(EARLY, 0, EARLY.account, 10, tree.proof(1))
    for _ in range(3):
        await world.earn(400)
        await world.share.claim(EARLY)
        await world.wait(YEAR_S)
    await world.give({ATTACKER.account: 40})  # an epoch between: it earns from here only
    await world.earn(800)
    await world.share.redeem(ATTACKER, 0, LATE.account, 30, tree.proof(0))
    claimable = [await world.share.claimable(who.account) for who in (LATE, EARLY, ATTACKER)]
    assert claimable == [900 + 300, 100, 400]
    await world.share.claim(LATE)
    assert await world.coin.balanceOf(LATE.account) == 1_200


async def test_redeeming_just_after_income_wins_nothing_and_works_once(world: World) -> None:
    tree = await world.epoch({LATE.account: 1, EARLY.account: 1})
    await world.earn(100)
    await world.share.redeem(LATE, 0, LATE.account, 1, tree.proof(0))
    assert await world.share.claimable(LATE.account) == 50
    await world.share.claim(LATE)
    for _ in range(2):
        with pytest.raises(Conflict, match="already redeemed"):
            await world.share.redeem(LATE, 0, LATE.account, 1, tree.proof(0))
    await world.share.transfer(LATE, ATTACKER.account, 1)
    with pytest.raises(Conflict, match="already redeemed"):
        await world.share.redeem(ATTACKER, 0, LATE.account, 1, tree.proof(0))
    assert await world.share.totalSupply() == 2


async def test_who_has_left_the_run_and_withdrawn_redeems_all_the_same(world: World) -> None:
    leaver = WORKERS[2]
    tree = await world.epoch({leaver.account: 7})
    await world.change(leaver=leaver.account)
    await world.wait(SLOW.delay_s)
    await world.run.withdraw(leaver, leaver.account)
    await world.earn(700)
    await world.wait(YEAR_S)
    await world.share.redeem(leaver, 0, leaver.account, 7, tree.proof(0))
    await world.share.claim(leaver)
    assert await world.coin.balanceOf(leaver.account) == SLOW.stake + 700


async def test_a_struck_epoch_is_redeemed_never(world: World) -> None:
    """Neither while it waits, nor when it is struck, nor under the number that another epoch then takes."""
    bad = await world.propose({ATTACKER.account: 10**18, EARLY.account: 1})
    attempts = (0, ATTACKER.account, 10**18, bad.tree.proof(0))
    with pytest.raises(Invalid, match="bad proof"):
        await world.share.redeem(ATTACKER, *attempts)
    digest = (await world.consent()).strike(0, 0, EVIDENCE)
    await world.run.strike(EARLY, *bad.fields, EVIDENCE, [k.sign_digest(digest) for k in WORKERS[:2]])
    with pytest.raises(Invalid, match="bad proof"):
        await world.share.redeem(ATTACKER, *attempts)
    await world.epoch({ATTACKER.account: 1, EARLY.account: 1})
    await world.wait(YEAR_S)
    with pytest.raises(Invalid, match="bad proof"):
        await world.share.redeem(ATTACKER, *attempts)
    with pytest.raises(Invalid, match="bad proof"):  # a number that no epoch has: its root is zero
        await world.share.redeem(ATTACKER, 9, ATTACKER.account, 10**18, [])
