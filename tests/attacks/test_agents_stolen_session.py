"""AIXBT, 18 March 2025: somebody got into the operator's dashboard and queued two tips; the agent paid 55.5 ETH.

Here the thief holds the operator's whole session: ledger, guard, the agent's own signing key. What he lacks are the
payer's key, in a drawer, and the approver's, on a phone.
"""

from __future__ import annotations

import pytest

from agents_world import (  # noqa: F401
    AGENT,
    APPROVER,
    ATTACKER,
    NOW,
    PAYER,
    close_ledgers,
    make_intent,
    make_mandate,
    open_ledger,
)  # fmt: skip
from tessera.agents.approvals import approve, payment_call
from tessera.agents.mandates import sign_mandate
from tessera.core.errors import Invalid, Refused

TIP = 27_750_000


@pytest.mark.parametrize("signer", [AGENT, ATTACKER], ids=["agent's key", "his own key"])
def test_two_queued_tips_pay_nothing(signer: object) -> None:
    mandate = make_mandate(per_payment=100_000_000, per_period=200_000_000, approve_above=1_000_000, any_payee=True)
    ledger = open_ledger(mandate)
    for number in range(2):
        tip = make_intent(mandate, f"tip {number}", TIP, payee=ATTACKER.account)
        with pytest.raises(Refused) as caught:
            ledger.reserve(tip)
        assert caught.value.rule == "approval"
        forged = approve(payment_call(tip, mandate), signer, NOW + 60)  # type: ignore[arg-type]
        with pytest.raises(Refused) as caught:
            ledger.reserve(tip, approval=forged)
        assert caught.value.rule == "not_the_approver"
    assert ledger.entries() == []


def test_a_session_cannot_write_itself_a_wider_mandate() -> None:
    ledger = open_ledger(make_mandate())
    wide = make_mandate(per_payment=10**9, per_period=10**9, approve_above=10**9, any_payee=True)
    for thief in (AGENT, ATTACKER, APPROVER):
        with pytest.raises(Invalid, match="is signed by"):
            ledger.open(sign_mandate(wide, thief))
    child = make_mandate(agent=ATTACKER.account, parent=make_mandate().id, any_payee=True)
    with pytest.raises(Refused) as caught:
        ledger.open(sign_mandate(child, AGENT))
    assert caught.value.rule == "child_payees"


def test_small_tips_stay_within_the_cap_of_the_period() -> None:
    mandate = make_mandate(any_payee=True)
    ledger, taken = open_ledger(mandate), 0
    for number in range(60):
        amount = (100, 33, 1)[number % 3]
        try:
            taken += ledger.reserve(make_intent(mandate, number, amount, payee=ATTACKER.account)).intent.amount.units
        except Refused as error:
            assert error.rule == "per_period"  # noqa: PT017
    assert taken == mandate.per_period.units == 250


def test_the_session_can_still_stop_everything() -> None:
    ledger = open_ledger(mandate := make_mandate())
    ledger.stop(reason="the dashboard was stolen")
    with pytest.raises(Refused, match="stolen"):
        ledger.reserve(make_intent(mandate))
    with pytest.raises(Refused):
        ledger.open(sign_mandate(make_mandate(salt="01" * 32), PAYER))
