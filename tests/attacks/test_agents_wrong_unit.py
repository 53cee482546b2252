"""Lobstar Wilde, 22 February 2026: an agent that had lost its state sent 5 % of a token's supply to a beggar."""

from __future__ import annotations

from typing import Any

import pytest

from agents_world import SELLER, close_ledgers, make_intent, make_mandate, open_ledger, units  # noqa: F401
from tessera.agents.guard import Guard
from tessera.agents.mandates import asset_id
from tessera.agents.tools import Source, infer
from tessera.core.amount import Amount
from tessera.core.errors import Invalid, Refused, UnitMismatch

MILLION = 10**6


def test_an_amount_in_the_smallest_unit_of_another_coin_is_no_amount_of_this_one() -> None:
    mandate = make_mandate()
    ledger = open_ledger(mandate)
    other = asset_id(31_337, SELLER)
    with pytest.raises(UnitMismatch):
        ledger.reserve(make_intent(mandate, amount=4).__class__("11" * 32, mandate.id, SELLER, Amount(4, other), "x"))
    for wrong in (4.0, "4", True):
        with pytest.raises(Invalid):
            Amount(wrong, mandate.asset)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [10, 1_000, MILLION, 10**12])
def test_an_amount_that_is_off_by_a_power_of_ten_is_above_a_cap(factor: int) -> None:
    mandate = make_mandate(per_payment=300, per_period=2_000, approve_above=300)
    with pytest.raises(Refused) as caught:
        open_ledger(mandate).reserve(make_intent(mandate, amount=40 * factor))
    assert caught.value.rule == "per_payment"


def test_five_in_a_hundred_of_the_balance_is_refused_where_one_is_the_limit() -> None:
    mandate = make_mandate(per_payment=2**100, per_period=2**100, approve_above=2**100, balance_bps=100)
    ledger = open_ledger(mandate)
    with pytest.raises(Refused) as caught:
        ledger.reserve(make_intent(mandate, amount=52_400_000), balance=units(1_048_000_000))
    assert caught.value.rule == "balance"
    for part in range(10):  # nor in ten pieces
        ledger.reserve(make_intent(mandate, part, 1_048_000), balance=units(1_048_000_000))
    with pytest.raises(Refused):
        ledger.reserve(make_intent(mandate, "one more", 1), balance=units(1_048_000_000))


@pytest.mark.parametrize("amount", [4.0 * MILLION, 52_400_000.0, 4.01, 0.0, -4.0])
def test_the_guard_asks_for_an_amount_that_nobody_said(amount: float) -> None:
    guard = Guard(
        [infer("send_token", ["to", "amount"]), infer("transfer", ["to", "amount"])], "Give 4 SOL to 'beggar.sol'"
    )
    assert guard.decide("transfer", {"to": "beggar.sol", "amount": 4.0}).answer == "allow"
    assert guard.decide("transfer", {"to": "beggar.sol", "amount": amount}).answer == "ask"


def test_a_large_part_of_the_balance_is_asked_for_also_as_an_amount_paid_before() -> None:
    tools = [infer("transfer", ["to", "amount"]), infer("get_balance", [], Source(author="own", balance=True)),
             infer("get_payments", [], Source(author="sender", paid=("recipient",)))]  # fmt: skip
    guard = Guard(tools, "Pay 'ann.sol'", me=["me"])
    rows: list[dict[str, Any]] = [{"sender": "me", "recipient": "landlord.sol", "amount": 900.0}]
    guard.knowledge.learn(tools[2], {}, rows)
    guard.knowledge.learn(tools[1], {}, 1_000.0)
    decision = guard.decide("transfer", {"to": "ann.sol", "amount": 900.0})
    assert (decision.answer, decision.verdict.rules) == ("ask", ("share_of_balance",))
