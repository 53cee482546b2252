"""Balances: what is set aside, used, given back; once, also after a kill."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid
from tessera.serving.paying.balances import LEASE_S, Balance, Balances

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def test_what_a_request_did_not_use_comes_back(database_url: str, clock: FakeClock) -> None:
    balances = Balances(clock, where=database_url)
    assert await balances.add("a", "bought", 100, "payment 1")
    assert not await balances.add("a", "bought", 100, "payment 1")
    reserve = await balances.hold("a", 60)
    assert reserve is not None
    assert await balances.read("a") == Balance(40, 60)
    assert await balances.hold("a", 41) is None
    assert await balances.use(reserve, 25) == 75
    assert await balances.use(reserve, 60) == 75  # it has ended
    assert await balances.read("a") == Balance(75, 0)
    assert await balances.read("b") == Balance(0, 0)
    last = await balances.last("a", 10)
    assert [(entry.kind, entry.units, entry.balance) for entry in last] == [
        ("returned", 35, 75), ("held", -60, 40), ("bought", 100, 100),
    ]  # fmt: skip
    balances.close()


async def test_what_a_killed_gateway_held_comes_back_once_and_a_late_one_still_pays(clock: FakeClock) -> None:
    balances = Balances(clock)
    await balances.add("a", "bought", 100, "payment 1")
    reserve = await balances.hold("a", 60)
    assert reserve is not None
    clock.advance(LEASE_S)
    for _ in range(2):
        assert await balances.read("a") == Balance(100, 0)
    for _ in range(2):
        assert await balances.use(reserve, 25) == 75
    assert await balances.read("a") == Balance(75, 0)


async def test_an_allowance_goes_so_far_below_nothing_and_shrinks_at_once(clock: FakeClock) -> None:
    balances = Balances(clock)
    reserve = await balances.hold("day 1", 70, allowed=100)
    assert reserve is not None
    assert await balances.use(reserve, 50) == -50
    assert await balances.hold("day 1", 51, allowed=100) is None
    assert await balances.hold("day 1", 50, allowed=99) is None
    assert await balances.hold("day 1", 50, allowed=100) is not None


async def test_many_at_once_never_use_more_than_there_is(database_url: str, clock: FakeClock) -> None:
    gateways = [Balances(clock, where=database_url) for _ in range(2)]
    await gateways[0].add("a", "bought", 100, "payment 1")
    served = 0

    async def ask(balances: Balances) -> None:
        nonlocal served
        reserve = await balances.hold("a", 30)
        if reserve is not None:
            await anyio.lowlevel.checkpoint()
            await balances.use(reserve, 30)
            served += 1

    async with anyio.create_task_group() as group:
        for turn in range(12):
            group.start_soon(ask, gateways[turn % 2])
    assert served == 3
    assert await gateways[1].read("a") == Balance(10, 0)
    for balances in gateways:
        balances.close()


async def test_debts_are_told_until_they_are_known_to_be_paid(clock: FakeClock) -> None:
    balances = Balances(clock)
    await balances.add("a", "debt", -40, "nonce 1")
    await balances.add("a", "debt", -5, "nonce 2")
    assert await balances.debts("a", clock.time()) == (-45, {"nonce 1": 40, "nonce 2": 5})
    await balances.add("a", "paid", 40, "nonce 1")
    assert await balances.debts("a", clock.time()) == (-5, {"nonce 2": 5})
    assert await balances.debts("a", clock.time() + 1) == (-5, {})


@pytest.mark.parametrize("units", [10**18 + 1, -(10**18) - 1, True, 1.0])
async def test_units_that_no_column_holds_are_refused(clock: FakeClock, units: int) -> None:
    with pytest.raises(Invalid):
        await Balances(clock).add("a", "bought", units, "payment 1")


async def test_more_than_was_held_is_never_used(clock: FakeClock) -> None:
    balances = Balances(clock)
    await balances.add("a", "bought", 100, "payment 1")
    reserve = await balances.hold("a", 60)
    assert reserve is not None
    with pytest.raises(Invalid):
        await balances.use(reserve, 61)
    assert await balances.hold("a", -1) is None
