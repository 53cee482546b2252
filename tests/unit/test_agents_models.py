"""Models over HTTP: an OpenAI-compatible endpoint that asks for money is paid once for each question of a run."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from agents_world import AGENT, SELLER, close_ledgers, open_shop, units  # noqa: F401
from runtime_world import LATE, PAL, Desk, DyingLedger, Killed, close_desks  # noqa: F401
from tessera.agents.runtime.agent import Agent
from tessera.agents.runtime.models import PayingTransport, compatible
from tessera.agents.runtime.session import Runtime
from tessera.core.errors import Refused, Unavailable

pytestmark = pytest.mark.anyio
URL = "https://seller/v1"
CALL = {"id": "call_1", "type": "function",
        "function": {"name": "send_email", "arguments": json.dumps({"recipients": [PAL], "body": "late"})}}  # fmt: skip


def answer(request: httpx.Request) -> httpx.Response:
    """Calls a tool at first, then says that it is done."""
    asked = json.loads(request.content)
    assert asked["model"] == "small"
    done = any(message["role"] == "tool" for message in asked["messages"])
    message: dict[str, Any] = {"role": "assistant", "content": "done" if done else None}
    if not done:
        message["tool_calls"] = [CALL]
    choice = {"index": 0, "finish_reason": "stop" if done else "tool_calls", "message": message}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "small", "choices": [choice], "usage": usage}
    return httpx.Response(200, json=body)


def runtime(desk: Desk, transport: httpx.AsyncBaseTransport, ledger: Any = None) -> Runtime:
    model = compatible(URL, "small", transport=transport)
    agent = Agent("clerk", model, tools=desk.agent().tools)
    return Runtime(agent, ledger or desk.ledger, approvals=desk.approvals)


async def test_any_openai_compatible_endpoint_will_do() -> None:
    desk = Desk(":memory:", [])
    outcome = await runtime(desk, httpx.MockTransport(answer)).start(LATE)
    assert (outcome.state, outcome.output, desk.sent) == ("done", "done", [PAL])


async def test_an_endpoint_that_fails_leaves_the_run_to_be_resumed() -> None:
    desk = Desk(":memory:", [])
    with pytest.raises(Unavailable, match="go on later"):
        await runtime(desk, httpx.MockTransport(lambda request: httpx.Response(500))).start(LATE)
    (run,) = desk.ledger.runs()
    assert run.state == "open"
    assert (await runtime(desk, httpx.MockTransport(answer)).resume(run.id)).state == "done"


async def test_each_question_of_a_run_is_paid_once_whatever_is_killed(tmp_path: Any) -> None:
    shop = open_shop()
    shop.seller.prices = {"/v1/chat/completions": 40}
    honest = shop.seller.honest

    def sells(request: httpx.Request, payment: dict[str, Any] | None) -> httpx.Response:
        given = honest(request, payment)
        return answer(request) if given.status_code == 200 else given

    shop.seller.habit = sells
    desk, payer = Desk(tmp_path / "a.sqlite", []), shop.payer()
    paying = PayingTransport(payer, shop.mandate.id, units(100))
    dying = DyingLedger(desk.where, 1, clock=desk.clock)  # the first answer is paid for and not yet written down
    with pytest.raises(Killed):
        await runtime(desk, paying, dying).start(LATE)
    dying.close()
    assert len(shop.chain.payments) == 1
    (run,) = desk.ledger.runs()
    assert (await runtime(desk, paying).resume(run.id)).state == "done"
    assert shop.chain.payments == [(AGENT.account, SELLER, 40)] * 2  # two questions
    assert desk.sent == [PAL]
    await payer.aclose()


async def test_a_model_that_costs_more_than_allowed_is_not_asked() -> None:
    shop = open_shop()
    shop.seller.prices = {"/v1/chat/completions": 90}
    desk, payer = Desk(":memory:", []), shop.payer()
    with pytest.raises(Refused, match="at most 50"):
        await runtime(desk, PayingTransport(payer, shop.mandate.id, units(50))).start(LATE)
    assert shop.chain.payments == []
    await payer.aclose()
