"""Dust: very many or very small payments and gifts, meant to fill, to block or to make dear. Nothing grows with it."""

from __future__ import annotations

import pytest

from spend_world import AGENT, CHILD, FUNDS, HOUR, OTHER_PAYEE, OWNER, PAYEE, THIEF, Spending, spending_world
from tessera.core.errors import Conflict, Invalid, TesseraError

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world() -> Spending:
    return await spending_world()


async def gas_of_a_payment(world: Spending) -> int:
    payment = world.payment()
    return (await world.send(payment, world.sign(payment))).gas_used


async def test_twenty_payments_of_one_unit_make_the_next_no_dearer(world: Spending) -> None:
    await world.pay()
    before = await gas_of_a_payment(world)
    for _ in range(20):
        await world.pay(amount=1)
    assert abs(await gas_of_a_payment(world) - before) <= 200  # zero bytes in a signature are cheaper
    assert await world.policy.available(world.mandate) == 250 - 50 - 50 - 20 - 50


async def test_dust_over_many_periods_leaves_nothing_behind(world: Spending) -> None:
    for _ in range(14):
        await world.pay(amount=1)
        world.wait(2 * HOUR)
    assert await world.policy.spent(world.mandate) == 12  # of six ticks; in this one there is none yet
    world.wait(30 * HOUR)
    assert await world.policy.spent(world.mandate) == 0
    assert await world.policy.available(world.mandate) == 100


async def test_strangers_can_use_up_nothing(world: Spending) -> None:
    """No cap, no intent: what is refused leaves no trace."""
    payment = world.payment()
    for bad in (payment._replace(amount=0), payment._replace(amount=1), payment._replace(payee=OTHER_PAYEE)):
        with pytest.raises(TesseraError):
            await world.send(bad, world.sign(bad, THIEF))
    with pytest.raises(Invalid, match="nothing to pay"):
        await world.pay(amount=0, intent=payment.intent)
    assert await world.policy.spent(world.mandate) == 0
    await world.send(payment, world.sign(payment))


async def test_gifts_change_no_limit(world: Spending) -> None:
    await world.coin.mint(THIEF, world.policy.address, 7)
    await world.coin.mint(THIEF, OWNER.account, 7)
    assert await world.policy.available(world.mandate) == 100
    await world.pay()
    assert await world.coin.balanceOf(world.policy.address) == 7
    assert await world.coin.balanceOf(PAYEE) == 50
    assert await world.coin.balanceOf(OWNER.account) == FUNDS + 7 - 50


async def test_a_child_that_runs_ahead_with_an_intent_pays_for_it_and_is_ended(world: Spending) -> None:
    """It may block its parent's payment by naming the same intent; its signature shows who did, and its limits bind."""
    child = await world.delegate(world.mandate, AGENT, CHILD, world.limits(per_period=1))
    payment = world.payment()
    await world.pay(CHILD, mandate=child, amount=1, intent=payment.intent)
    with pytest.raises(Conflict, match="intent is already paid"):
        await world.send(payment, world.sign(payment))
    await world.policy.revoke(AGENT, child)
    await world.pay()
    assert await world.left() == FUNDS - 51
