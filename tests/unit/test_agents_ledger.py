"""The ledger of intents, on both databases."""

from __future__ import annotations

import pytest
from sqlalchemy import delete, update

from agents_world import (
    AGENT,
    APPROVER,
    ATTACKER,
    NOW,
    OPENED,
    PAYER,
    SELLER,
    close_ledgers,  # noqa: F401
    key,
    make_intent,
    make_mandate,
    open_ledger,
    units,
)
from tessera.agents import tables
from tessera.agents.approvals import Approvals, Call, approve, payment_call
from tessera.agents.ledger import IntentLedger, Signing
from tessera.agents.mandates import Spent, sign_mandate
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Late, Missing, Refused, TesseraError

SIGNING = Signing(NOW + 60, 7)
DAY = 86_400


def test_an_intent_goes_from_reserved_to_signed_to_consumed(database_url: str) -> None:
    mandate = make_mandate()
    ledger = open_ledger(mandate, where=database_url)
    intent = make_intent(mandate)
    assert ledger.find(intent.id) is None
    assert ledger.reserve(intent).state == "reserved"
    assert ledger.reserve(intent).state == "reserved"
    assert ledger.spent(mandate.id) == Spent(pending=40)
    assert ledger.sign(intent.id, SIGNING) == SIGNING
    assert ledger.sign(intent.id, Signing(NOW + 30, 9)) == SIGNING, "an older signature may still be used"
    assert ledger.sign(intent.id, Signing(NOW + 90, 9)) == Signing(NOW + 90, 7)
    assert ledger.consume(intent.id, "0xaa").state == "consumed"
    assert ledger.consume(intent.id).note == "0xaa"
    assert ledger.spent(mandate.id) == Spent(paid=40)
    with pytest.raises(Conflict):
        ledger.release(intent.id, "no", seen=None)
    with pytest.raises(Conflict):
        ledger.sign(intent.id, Signing(NOW + 900, 9))
    assert [entry.state for entry in ledger.entries()] == ["consumed"]
    assert ledger.entries(open_only=True) == []


def test_what_is_released_is_free_again_and_over_for_good(database_url: str) -> None:
    mandate = make_mandate()
    ledger = open_ledger(mandate, where=database_url)
    intent = make_intent(mandate)
    ledger.reserve(intent)
    ledger.sign(intent.id, SIGNING)
    with pytest.raises(Conflict, match="signed since"):
        ledger.release(intent.id, "never signed", seen=None)
    ledger.release(intent.id, "expired", seen=SIGNING)
    assert ledger.spent(mandate.id) == Spent()
    for again in (
        lambda: ledger.reserve(intent),
        lambda: ledger.consume(intent.id),
        lambda: ledger.sign(intent.id, SIGNING),
    ):
        with pytest.raises(Conflict):
            again()


def test_a_known_intent_has_one_set_of_terms(database_url: str) -> None:
    mandate, other = make_mandate(), make_mandate(salt="01" * 32)
    ledger = open_ledger(mandate, other, where=database_url)
    ledger.reserve(make_intent(mandate))
    for changed in (
        make_intent(mandate, amount=41), make_intent(mandate, payee=ATTACKER.account), make_intent(other),
        make_intent(mandate, resource="GET https://seller/dear"), make_intent(mandate, purpose="else"),
    ):  # fmt: skip
        with pytest.raises(Refused) as caught:
            ledger.reserve(changed)
        assert caught.value.rule == "changed_terms"
    assert ledger.spent(mandate.id) == Spent(pending=40)


