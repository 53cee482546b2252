"""The gateway with a fake engine and fake payments: routes, shapes, checks and their order."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI

from tessera.core.errors import Invalid, PaymentRequired, Unavailable
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments, Free, Payments, Usage
from tessera.serving.paying.keys import OperatorKeys
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
MODEL = "tessera-test"


def make_client(engine: FakeEngine, *ways: Payments, **settings: Any) -> httpx.AsyncClient:
    stop_tokens = settings.pop("stop_tokens", ())
    model = LocalModel(MODEL, engine, CharTokenizer(), stop_tokens=stop_tokens)
    app = create_app(GatewayConfig(**settings), [model], ways or [Free()])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def says(text: str, **settings: Any) -> FakeEngine:
    return FakeEngine(lambda prompt, sampling: list(text.encode()), **settings)


@pytest.fixture
async def free() -> AsyncIterator[httpx.AsyncClient]:
    async with make_client(says("hello world", context=64)) as client:
        yield client


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "abc", "max_tokens": 20} | changes


def events(body: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_completion_has_text_reason_and_our_count_of_tokens(free: httpx.AsyncClient) -> None:
    response = await free.post("/v1/completions", json=completion())
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["choices"][0] == {"index": 0, "logprobs": None, "finish_reason": "stop", "text": "hello world"}
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 11, "total_tokens": 14}


class Reversed:
    """A chat whose prompt is the messages backwards, and which knows no system."""

    async def prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        if messages[0][0] == "system":
            raise Invalid("no system here", param="messages")
        return list("".join(text for _, text in messages)[::-1].encode())


async def test_a_model_with_a_chat_of_its_own_is_asked_through_it() -> None:
    model = LocalModel(MODEL, FakeEngine(context=64), CharTokenizer(), chat=Reversed())
    app = create_app(GatewayConfig(), [model], [Free()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:

        async def ask(role: str, text: str) -> httpx.Response:
            body = {"model": MODEL, "max_tokens": 3, "messages": [{"role": role, "content": text}]}
            return await client.post("/v1/chat/completions", content=json.dumps(body))

        answer = (await ask("user", "abc")).json()
        assert answer["choices"][0]["message"]["content"] == "cba"
        assert answer["usage"]["prompt_tokens"] == 3
        for role, text, code in (("system", "abc", 400), ("user", "", 400), ("user", "\ud800", 400)):
            assert (await ask(role, text)).status_code == code


async def test_the_token_limit_ends_with_reason_length(free: httpx.AsyncClient) -> None:
    body = (await free.post("/v1/completions", json=completion(max_tokens=5))).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("hello", "length")
    assert body["usage"]["completion_tokens"] == 5


async def test_a_stop_string_ends_the_text_before_it_and_frees_the_engine() -> None:
    engine = says("one two three")
    async with make_client(engine) as client:
        body = (await client.post("/v1/completions", json=completion(stop=["wo t", "zzz"]))).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("one t", "stop")
    assert body["usage"]["completion_tokens"] == len("one two t")
    assert (engine.open, engine.produced) == (0, len("one two t"))


async def test_streamed_pieces_join_to_the_whole_answer_and_end_with_done(free: httpx.AsyncClient) -> None:
    asked = completion(stream=True, stream_options={"include_usage": True})
    response = await free.post("/v1/completions", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 14)


async def test_a_character_of_several_tokens_is_never_cut() -> None:
    async with make_client(says("a€😀b")) as client:
        response = await client.post("/v1/completions", json=completion(stream=True))
    pieces = [chunk["choices"][0]["text"] for chunk in events(response.text)[:-1]]
    assert pieces == ["a", "€", "😀", "b", ""]


async def test_chat_is_the_text_of_the_messages_continued() -> None:
    seen: list[str] = []

    def reply(prompt: Any, sampling: Any) -> list[int]:
        seen.append(bytes(prompt).decode())
        return list(b"done")

    async with make_client(FakeEngine(reply)) as client:
        messages = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f"}]},
        ]
        body = (await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})).json()
    assert seen == ["be brief\ndef f"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "done", "refusal": None}
    assert body["object"] == "chat.completion"


async def test_the_official_openai_client_works_streamed_and_not(free: httpx.AsyncClient) -> None:
    client = AsyncOpenAI(api_key="any", base_url="http://gateway/v1", http_client=free, max_retries=0)
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = await client.chat.completions.create(model=MODEL, messages=messages, user="u-1", n=1)
    assert whole.choices[0].message.content == "hello world"
    streamed = await client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in streamed]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 11
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(APIStatusError) as caught:
        await client.completions.create(model="another", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (404, "model_not_found")


async def test_equal_seeds_reach_the_engine_unchanged_and_absent_ones_differ() -> None:
    seeds: list[int] = []

    def reply(prompt: Any, sampling: Any) -> list[int]:
        seeds.append(sampling.seed)
        return [65]

    async with make_client(FakeEngine(reply)) as client:
        for seed in (7, 7, None, None, -1):
            await client.post("/v1/completions", json=completion(seed=seed))
    assert seeds[:2] == [7, 7]
    assert seeds[2] != seeds[3]
    assert seeds[4] == 2**63 - 1


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"n": 17}, "n", "invalid_value"),
        ({"n": 9, "prompt": ["a", "b"]}, "n", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"best_of": True}, "best_of", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
        ({"prompt": [256]}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"max_tokens": 62}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x" * 64}, "prompt", "context_length_exceeded"),
    ],
)
async def test_a_wrong_parameter_is_named_in_the_envelope(
    free: httpx.AsyncClient, change: dict[str, Any], param: str | None, code: str
) -> None:
    response = await free.post("/v1/completions", content=json.dumps(completion(**change)))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


async def test_harmless_and_neutral_options_pass(free: httpx.AsyncClient) -> None:
    options = {"user": "u", "metadata": {"a": "b"}, "store": False, "n": 1, "presence_penalty": 0.0, "logit_bias": {}}
    options |= {"logprobs": None, "tools": None, "echo": False, "service_tier": "auto", "suffix": None}
    response = await free.post("/v1/completions", json=completion(**options))
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nothing", 404, "not_found"), ("GET", "/v1/completions", 405, "method_not_allowed"),
     ("GET", "/v1/models/x", 404, "model_not_found"), ("POST", "/v1/completions/", 404, "not_found")],
)  # fmt: skip
async def test_routing_errors_speak_the_envelope(
    free: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await free.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_an_unexpected_failure_is_a_plain_500_without_details() -> None:
    async with make_client(says("abc", fail_after=1, error=RuntimeError("secret prompt"))) as client:
        response = await client.post("/v1/completions", json=completion())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


async def test_a_stage_that_is_gone_gives_503_with_retry_after() -> None:
    engine = says("abc", fail_after=0, error=Unavailable("stage 2 is gone", retry_after_s=2.5))
    async with make_client(engine) as client:
        response = await client.post("/v1/completions", json=completion())
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert engine.open == 0


async def test_a_full_house_is_503_and_places_come_back() -> None:
    engine = says("abc")
    async with make_client(engine, max_concurrent=0) as client:
        response = await client.post("/v1/completions", json=completion())
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    async with make_client(engine, max_concurrent=1) as client:
        for stream in (False, True, False):
            assert (await client.post("/v1/completions", json=completion(stream=stream))).status_code == 200
        assert (await client.get("/healthz")).json()["active"] == 0


async def test_a_slow_model_is_late() -> None:
    async with make_client(says("abc", delay_s=5.0), answer_timeout_s=0.05, token_timeout_s=0.05) as client:
        for stream in (False, True):
            response = await client.post("/v1/completions", json=completion(stream=stream))
            assert (response.status_code, response.json()["error"]["code"]) == (504, "late")


async def test_an_operator_key_skips_payment_and_a_wrong_one_pays() -> None:
    payments = FakePayments({"c1"})
    async with make_client(says("abc"), OperatorKeys(["operator-key"]), payments) as client:
        with_key = await client.post(
            "/v1/completions", json=completion(), headers={"Authorization": "Bearer operator-key"}
        )
        wrong = await client.post("/v1/completions", json=completion(), headers={"Authorization": "Bearer other"})
    assert (with_key.status_code, wrong.status_code) == (200, 402)
    assert payments.settled == []


async def test_without_payments_a_wrong_key_is_401() -> None:
    async with make_client(says("abc"), OperatorKeys(["operator-key"])) as client:
        response = await client.post("/v1/completions", json=completion())
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")


async def test_a_gateway_that_nobody_could_use_is_refused() -> None:
    with pytest.raises(Invalid, match="a way to pay"):
        create_app(GatewayConfig(), [LocalModel(MODEL, FakeEngine(), CharTokenizer())], [])


async def test_a_paid_answer_settles_once_and_tells_the_buyer() -> None:
    payments = FakePayments({"c1", "c2"})
    async with make_client(says("abc"), payments) as client:
        unpaid = await client.post("/v1/completions", json=completion())
        assert (unpaid.status_code, unpaid.headers["payment-required"]) == (402, "one coin")
        for coin, stream in (("c1", False), ("c2", True)):
            paid = await client.post(
                "/v1/completions", json=completion(stream=stream), headers={"PAYMENT-SIGNATURE": coin}
            )
            assert (paid.status_code, paid.headers["payment-response"]) == (200, coin)
    assert payments.settled == ["c1", "c2"]
    assert payments.held == set()
    assert payments.metered == [Usage(3, 3), Usage(3, 3)]


class Metering(FakePayments):
    """Tells what it charges when the answer ends; unpaid when told to."""

    refuses = False

    async def hold(self, request: Any) -> Any:
        hold = await super().hold(request)
        finish = hold.finish

        async def told(usage: Usage, *, delivered: bool = True) -> dict[str, str]:
            await finish(usage, delivered=delivered)
            if self.refuses:
                raise PaymentRequired("the coins are gone", reason="gone")
            return {"PAYMENT-RESPONSE": str(usage.completion_tokens)}

        hold.finish = told  # type: ignore[method-assign]
        return hold


async def test_what_is_metered_is_told_in_the_last_chunk_or_in_the_header() -> None:
    payments = Metering({"c1", "c2", "c3"})
    async with make_client(says("abc"), payments) as client:
        paid = [{"PAYMENT-SIGNATURE": coin} for coin in ("c1", "c2", "c3")]
        whole = await client.post("/v1/completions", json=completion(), headers=paid[0])
        assert whole.headers["payment-response"] == "3"
        streamed = events((await client.post("/v1/completions", json=completion(stream=True), headers=paid[1])).text)
        assert streamed[-2]["payment"] == {"payment-response": "3"}
        assert streamed[-1] == "[DONE]"
        payments.refuses = True
        unpaid = events((await client.post("/v1/completions", json=completion(stream=True), headers=paid[2])).text)
    assert unpaid[-1]["error"]["code"] == "gone"
    assert payments.metered == [Usage(3, 3)] * 3


@pytest.mark.parametrize("change", [{"max_tokens": 10_000}, {"model": "other"}, {"tools": [{}]}])
async def test_what_cannot_be_served_is_refused_before_payment(change: dict[str, Any]) -> None:
    payments = FakePayments({"c1"})
    engine = says("abc")
    async with make_client(engine, payments) as client:
        response = await client.post("/v1/completions", json=completion(**change), headers={"PAYMENT-SIGNATURE": "c1"})
    assert response.status_code in (400, 404)
    assert (payments.settled, payments.held, engine.started) == ([], set(), 0)


async def test_a_request_that_fails_before_its_answer_costs_nothing_and_the_payment_stays_good() -> None:
    payments = FakePayments({"c1"})
    engine = says("abc", fail_after=2, error=Unavailable("stage 1 is gone"))
    async with make_client(engine, payments) as client:
        paid = {"PAYMENT-SIGNATURE": "c1"}
        failed = await client.post("/v1/completions", json=completion(), headers=paid)
        assert (failed.status_code, payments.settled) == (503, [])
        engine.fail_after = None
        assert (await client.post("/v1/completions", json=completion(), headers=paid)).status_code == 200
    assert payments.settled == ["c1"]


async def test_a_stream_that_breaks_after_settlement_is_owed_for_the_same_request_only() -> None:
    payments = FakePayments({"c1"})
    engine = says("abc", fail_after=2, error=Unavailable("stage 1 is gone"))
    async with make_client(engine, payments) as client:
        paid = {"PAYMENT-SIGNATURE": "c1"}
        broken = await client.post("/v1/completions", json=completion(stream=True), headers=paid)
        assert broken.status_code == 200
        assert events(broken.text)[-1]["error"]["code"] == "unavailable"
        assert (payments.settled, payments.metered) == (["c1"], [])
        engine.fail_after = None
        other = await client.post("/v1/completions", json=completion(stream=True, prompt="no"), headers=paid)
        assert other.status_code == 402
        again = await client.post("/v1/completions", json=completion(stream=True), headers=paid)
        assert events(again.text)[-1] == "[DONE]"
        assert (await client.post("/v1/completions", json=completion(stream=True), headers=paid)).status_code == 402
    assert payments.settled == ["c1"]


async def test_a_token_that_the_tokenizer_does_not_know_has_no_text_but_counts() -> None:
    async with make_client(FakeEngine(lambda prompt, sampling: [97, 300, 98])) as client:
        body = (await client.post("/v1/completions", json=completion())).json()
    assert (body["choices"][0]["text"], body["usage"]["completion_tokens"]) == ("ab", 3)


async def test_a_stop_token_ends_the_answer_without_being_shown_or_counted() -> None:
    async with make_client(says("ab\0cd"), stop_tokens=(0,)) as client:
        body = (await client.post("/v1/completions", json=completion())).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("ab", "stop")
    assert body["usage"]["completion_tokens"] == 2
