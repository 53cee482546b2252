"""The questions of agents on a page: what would happen and why it is asked, deny, or allow with the approver's wallet.

The page holds no key. A yes is the approver's signature (EIP-712) over the very call, made by a wallet in the browser;
a no needs none. Whoever gets at the page, or runs it, can deny and nothing else.

Invariants: a POST counts only when it comes from this very page (host, origin, JSON); bodies are bounded; what agents
and strangers wrote is text; no script that is not ours runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tessera.agents.approvals import Approval, Approvals
from tessera.agents.approvals import Request as Question
from tessera.agents.questions import facts_of
from tessera.core.errors import Invalid, Missing, Refused, TesseraError
from tessera.web.page import SECURITY_HEADERS, OwnFiles, html_answer
from tessera.web.render import STATIC, Renderer

__all__ = ["AgentQuestions", "mount_questions"]

LIFE_S = 3_600  # how long a yes is good
BODY_LIMIT = 4_096  # bytes
LOCAL = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class AgentQuestions:
    """The questions of one agent."""

    agent: str
    approvals: Approvals


def mount_questions(
    app: FastAPI, agents: Sequence[AgentQuestions], *, now: Callable[[], float] = time.time
) -> None:  # fmt: skip
    """Add to `app`: `GET /` the page · `GET /api/questions` · `POST /api/questions/{agent}/{call}/deny` and `/allow`.

    Args:
        agents: read anew at every request, so that a list may grow.
    """
    desk = _Desk(agents, now)
    app.add_api_route("/", desk.page, methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    app.add_api_route("/api/questions", desk.state, methods=["GET"], response_model=None)
    for answer in (desk.deny, desk.allow):
        path = f"/api/questions/{{agent}}/{{call}}/{answer.__name__}"
        app.add_api_route(path, answer, methods=["POST"], response_model=None)
    app.mount("/static", OwnFiles(directory=STATIC), name="static")


class _Desk:
    def __init__(self, agents: Sequence[AgentQuestions], now: Callable[[], float]) -> None:
        self._agents, self._now = agents, now
        self._renderer = Renderer()

    async def page(self, request: Request) -> Response:
        try:
            _check_host(request)
            waiting = await to_thread.run_sync(self._waiting)
        except TesseraError as error:
            return _failed(error)
        text = self._renderer.questions(waiting=waiting)
        return html_answer(text)

    async def state(self, request: Request) -> Response:
        try:
            _check_host(request)
            return _json(await to_thread.run_sync(self._waiting))
        except TesseraError as error:
            return _failed(error)

    async def deny(self, request: Request, agent: str, call: str) -> Response:
        try:
            await _body(request)
            approvals = self._of(agent)
            await to_thread.run_sync(approvals.deny, call)
        except TesseraError as error:
            return _failed(error)
        return _json({"answer": "denied"})

    async def allow(self, request: Request, agent: str, call: str) -> Response:
        try:
            approval = _approval(call, await _body(request))
            approvals = self._of(agent)
            if approval.expires_at > self._now() + LIFE_S + 60:
                raise Invalid(f"a yes is good for at most {LIFE_S} s")
            await to_thread.run_sync(approvals.grant, approval)
        except TesseraError as error:
            return _failed(error)
        return _json({"answer": "allowed"})

    def _waiting(self) -> list[dict[str, Any]]:
        expires_at = int(self._now()) + LIFE_S
        return [
            _form(one.agent, one.approvals, question, expires_at)
            for one in self._agents
            for question in one.approvals.pending()
        ]

    def _of(self, agent: str) -> Approvals:
        found = next((one.approvals for one in self._agents if one.agent == agent), None)
        if found is None:
            raise Missing(f"there is no agent {agent[:64]!r} here")
        return found


def _form(agent: str, approvals: Approvals, question: Question, expires_at: int) -> dict[str, Any]:
    return {
        "agent": agent, "call": question.call.digest, "approver": approvals.approver, "facts": facts_of(question),
        "asked_until": question.expires_at, "expires_at": expires_at,
        "typed_data": question.call.typed_data(expires_at),
    }  # fmt: skip


def _check_host(request: Request) -> None:
    """Only under a name of this machine: another site's name that leads here is somebody else's page."""
    name = urlsplit(f"//{request.headers.get('host', '')}")
    if f"{name.hostname}" not in ("127.0.0.1", "localhost", "::1"):
        raise Refused(f"this page answers to {', '.join(LOCAL)} only", rule="host")


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object from this page. Raises: Refused for what another site sends; Invalid."""
    _check_host(request)
    origin = request.headers.get("origin", "")
    if (
        urlsplit(origin).netloc != request.headers.get("host")
        or request.headers.get("content-type") != "application/json"
    ):
        raise Refused("an answer comes from this page, as JSON", rule="origin")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY_LIMIT:
            raise Invalid(f"an answer has at most {BODY_LIMIT} bytes")
    try:
        body = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise Invalid("an answer is JSON") from error
    if not isinstance(body, dict):
        raise Invalid("an answer is a JSON object")
    return body


def _approval(call: str, body: dict[str, Any]) -> Approval:
    expires_at, text = body.get("expires_at"), body.get("signature")
    try:
        signature = bytes.fromhex(text.removeprefix("0x")) if isinstance(text, str) else b""
    except ValueError as error:
        raise Invalid("a signature is hex") from error
    if type(expires_at) is not int or not 0 < expires_at < 2**40 or len(signature) != 65:
        raise Invalid("a yes has an expires_at in seconds and a signature of 65 bytes")
    return Approval(call, expires_at, signature)


def _json(value: Any) -> Response:
    return JSONResponse(value, headers={**SECURITY_HEADERS, "cache-control": "no-store"})


def _failed(error: TesseraError) -> Response:
    return JSONResponse(
        {"error": error.to_dict()}, error.status, headers={**SECURITY_HEADERS, "cache-control": "no-store"}
    )