def test_the_cap_of_a_period_counts_what_is_pending_and_slides(database_url: str) -> None:
    clock, mandate = FakeClock(NOW - NOW % DAY), make_mandate()
    ledger = open_ledger(mandate, where=database_url, clock=clock)
    for name in range(2):
        ledger.reserve(make_intent(mandate, name, 100))
    clock.advance(10 * DAY)
    with pytest.raises(Refused) as caught:
        ledger.reserve(make_intent(mandate, 2, 51))
    assert caught.value.rule == "per_period", "what is pending counts however old it is"
    for name in range(2):
        ledger.sign(make_intent(mandate, name, 100).id, SIGNING)
        ledger.consume(make_intent(mandate, name, 100).id)
    clock.advance(DAY + DAY // 6 - 1)
    with pytest.raises(Refused):
        ledger.reserve(make_intent(mandate, 2, 51))
    clock.advance(1)
    ledger.reserve(make_intent(mandate, 2, 51))


def test_a_child_counts_against_every_mandate_above(database_url: str) -> None:
    root = make_mandate()
    ledger = open_ledger(root, where=database_url)
    child = make_mandate(agent=ATTACKER.account, parent=root.id, per_period=150)
    grandchild = make_mandate(agent=key("third").account, parent=child.id, per_period=150)
    ledger.open(sign_mandate(child, AGENT))
    ledger.open(sign_mandate(grandchild, ATTACKER))
    ledger.reserve(make_intent(root, "own", 100))
    ledger.reserve(make_intent(root, "own too", 100))
    ledger.reserve(make_intent(grandchild, "small", 50))
    assert [ledger.spent(m.id).units for m in (root, child, grandchild)] == [250, 50, 50]
    with pytest.raises(Refused) as caught:
        ledger.reserve(make_intent(grandchild, "one unit", 1))
    assert caught.value.rule == "per_period"


def test_a_mandate_is_taken_only_with_a_right_signature_and_its_parent(database_url: str) -> None:
    ledger, mandate = open_ledger(where=database_url), make_mandate()
    with pytest.raises(Invalid, match="is signed by"):
        ledger.open(sign_mandate(mandate, ATTACKER))
    with pytest.raises(Missing):
        ledger.open(sign_mandate(make_mandate(parent="11" * 32), AGENT))
    with pytest.raises(Missing):
        ledger.reserve(make_intent(mandate))
    ledger.open(sign_mandate(mandate, PAYER))
    ledger.open(sign_mandate(mandate, PAYER))
    assert ledger.mandates() == [mandate]


def test_a_stop_is_for_good_and_stops_the_children(database_url: str) -> None:
    root, other = make_mandate(), make_mandate(salt="01" * 32)
    ledger = open_ledger(root, other, where=database_url)
    child = make_mandate(agent=ATTACKER.account, parent=root.id)
    ledger.open(sign_mandate(child, AGENT))
    intent = make_intent(child)
    ledger.reserve(intent)
    ledger.stop(root.id, "strange payments")
    for work in (
        lambda: ledger.reserve(make_intent(child, "new")), lambda: ledger.sign(intent.id, SIGNING),
        lambda: ledger.check_running(child.id), lambda: ledger.check_running(root.id),
    ):  # fmt: skip
        with pytest.raises(Refused) as caught:
            work()
        assert caught.value.rule == "stopped"
    ledger.check_running(other.id)
    assert (ledger.is_stopped(root.id), ledger.is_stopped(other.id)) == (True, False)
    ledger.stop()
    with pytest.raises(Refused):
        ledger.check_running(other.id)
    with pytest.raises(Refused):
        ledger.open(sign_mandate(make_mandate(salt="02" * 32), PAYER))


def test_the_database_itself_keeps_every_row(database_url: str) -> None:
    mandate = make_mandate()
    ledger = open_ledger(mandate, where=database_url)
    ledger.reserve(make_intent(mandate))
    for statement in (update(tables.CHARGES).values(units="0"), delete(tables.INTENTS)):
        with pytest.raises(TesseraError):
            ledger._db.apply(lambda db, statement=statement: db.execute(statement))
    assert ledger.spent(mandate.id) == Spent(pending=40)


def test_above_the_threshold_the_approver_must_sign_the_payment(database_url: str) -> None:
    mandate = make_mandate(approve_above=50)
    ledger = open_ledger(mandate, where=database_url)
    intent = make_intent(mandate, amount=51)
    with pytest.raises(Refused) as caught:
        ledger.reserve(intent)
    assert caught.value.rule == "approval"
    call = payment_call(intent, mandate)
    for approval, error in (
        (approve(call, ATTACKER, NOW + 60), Refused),
        (approve(call, APPROVER, NOW), Late),
        (approve(payment_call(make_intent(mandate, amount=52), mandate), APPROVER, NOW + 60), Refused),
        (approve(payment_call(make_intent(mandate, "b", 51), mandate), APPROVER, NOW + 60), Refused),
    ):
        with pytest.raises(error):
            ledger.reserve(intent, approval=approval)
    good = approve(call, APPROVER, NOW + 60)
    assert ledger.reserve(intent, approval=good).state == "reserved"
    assert ledger.reserve(intent, approval=good).state == "reserved"
    assert ledger.spent(mandate.id).units == 51


def test_a_refused_payment_leaves_its_approval_unused() -> None:
    clock = FakeClock(NOW)
    mandate = make_mandate(approve_above=50)
    ledger = open_ledger(mandate, clock=clock)
    for name in range(2):
        ledger.reserve(make_intent(mandate, f"small {name}", 50))
    for name in range(2):
        ledger.reserve(make_intent(mandate, f"medium {name}", 45))
    intent = make_intent(mandate, amount=100)
    approval = approve(payment_call(intent, mandate), APPROVER, NOW + 60)
    with pytest.raises(Refused, match="left in this period"):
        ledger.reserve(intent, approval=approval)
    ledger.release(make_intent(mandate, "small 0", 50).id, "changed my mind", seen=None)
    assert ledger.reserve(intent, approval=approval).state == "reserved"


def test_a_share_of_the_balance_is_capped() -> None:
    mandate = make_mandate(balance_bps=500)
    ledger = open_ledger(mandate)
    with pytest.raises(Refused) as caught:
        ledger.reserve(make_intent(mandate, amount=40), balance=units(799))
    assert caught.value.rule == "balance"
    ledger.reserve(make_intent(mandate, amount=40), balance=units(800))


def test_an_approval_is_asked_for_and_used_once(database_url: str) -> None:
    approvals = Approvals(APPROVER.account, database_url, clock=FakeClock(NOW))
    OPENED.append(approvals)  # type: ignore[arg-type]
    call = Call("send_email", {"to": "pal@example.com", "body": "hello"})
    request = approvals.request(call, {"why": "an outside page names the address"})
    assert approvals.pending() == [request] == [approvals.find(call.digest)]
    approval = approve(call, APPROVER, NOW + 60)
    changed = Call(call.tool, {"to": "attacker@example.com", "body": "hello"}, call.mandate, call.nonce)
    with pytest.raises(Refused) as caught:
        approvals.use(approval, changed)
    assert caught.value.rule == "other_call"
    with pytest.raises(Refused):
        approvals.use(approve(call, ATTACKER, NOW + 60), call)
    approvals.use(approval, call)
    with pytest.raises(Conflict):
        approvals.use(approval, call)
    assert approvals.pending() == []
    denied = Call("send_email", {})
    approvals.request(denied, {})
    approvals.deny(denied.digest)
    with pytest.raises(Conflict):
        approvals.use(approve(denied, APPROVER, NOW + 60), denied)
    with pytest.raises(Missing):
        approvals.deny("00" * 32)
    with pytest.raises(Invalid):
        approvals.request(Call("x", {"object": object()}), {})


def test_what_was_written_beside_the_ledger_is_no_mandate() -> None:
    mandate = make_mandate()
    ledger = open_ledger(mandate)
    forged = sign_mandate(make_mandate(any_payee=True, per_payment=2**100, per_period=2**100), ATTACKER)
    row = {"id": forged.mandate.id, "parent": "", "signed": forged.encode(), "at_ms": 0}
    ledger._db.apply(lambda db: db.add(tables.MANDATES, [row]))
    with pytest.raises(Invalid, match="is signed by"):
        ledger.reserve(make_intent(forged.mandate, payee=ATTACKER.account))


def test_amounts_larger_than_a_database_integer_are_counted_exactly(database_url: str) -> None:
    mandate = make_mandate(per_payment=2**127, per_period=2**127 + 2**126, approve_above=2**127)
    ledger = open_ledger(mandate, where=database_url)
    ledger.reserve(make_intent(mandate, "a", 2**126 + 1))
    with pytest.raises(Refused):
        ledger.reserve(make_intent(mandate, "b", 2**127))
    ledger.reserve(make_intent(mandate, "c", 2**127 - 1))
    assert ledger.spent(mandate.id).units == 2**127 + 2**126


def test_a_ledger_in_a_file_is_there_after_a_restart(tmp_path: object) -> None:
    mandate, file = make_mandate(), f"{tmp_path}/books.sqlite"
    ledger = open_ledger(mandate, where=file)
    ledger.reserve(make_intent(mandate))
    ledger.close()
    again = IntentLedger(file, clock=FakeClock(NOW))
    assert [entry.intent.payee for entry in again.entries()] == [SELLER]
    again.close()
