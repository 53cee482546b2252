"""Limits by caller: bursts of a minute's worth, refills, what comes back, and bounded memory."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tessera.core.clock import FakeClock
from tessera.serving.callers import CallerLimits, Callers, TooMany
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments, Free, Payments
from tessera.serving.paying.keys import OperatorKeys
from tessera.serving.text import CharTokenizer

MODEL = "m"


def test_a_minutes_worth_may_come_at_once_and_refills_evenly() -> None:
    clock = FakeClock()
    callers = Callers(CallerLimits(requests_per_minute=60), clock)
    for _ in range(60):
        callers.knock("a")
    with pytest.raises(TooMany) as refused:
        callers.knock("a")
    assert refused.value.retry_after_s == pytest.approx(1.0)
    callers.knock("b")  # another's bucket is full
    clock.advance(2)
    callers.knock("a")
    callers.knock("a")
    with pytest.raises(TooMany):
        callers.knock("a")


def test_tokens_are_reserved_and_what_was_not_used_comes_back() -> None:
    callers = Callers(CallerLimits(tokens_per_minute=100), FakeClock())
    with callers.visit("a", 80) as visit:
        with pytest.raises(TooMany), callers.visit("a", 30):
            raise AssertionError("not let in")
        visit.used(50)
        visit.used(0)  # the first word counts
    with callers.visit("a", 50) as visit:
        visit.used(50)
    with pytest.raises(TooMany), callers.visit("a", 1):
        raise AssertionError("not let in")


def test_a_request_larger_than_the_minute_needs_a_full_bucket_and_is_paid_off() -> None:
    clock = FakeClock()
    callers = Callers(CallerLimits(tokens_per_minute=60), clock)
    with callers.visit("a", 180) as visit:
        visit.used(180)
    clock.advance(120)
    with pytest.raises(TooMany), callers.visit("a", 1):
        raise AssertionError("not let in")
    clock.advance(1)
    with callers.visit("a", 1):
        pass


def test_the_number_of_answers_at_once_is_bounded() -> None:
    callers = Callers(CallerLimits(concurrent=2), FakeClock())
    with callers.visit("a", 1), callers.visit("a", 1):
        with pytest.raises(TooMany), callers.visit("a", 1):
            raise AssertionError("not let in")
        with callers.visit("b", 1):
            pass
    with callers.visit("a", 1):
        pass


def test_zero_is_no_limit_and_a_clock_that_goes_back_gives_nothing() -> None:
    clock = FakeClock()
    free = Callers(CallerLimits(requests_per_minute=0, tokens_per_minute=0, concurrent=0), clock)
    for _ in range(1_000):
        free.knock("a")
        with free.visit("a", 10**9):
            pass
    strict = Callers(CallerLimits(requests_per_minute=1), clock)
    strict.knock("a")
    clock.advance(-3_600)
    with pytest.raises(TooMany):
        strict.knock("a")


def test_memory_is_bounded_and_who_is_being_answered_is_not_forgotten() -> None:
    callers = Callers(CallerLimits(max_callers=10, concurrent=1), FakeClock())
    with callers.visit("busy", 1):
        for number in range(1_000):
            callers.knock(f"address {number}")
            assert len(callers) <= 10
        with pytest.raises(TooMany), callers.visit("busy", 1):
            raise AssertionError("not let in")


def make_client(*ways: Payments, **limits: Any) -> httpx.AsyncClient:
    config = GatewayConfig(callers=CallerLimits(**limits))
    app = create_app(config, [LocalModel(MODEL, FakeEngine(), CharTokenizer())], ways or [Free()])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=("9.9.9.9", 1)), base_url="http://gateway")


ASKED = {"model": MODEL, "prompt": "abc", "max_tokens": 7}


@pytest.mark.anyio
async def test_an_address_that_asks_too_often_gets_429_and_when_to_come_back() -> None:
    async with make_client(requests_per_minute=2) as client:
        statuses = [(await client.post("/v1/completions", json=ASKED)).status_code for _ in range(2)]
        refused = await client.post("/v1/completions", json=ASKED)
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.post("/v1/anything")).status_code == 429  # other parts' routes too
    assert statuses == [200, 200]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.anyio
async def test_tokens_count_for_who_pays_and_an_invented_key_is_nobody() -> None:
    keys = OperatorKeys(["one", "two"])
    async with make_client(keys, Free(), tokens_per_minute=25) as client:

        async def ask(api_key: str) -> int:
            headers = {"Authorization": f"Bearer {api_key}"}
            return (await client.post("/v1/completions", json=ASKED, headers=headers)).status_code

        assert [await ask("one") for _ in range(3)] == [200, 200, 429]
        assert await ask("two") == 200
        assert [await ask(f"invented-{number}") for number in range(3)] == [200, 200, 429]  # all are one address


@pytest.mark.anyio
async def test_a_limit_refuses_before_the_money_moves() -> None:
    payments = FakePayments({"c1"})
    async with make_client(payments, tokens_per_minute=5) as client:
        paid = {"PAYMENT-SIGNATURE": "c1"}
        assert (await client.post("/v1/completions", json=ASKED, headers=paid)).status_code == 200
        payments.coins.add("c1")
        refused = await client.post("/v1/completions", json=ASKED, headers=paid)
    assert refused.status_code == 429
    assert (payments.settled, payments.held) == (["c1"], set())
