"""The page of agents' questions: shows text as text, denies, and takes a yes only with the approver's signature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from eth_account import Account as Wallet
from eth_account.messages import encode_typed_data
from fastapi import FastAPI
from starlette.testclient import TestClient

from agents_world import APPROVER, ATTACKER, NOW
from tessera.agents.approvals import Approvals, Call
from tessera.core.clock import FakeClock
from tessera.web.questions import AgentQuestions, mount_questions

HOST = "http://127.0.0.1:8412"
CALL = Call("send_email", {"recipients": ["<script>alert(1)</script>"], "body": "\" onload='x'"}, nonce="11" * 32)


class Page:
    def __init__(self) -> None:
        self.approvals = Approvals(APPROVER.account, clock=FakeClock(NOW))
        self.approvals.request(CALL, {"rules": ["recipient_not_named"], "to": {"x": "outside"}, "run": "ab"})
        app = FastAPI()
        mount_questions(app, [AgentQuestions("clerk", self.approvals)], now=lambda: NOW)
        self.client = TestClient(app, base_url=HOST)

    def post(self, answer: str, body: Any = None, call: str = CALL.digest, agent: str = "clerk", **headers: str) -> int:
        sent = {"origin": HOST} | headers
        path = f"/api/questions/{agent}/{call}/{answer}"
        return self.client.post(path, json=body or {}, headers=sent).status_code


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page()
    yield page
    page.approvals.close()


def signed(page: Page, secret: bytes, **changes: Any) -> dict[str, Any]:
    """As a wallet signs it: with eth-account, from the typed data that the page shows."""
    (question,) = page.client.get("/api/questions").json()
    typed = question["typed_data"]
    typed["message"].update(changes)
    signature = Wallet.sign_message(encode_typed_data(full_message=typed), secret).signature
    return {"signature": "0x" + signature.hex(), "expires_at": question["expires_at"]}


def test_what_a_stranger_wrote_is_text(page: Page) -> None:
    text = page.client.get("/").text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "onload='x'" not in text
    assert "you have not named this recipient" in text
    assert "default-src 'none'" in page.client.get("/").headers["content-security-policy"]


def test_a_wallet_s_signature_allows_the_call(page: Page) -> None:
    assert page.post("allow", signed(page, APPROVER.secret)) == 200
    answer = page.approvals.answer(CALL.digest)
    assert not isinstance(answer, str)
    page.approvals.use(answer, CALL)
    assert page.client.get("/api/questions").json() == []


def test_a_no_needs_no_key_and_holds(page: Page) -> None:
    body = signed(page, APPROVER.secret)
    assert page.post("deny") == 200
    assert page.post("allow", body) == 409
    assert page.approvals.answer(CALL.digest) == "denied"


def test_nobody_else_s_yes_counts(page: Page) -> None:
    assert page.post("allow", signed(page, ATTACKER.secret)) == 403
    assert page.post("allow", signed(page, APPROVER.secret, arguments='{"recipients":["x"]}')) == 403
    good = signed(page, APPROVER.secret)
    for wrong in ({}, {"signature": "0x12"}, {"signature": "zz", "expires_at": 1}, {**good, "expires_at": "1"},
                  {**good, "expires_at": NOW + 10**6}, {**good, "expires_at": True}):  # fmt: skip
        assert page.post("allow", wrong) == 400
    assert page.post("allow", {**good, "expires_at": NOW - 1}) == 504
    assert page.post("allow", good, call="00" * 32) == 404
    assert page.post("allow", good, agent="other") == 404
    assert page.approvals.answer(CALL.digest) == "waiting"


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.com"}, {"origin": ""}, {"host": "evil.com"}, {"host": "evil.com", "origin": "http://evil.com"},
     {"content-type": "text/plain"}],
)  # fmt: skip
def test_another_site_cannot_answer(page: Page, headers: dict[str, str]) -> None:
    assert page.post("deny", **headers) == 403
    assert page.approvals.answer(CALL.digest) == "waiting"


def test_another_name_for_this_machine_sees_nothing(page: Page) -> None:
    for path in ("/", "/api/questions"):
        assert page.client.get(path, headers={"host": "rebound.evil.com"}).status_code == 403


def test_a_body_that_is_too_long_or_no_json_is_refused(page: Page) -> None:
    path, headers = f"/api/questions/clerk/{CALL.digest}/deny", {"origin": HOST, "content-type": "application/json"}
    for body in (b"x" * 5_000, b"[]", b"{", b"[" * 4_000):
        assert page.client.post(path, content=body, headers=headers).status_code == 400
