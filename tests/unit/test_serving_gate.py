"""A worker's gate: what it admits, what it counts, and what it does about a gateway that does not pay or sign."""

from __future__ import annotations

import pytest

from chain_support import NOW, RUN_ID
from gate_world import BEFORE, BUYER, GATEWAY, TERMS, GateWorld, bought, session, voucher
from tessera.core.errors import Invalid, Misbehaviour, PaymentRequired, Refused, Unavailable
from tessera.serving.income.gate import OpenGate
from tessera.serving.income.purchases import FakePurchases
from tessera.serving.income.vouchers import MAX_VALID_S, Purchase, Terms, Voucher

pytestmark = pytest.mark.anyio


async def test_a_paid_session_goes_as_far_as_it_was_bought() -> None:
    world = GateWorld()
    paper = voucher(tokens=100)
    budget = await world.gate.admit(GATEWAY.id, paper.to_value())
    budget.reach(0, 60, 60)
    budget.reach(60, 61, 100)
    budget.reach(61, 100, 100)
    with pytest.raises(Refused, match="token 101 of 100"):
        budget.reach(100, 101, 101)
    world.clock.advance(301)
    with pytest.raises(Refused, match="has ended"):
        budget.reach(99, 100, 100)
    budget.close()
    budget.close()


async def test_without_a_voucher_nothing_is_served_unless_the_run_is_open() -> None:
    with pytest.raises(PaymentRequired):
        await GateWorld().gate.admit(GATEWAY.id, None)
    budget = await OpenGate().admit(GATEWAY.id, None)
    budget.reach(0, 10**9, 10**9)
    budget.close()


@pytest.mark.parametrize("value", [0, "x", [], [1] * 6, {}, [GATEWAY.id, session(0), 0, 5, [], ""]])
async def test_what_is_no_voucher_is_misbehaviour(value: object) -> None:
    with pytest.raises(Misbehaviour):
        await GateWorld().gate.admit(GATEWAY.id, value)


async def test_several_sessions_draw_on_one_purchase_until_it_is_used_up() -> None:
    world = GateWorld()
    for number, tokens in ((1, 40), (2, 60)):
        await world.gate.admit(GATEWAY.id, voucher(number, tokens).to_value())
    with pytest.raises(Refused, match="100 tokens are drawn of 1000 units, 1 more"):
        await world.gate.admit(GATEWAY.id, voucher(3, 1).to_value())


async def test_what_a_session_did_not_use_can_be_drawn_again_once_it_is_signed_for() -> None:
    world = GateWorld()
    await world.serve(voucher(1, 100), 30)
    with pytest.raises(Refused, match="more asked"):
        await world.gate.admit(GATEWAY.id, voucher(2, 70).to_value())
    world.sign(1, 30)
    await world.serve(voucher(2, 70), 70)


async def test_a_restart_forgets_nothing() -> None:
    world = GateWorld()
    await world.serve(voucher(1, 100), 100)
    with pytest.raises(Refused, match="100 tokens are drawn"):
        await world.restarted().admit(GATEWAY.id, voucher(2, 1).to_value())


async def test_a_session_that_begins_again_ends_what_was_left_of_it() -> None:
    world = GateWorld()
    paper = voucher()
    old = await world.gate.admit(GATEWAY.id, paper.to_value())
    old.reach(0, 50, 50)
    new = await world.gate.admit(GATEWAY.id, paper.to_value())
    old.close()  # too late: it is nobody's any more
    new.reach(50, 51, 51)  # the rest was kept
    new.close()
    served = world.book.session(paper.session)
    assert served is not None
    assert (served.opens, served.used, served.fed) == (2, 51, 51)


async def test_what_is_begun_again_is_computed_twice_at_most() -> None:
    world = GateWorld()
    paper = voucher(tokens=100)
    for _ in range(2):
        await world.serve(paper, 100)
    with pytest.raises(Refused, match="201 tokens were computed"):
        await world.serve(paper, 1)


async def test_a_step_cannot_go_back_to_another_text() -> None:
    world = GateWorld()
    budget = await world.gate.admit(GATEWAY.id, voucher().to_value())
    budget.reach(0, 10, 10)
    budget.reach(10, 11, 15)  # four guesses
    budget.reach(11, 12, 12)  # which were wrong
    for start in (11, 0):
        with pytest.raises(Misbehaviour, match="a step at"):
            budget.reach(start, 20, 20)


async def test_a_purchase_that_cannot_be_paid_buys_nothing_and_stays_undrawn() -> None:
    world = GateWorld(FakePurchases(frozenset({BUYER.account})))
    with pytest.raises(Refused):
        await world.serve(voucher(1), 1)
    world.purchases.poor = frozenset()
    await world.serve(voucher(2), 100)


async def test_a_chain_that_is_away_admits_nobody() -> None:
    class Away(FakePurchases):
        async def paid(self, purchase: Purchase, now: float) -> bool:
            raise Unavailable("the node is away")

    world = GateWorld(Away())
    with pytest.raises(Unavailable):
        await world.serve(voucher(1), 1)
    world.gate._purchases = FakePurchases()
    await world.serve(voucher(2), 100)


async def test_what_the_gateway_left_unsent_is_put_on_the_chain() -> None:
    world = GateWorld()
    await world.serve(voucher(1), 50)
    await world.gate.collect()
    assert not world.purchases.on_chain  # the gateway still has time
    world.clock.advance(6)
    await world.gate.collect()
    assert world.purchases.on_chain == {bought().name}


async def test_who_counts_on_a_worker_of_the_stage_before_signs_for_him() -> None:
    world = GateWorld(first=False)
    paper = voucher(1)
    await world.serve(paper, 50, peer=BEFORE.id)
    assert world.gate.ended == [(BEFORE.id, paper.session, 50)]


async def test_a_price_is_rounded_against_the_buyer() -> None:
    terms = Terms(RUN_ID, 1, TERMS.asset, "n", "1", TERMS.pay_to, 10, 3)
    assert [terms.cost_up(tokens) for tokens in (0, 1, 3, 4)] == [0, 4, 10, 14]
    with pytest.raises(Invalid):
        Terms(RUN_ID, 1, TERMS.asset, "n", "1", TERMS.pay_to, 0, 3)


def test_a_voucher_travels_and_comes_back_the_same() -> None:
    paper = voucher(3, 77)
    assert Voucher.from_value(TERMS, paper.to_value()) == paper
    paper.check(TERMS, NOW)
    with pytest.raises(Refused, match="ends at"):
        paper.check(TERMS, NOW + 300)
    with pytest.raises(Refused, match="ends at"):
        paper.check(TERMS, NOW + 299 - MAX_VALID_S)


def test_a_purchase_comes_from_what_x402_sends() -> None:
    purchase = bought()
    payload = {
        "authorization": {
            "from": purchase.payer, "to": TERMS.pay_to, "value": str(purchase.value), "validAfter": "0",
            "validBefore": str(purchase.valid_before), "nonce": "0x" + purchase.nonce.hex(),
        },
        "signature": "0x" + purchase.signature.hex(),
    }  # fmt: skip
    assert Purchase.from_x402(payload) == purchase
    assert Purchase.from_x402({**payload, "signature": "0x" + "00" * 97}) is None
