"""An agent hands its mandate down to many helpers, which together would pay more than it may."""

from __future__ import annotations

import pytest

from agents_world import AGENT, NOW, close_ledgers, key, make_intent, make_mandate, open_ledger  # noqa: F401
from tessera.agents.mandates import sign_mandate
from tessera.core.clock import FakeClock
from tessera.core.errors import Refused

HELPERS = [key(f"helper {number}") for number in range(6)]


def test_children_that_sum_to_more_than_their_parent_are_refused() -> None:
    root = make_mandate()
    ledger = open_ledger(root)
    for number, budget in enumerate((100, 100, 50)):
        ledger.open(sign_mandate(make_mandate(agent=HELPERS[number].account, parent=root.id, per_period=budget), AGENT))
    with pytest.raises(Refused) as caught:
        ledger.open(sign_mandate(make_mandate(agent=HELPERS[3].account, parent=root.id, per_period=1), AGENT))
    assert caught.value.rule == "child_sum"


def test_a_childs_budget_is_free_again_when_it_is_stopped_or_over() -> None:
    root, clock = make_mandate(), FakeClock(NOW)
    ledger = open_ledger(root, clock=clock)
    first = make_mandate(agent=HELPERS[0].account, parent=root.id)
    ledger.open(sign_mandate(first, AGENT))
    second = make_mandate(agent=HELPERS[1].account, parent=root.id, expires_at=NOW + 60)
    with pytest.raises(Refused):
        ledger.open(sign_mandate(second, AGENT))
    ledger.stop(first.id)
    ledger.open(sign_mandate(second, AGENT))
    clock.advance(60)
    ledger.open(sign_mandate(make_mandate(agent=HELPERS[2].account, parent=root.id), AGENT))


def test_what_a_stopped_child_has_spent_still_counts_above() -> None:
    root = make_mandate()
    ledger = open_ledger(root)
    for number in range(6):  # a new child for each payment
        child = make_mandate(agent=HELPERS[number].account, parent=root.id)
        ledger.open(sign_mandate(child, AGENT))
        try:
            ledger.reserve(make_intent(child, number, 100))
        except Refused as error:
            assert error.rule == "per_period"  # noqa: PT017
        ledger.stop(child.id)
    assert ledger.spent(root.id).units == 200


def test_a_grandchild_is_bound_by_everyone_above() -> None:
    root = make_mandate()
    ledger = open_ledger(root)
    child = make_mandate(agent=HELPERS[0].account, parent=root.id, per_payment=30, per_period=60, approve_above=30)
    ledger.open(sign_mandate(child, AGENT))
    with pytest.raises(Refused) as caught:
        ledger.open(
            sign_mandate(
                make_mandate(agent=HELPERS[1].account, parent=child.id, per_payment=31, per_period=60), HELPERS[0]
            )
        )
    assert caught.value.rule == "child_per_payment"
