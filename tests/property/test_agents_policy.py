"""The mandate's Python checker and the contract's twin say the same about every payment; the twin is the contract's."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agents_world import AGENT, APPROVER, ATTACKER, NOW, PAYER, SELLER, key, make_mandate, units
from tessera.agents.mandates import NOBODY, Mandate, Spent, check_payment, tick_of
from tessera.agents.onchain import compile_mandate, policy_id
from tessera.core.errors import Refused, TesseraError
from tessera.incentives.spend_twin import Payment, SpendTwin

REASONS = {
    "mandate_expired": "mandate is expired", "payee": "payee is not listed", "per_payment": "above the cap per payment",
    "per_period": "above the cap per period", "approval": "needs the co-signer",
}  # fmt: skip
caps = st.integers(0, 60)
mandates = st.builds(
    lambda **fields: make_mandate(**fields),
    per_payment=caps, per_period=st.integers(0, 120), approve_above=caps, period_s=st.sampled_from((60, 600, 86_400)),
    expires_at=st.integers(NOW - 1, NOW + 90_000), any_payee=st.booleans(), payees=st.sampled_from(((), (SELLER,))),
    approver=st.sampled_from((APPROVER.account, NOBODY)),
)  # fmt: skip
payments = st.lists(
    st.tuples(st.integers(1, 70), st.sampled_from((SELLER, ATTACKER.account)), st.booleans(), st.integers(0, 30_000)),
    max_size=25,
)


def python_says(mandate: Mandate, paid: list[tuple[int, int]], now: int, amount: int, payee: Any, signed: bool) -> str:
    first = tick_of(now, mandate.period_s) - 6
    spent = Spent(paid=sum(units for when, units in paid if tick_of(when, mandate.period_s) >= first))
    try:
        check_payment(mandate, payee, units(amount), "", spent=spent, now=now, approved=signed)
    except Refused as error:
        return REASONS[error.rule]
    return "paid"


@given(mandates, payments)
@settings(max_examples=100)
def test_both_refuse_the_same_payments_for_the_same_reason(mandate: Mandate, tries: list[Any]) -> None:
    twin, compiled = SpendTwin(), compile_mandate(mandate)
    id = policy_id([mandate])
    twin.open(id, PAYER.account, compiled.terms, compiled.limits, compiled.payees)
    paid: list[tuple[int, int]] = []
    now = NOW
    for number, (amount, payee, signed, wait) in enumerate(tries):
        now += wait
        payment = Payment(id, payee, amount, number.to_bytes(32, "big"), bytes(32), now - 1, now + 1)
        try:
            twin.spend(payment, AGENT.account, mandate.approver if signed else None, now)
            answer = "paid"
        except TesseraError as error:
            answer = error.message.removeprefix("spend_policy: ")
        assert python_says(mandate, paid, now, amount, payee, signed) == answer
        if answer == "paid":
            paid.append((now, amount))


def test_a_childs_id_is_that_of_the_contract() -> None:
    from tessera.chain.spending import child_id, mandate_id

    root = make_mandate()
    child = make_mandate(agent=key("child").account, parent=root.id)
    above = mandate_id(PAYER.account, bytes.fromhex(root.id))
    assert policy_id([child, root]) == child_id(above, bytes.fromhex(child.id))
