"""A person allows a harmless call; before it runs, its arguments, its price or its payee are other ones."""

from __future__ import annotations

import pytest

from agents_world import (  # noqa: F401
    APPROVER,
    ATTACKER,
    NOW,
    close_ledgers,
    make_intent,
    make_mandate,
    open_ledger,
)  # fmt: skip
from tessera.agents.approvals import Approvals, Call, approve, payment_call
from tessera.agents.guard import Guard, NeedsApproval
from tessera.agents.tools import infer
from tessera.core.clock import FakeClock
from tessera.core.errors import Refused

GOOD = {"recipients": ["ann@x.org"], "body": "hello"}


@pytest.mark.parametrize(
    "changed",
    [
        Call("send_email", {**GOOD, "recipients": ["eve@x.org"]}, "11" * 32, "22" * 32),
        Call("send_email", {**GOOD, "bcc": ["eve@x.org"]}, "11" * 32, "22" * 32),
        Call("forward_email", GOOD, "11" * 32, "22" * 32),
        Call("send_email", GOOD, "12" * 32, "22" * 32),
        Call("send_email", GOOD, "11" * 32, "23" * 32),
    ],
)
def test_an_approval_is_for_one_call_and_no_other(changed: Call) -> None:
    approvals = Approvals(APPROVER.account, clock=FakeClock(NOW))
    call = Call("send_email", GOOD, "11" * 32, "22" * 32)
    approvals.request(call, {})
    approval = approve(call, APPROVER, NOW + 60)
    with pytest.raises(Refused) as caught:
        approvals.use(approval, changed)
    assert caught.value.rule == "other_call"
    relabelled = approval.__class__(changed.digest, approval.expires_at, approval.signature)
    with pytest.raises(Refused) as caught:
        approvals.use(relabelled, changed)
    assert caught.value.rule == "not_the_approver"
    approvals.use(approval, call)
    approvals.close()


def test_an_approved_payment_cannot_become_a_dearer_one_or_somebody_elses() -> None:
    mandate = make_mandate(approve_above=10, any_payee=True)
    ledger = open_ledger(mandate)
    approval = approve(payment_call(make_intent(mandate), mandate), APPROVER, NOW + 60)
    for changed in (
        make_intent(mandate, amount=41), make_intent(mandate, payee=ATTACKER.account), make_intent(mandate, "other"),
        make_intent(mandate, resource="GET https://seller/dear"),
    ):  # fmt: skip
        with pytest.raises(Refused):
            ledger.reserve(changed, approval=approval)
    assert ledger.entries() == []


def test_the_call_that_waits_is_the_one_that_runs() -> None:
    recipients, done = ["ann@x.org"], []
    guard = Guard([infer("send_email", ["recipients"])], "Write somebody")
    with pytest.raises(NeedsApproval) as caught:
        guard.call("send_email", {"recipients": recipients}, lambda tool, arguments: done.append(arguments))
    recipients[0] = "eve@x.org"
    guard.resume(caught.value.decision.digest, lambda tool, arguments: done.append(arguments))
    assert done == [{"recipients": ["ann@x.org"]}]
