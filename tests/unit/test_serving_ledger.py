"""The memory of payments in flight, owed and in doubt."""

from __future__ import annotations

import pytest

from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.serving.ledger import MAX_REMEMBERED, REMEMBER_S, PaymentLedger, PaymentName
from tessera.serving.offers import Offer

NAME = PaymentName("0xa", "0x1")


def make_ledger(**settings: int) -> tuple[PaymentLedger, FakeClock]:
    clock = FakeClock()
    return PaymentLedger(clock, max_held_per_payer=settings.get("max_held_per_payer", 2)), clock


def test_a_payment_is_held_once_at_a_time() -> None:
    ledger, _ = make_ledger()
    ledger.hold(NAME)
    with pytest.raises(Conflict):
        ledger.hold(NAME)
    ledger.release(NAME)
    ledger.hold(NAME)
    assert ledger.held == 1


def test_one_payer_holds_a_few_payments_and_others_are_not_hindered() -> None:
    ledger, _ = make_ledger()
    ledger.hold(PaymentName("0xa", "0x1"))
    ledger.hold(PaymentName("0xa", "0x2"))
    with pytest.raises(Unavailable):
        ledger.hold(PaymentName("0xa", "0x3"))
    ledger.hold(PaymentName("0xb", "0x3"))
    ledger.release(PaymentName("0xa", "0x1"))
    ledger.hold(PaymentName("0xa", "0x3"))


def test_what_is_owed_is_recalled_for_the_same_request_until_forgotten_or_old() -> None:
    ledger, clock = make_ledger()
    ledger.remember(NAME, "owed", b"request")
    assert ledger.recall(NAME, b"request") == "owed"
    assert ledger.recall(NAME, b"another") is None
    clock.advance(REMEMBER_S + 1)
    assert ledger.recall(NAME, b"request") is None
    ledger.remember(NAME, "doubtful", b"request")
    ledger.forget(NAME)
    assert ledger.recall(NAME, b"request") is None


def test_memories_are_bounded_and_the_oldest_goes_first() -> None:
    ledger, _ = make_ledger()
    for index in range(MAX_REMEMBERED + 1):
        ledger.remember(PaymentName("0xa", str(index)), "owed", b"r")
    assert ledger.recall(PaymentName("0xa", "0"), b"r") is None
    assert ledger.recall(PaymentName("0xa", "1"), b"r") == "owed"


@pytest.mark.parametrize("units", [0, -1, 1.5, True])
def test_a_price_is_a_positive_integer(units: int) -> None:
    account = "0x" + "11" * 20
    with pytest.raises(Invalid, match="positive integer"):
        Offer("eip155:1", account, "USD", "1", units, account, 60)  # type: ignore[arg-type]
