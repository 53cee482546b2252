"""A gateway that takes tokens and never signs for them, or for too few: its workers stop at a bounded loss."""

from __future__ import annotations

import pytest

from gate_world import GATEWAY, GateWorld, bought, voucher
from tessera.core.errors import Refused

pytestmark = pytest.mark.anyio


async def serve(world: GateWorld, number: int, signed: int) -> None:
    await world.serve(voucher(number, purchase=bought(number=number)), 100)
    if signed:
        world.sign(number, signed)


async def test_it_is_served_no_more_once_the_limit_is_reached() -> None:
    world = GateWorld()  # which risks 250 tokens
    for number in range(3):
        await serve(world, number, 0)
    with pytest.raises(Refused, match="signed for 0 of 300"):
        await serve(world, 3, 0)
    with pytest.raises(Refused, match="signed for 0 of 300"):
        await world.restarted().admit(GATEWAY.id, voucher(3).to_value())


async def test_a_receipt_that_comes_late_opens_the_gate_again() -> None:
    world = GateWorld()
    for number in range(3):
        await serve(world, number, 0)
    world.sign(0, 100)
    await serve(world, 3, 100)


@pytest.mark.slow
async def test_who_signs_for_less_than_it_got_gains_a_sixteenth_at_most_and_the_limit() -> None:
    world = GateWorld()
    served = await until_refused(world, 90)
    signed = served * 9 // 10
    assert served - signed <= 250 + signed // 16 + 100


@pytest.mark.slow
async def test_an_honest_gateway_whose_buyers_cancel_is_served_for_long() -> None:
    world = GateWorld()
    for number in range(40):
        await serve(world, number, 96)  # four tokens were under way when the buyer left


async def test_sessions_at_once_do_not_hide_from_the_limit() -> None:
    world = GateWorld()
    budgets = []
    for number in range(3):
        paper = voucher(number, purchase=bought(number=number))
        budgets.append(await world.gate.admit(GATEWAY.id, paper.to_value()))
        budgets[-1].reach(0, 100, 100)
    with pytest.raises(Refused, match="signed for 0 of 300"):
        await serve(world, 3, 100)


async def until_refused(world: GateWorld, signed: int) -> int:
    """The tokens that were served until the gateway was refused."""
    for number in range(1_000):
        try:
            await serve(world, number, signed)
        except Refused:
            return 100 * number
    raise AssertionError("it was never refused")
