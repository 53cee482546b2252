"""Griefing by dust: small things sent often make nothing dearer, stop nothing, and take nothing from anybody."""

from __future__ import annotations

import pytest

from chain_support import TERMS, WORKERS, World, key, local_world, peer_of, split
from tessera.chain.settle import income_table
from tessera.core.errors import Invalid, PaymentRequired, Refused

pytestmark = pytest.mark.anyio
ATTACKER, HOLDER, OTHER, JOINER = key("attacker"), key("holder"), key("other"), key("joiner")


@pytest.fixture
async def world() -> World:
    return await local_world()


async def test_income_in_single_units_pays_what_one_sum_pays(world: World) -> None:
    """Spread one unit at a time over shares that do not divide it: nobody loses to rounding more than one unit."""
    await world.give({HOLDER.account: 10**18, OTHER.account: 2 * 10**18})
    for _ in range(10):
        await world.coin.mint(ATTACKER, world.share.address, 1)
        await world.share.distribute(ATTACKER)
        await world.share.claim(ATTACKER, HOLDER.account)  # for him: dust stays credited, it is not rounded away
    assert await world.coin.balanceOf(HOLDER.account) == 3
    await world.earn(20)
    await world.share.claim(ATTACKER, HOLDER.account)
    await world.share.claim(ATTACKER, OTHER.account)
    assert await world.coin.balanceOf(HOLDER.account) in (9, 10)
    assert await world.coin.balanceOf(OTHER.account) in (19, 20)
    table = await income_table(world.chain, world.share.address)
    assert table.dust <= table.roundings


async def test_shares_in_single_units_to_many_make_no_claim_dearer(world: World) -> None:
    """Nobody iterates over holders: a thousand dust holders cost the others nothing."""
    await world.give({HOLDER.account: 10**18, ATTACKER.account: 100})
    await world.earn(10**6)
    await world.share.claim(HOLDER)
    await world.earn(10**6)
    before = (await world.share.claim(HOLDER)).gas_used
    for i in range(20):
        await world.share.transfer(ATTACKER, key(f"dust {i}").account, 1)
    await world.share.transfer(ATTACKER, HOLDER.account, 1)  # dust to himself
    await world.earn(10**6)
    assert abs((await world.share.claim(HOLDER)).gas_used - before) < 500


async def test_calls_with_nothing_in_them_change_nothing(world: World) -> None:
    await world.give({HOLDER.account: 10})
    index = await world.share.index()
    await world.share.distribute(ATTACKER)
    await world.share.claim(ATTACKER, HOLDER.account)
    await world.share.transfer(ATTACKER, HOLDER.account, 0)
    await world.share.transferFrom(ATTACKER, HOLDER.account, ATTACKER.account, 0)
    assert await world.share.index() == index
    assert await world.share.balanceOf(HOLDER.account) == 10


async def test_a_stake_cannot_be_less_than_the_stake(world: World) -> None:
    """The amount is the terms', not the candidate's: no crowd of dust candidates crowds others out."""
    await world.coin.mint(ATTACKER, ATTACKER.account, 1)
    for amount, error in ((1, Invalid), (TERMS.stake, PaymentRequired)):
        signature = split(await world.authorization(ATTACKER, peer_of(ATTACKER), amount))
        with pytest.raises(error):
            await world.run.bond(ATTACKER, ATTACKER.account, peer_of(ATTACKER), 0, 2**40, *signature)
    assert (await world.run.members(ATTACKER.account)).status == 0


async def test_a_crowd_that_fills_all_places_costs_its_bonds_and_is_gone_in_an_hour(world: World) -> None:
    """Whoever bonds and never works keeps a place from others for an hour, and his money from himself for a delay."""
    crowd = [key(f"crowd {i}") for i in range(2)]
    for one in crowd:
        await world.candidate(one)
    await world.bond(JOINER)
    with pytest.raises(Refused, match="every stage is full"):
        await world.run.draw(JOINER, JOINER.account)
    await world.wait(3_601)
    for one in crowd:
        await world.run.expire(JOINER, one.account)
    await world.run.draw(JOINER, JOINER.account)
    await world.change(joiner=JOINER.account)
    with pytest.raises(Refused, match="bond is still at risk"):
        await world.run.withdraw(crowd[0], crowd[0].account)


async def test_dust_on_the_runs_balance_stops_neither_bond_nor_slash_nor_withdrawal(world: World) -> None:
    """A check of the balance must compare with what was there, not with what should be."""
    await world.coin.mint(ATTACKER, world.run.address, 1)
    await world.bond(JOINER)
    await world.coin.mint(ATTACKER, world.run.address, 1)
    await world.change(leaver=WORKERS[0].account)
    await world.wait(TERMS.delay_s)
    await world.run.withdraw(ATTACKER, WORKERS[0].account)
    digest = (await world.consent()).slash(WORKERS[1].account, b"\1" * 32, JOINER.account)
    await world.run.slash(
        ATTACKER, WORKERS[1].account, b"\1" * 32, JOINER.account, [k.sign_digest(digest) for k in WORKERS[2:]]
    )
    assert await world.coin.balanceOf(world.run.address) == await world.run.bonded() + 2
