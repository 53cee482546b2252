"""One approval is resumed twice, by two processes at once: a framework that replays a run does it by itself."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from typing import Any

import pytest

from agents_world import APPROVER, NOW, close_ledgers, make_intent, make_mandate, open_ledger  # noqa: F401
from tessera.agents.approvals import Approval, Approvals, Call, approve, payment_call
from tessera.agents.guard import Guard, NeedsApproval
from tessera.agents.intents import Intent
from tessera.agents.tools import infer
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Refused

PROCESSES = 6
CALL = Call("send_email", {"recipients": ["ann@x.org"]}, "11" * 32, "22" * 32)


def use(url: str, approval: Approval, start: Any, answers: Any) -> None:
    approvals = Approvals(APPROVER.account, url, clock=FakeClock(NOW))
    start.wait()
    try:
        approvals.use(approval, CALL)
        answers.put("used")
    except Conflict:
        answers.put("refused")
    approvals.close()


def reserve(url: str, approval: Approval, intent: Intent, start: Any, answers: Any) -> None:
    ledger = open_ledger(where=url)
    start.wait()
    answers.put(ledger.reserve(intent, approval=approval).state)
    ledger.close()


def at_once(target: Any, *arguments: Any) -> Counter[str]:
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=target, args=(*arguments, start, answers)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = Counter(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return found


@pytest.mark.slow
def test_processes_that_resume_at_once_use_it_once(database_url: str) -> None:
    approvals = Approvals(APPROVER.account, database_url, clock=FakeClock(NOW))
    approvals.request(CALL, {})
    approvals.close()
    assert at_once(use, database_url, approve(CALL, APPROVER, NOW + 60)) == {"used": 1, "refused": PROCESSES - 1}


def test_an_approved_payment_that_is_resumed_at_once_is_set_aside_once(database_url: str) -> None:
    mandate = make_mandate(approve_above=10)
    open_ledger(mandate, where=database_url).close()
    intent = make_intent(mandate)
    approval = approve(payment_call(intent, mandate), APPROVER, NOW + 60)
    assert at_once(reserve, database_url, approval, intent) == {"reserved": PROCESSES}
    ledger = open_ledger(where=database_url)
    assert (len(ledger.entries()), ledger.spent(mandate.id).units) == (1, 40)


def test_a_call_that_was_approved_elsewhere_runs_once_also_after_a_restart() -> None:
    approvals, done, tools = (
        Approvals(APPROVER.account, clock=FakeClock(NOW)),
        [],
        [infer("send_email", ["recipients"])],
    )
    before = Guard(tools, "Write somebody")
    with pytest.raises(NeedsApproval) as caught:
        before.call("send_email", dict(CALL.arguments), lambda tool, _: done.append(tool))
    decision = caught.value.decision
    call = Call(decision.tool, decision.arguments, nonce=decision.nonce)
    approvals.request(call, decision.evidence)
    approval = approve(approvals.find(call.digest).call, APPROVER, NOW + 60)

    def resume(arguments: Any) -> None:
        """In a process of its own."""
        same = Call("send_email", arguments, nonce=call.nonce)
        guard = Guard(tools, "Write somebody")
        guard.call_approved(
            "send_email", arguments, lambda tool, _: done.append(tool), lambda: approvals.use(approval, same)
        )

    resume(CALL.arguments)
    for arguments in (CALL.arguments, {"recipients": ["eve@x.org"]}):
        with pytest.raises((Conflict, Refused)):
            resume(arguments)
    stopped = Guard(tools, "Write somebody", stopped=lambda: True)
    with pytest.raises(Refused) as refused:
        stopped.call_approved("send_email", CALL.arguments, lambda tool, _: done.append(tool), lambda: None)
    assert (refused.value.rule, done) == ("stopped", ["send_email"])
    approvals.close()


def test_a_guard_runs_a_call_that_waited_once() -> None:
    done: list[str] = []
    guard = Guard([infer("send_email", ["recipients"])], "Write somebody")
    with pytest.raises(NeedsApproval) as caught:
        guard.call("send_email", dict(CALL.arguments), lambda tool, _: done.append(tool))
    guard.resume(caught.value.decision.digest, lambda tool, _: done.append(tool))
    with pytest.raises(Refused):
        guard.resume(caught.value.decision.digest, lambda tool, _: done.append(tool))
    assert done == ["send_email"]
