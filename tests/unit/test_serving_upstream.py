"""An upstream behind the gateway: what passes, who is asked, what is counted, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from serving_upstream import MODEL, SECRET, TARGETS, FakeUpstream, make_upstream, open_gateway
from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Late, Unavailable
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments, Free, Usage
from tessera.serving.text import CharTokenizer
from tessera.serving.upstreams.outgoing import HungUp, Reply
from tessera.serving.upstreams.upstream import Target, Upstream

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


def asked(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | changes


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_the_official_client_gets_the_upstreams_words_under_our_name() -> None:
    fake = FakeUpstream()
    async with open_gateway(fake) as http:
        client = AsyncOpenAI(api_key="callers-key", base_url="http://gateway/v1", http_client=http, max_retries=0)
        whole = await client.chat.completions.create(**asked(), extra_headers={"x-mine": "caller"})
        stream = await client.chat.completions.create(**asked(), stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    assert (whole.choices[0].message.content, whole.model) == ("Hello €", MODEL)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello €"
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 5
    for request in fake.asked:
        assert request.url == "http://one/v1/chat/completions"
        assert request.headers["authorization"] == f"Bearer {SECRET}"
        assert "x-mine" not in request.headers
        assert "callers-key" not in str(request.headers)
    assert json.loads(fake.asked[0].content)["model"] == "theirs"


async def test_tools_and_response_formats_pass_both_ways() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "theirs",
              "choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}],
              "usage": {"prompt_tokens": 9, "completion_tokens": 12}}  # fmt: skip
    fake = FakeUpstream(body=json.dumps(answer).encode())
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "user", "content": "?"}, message, {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]  # fmt: skip
    options = {"tools": tools, "tool_choice": "required", "response_format": {"type": "json_object"}, "top_k": 4}
    async with open_gateway(fake) as client:
        body = (await client.post(CHAT, json=asked(messages=messages, **options))).json()
    assert body["choices"][0]["message"]["tool_calls"] == [call]
    assert {name: fake.last[name] for name in options} == options
    assert fake.last["messages"] == messages
    assert body["usage"]["completion_tokens"] == 12


async def test_streamed_tool_calls_pass_and_are_counted() -> None:
    def chunk(choice: dict[str, Any]) -> bytes:
        data = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "t", "choices": [choice]}
        return b"data: " + json.dumps(data).encode() + b"\r\n\r\n"

    part = {"index": 0, "function": {"arguments": '{"a":1}'}}
    deltas = [{"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}]},
              {"tool_calls": [part]}, {"tool_calls": [part]}]  # fmt: skip
    body = b": a comment\n\n" + b"".join(chunk({"index": 0, "delta": delta}) for delta in deltas)
    body += chunk({"index": 0, "delta": {}, "finish_reason": "tool_calls"}) + b"data: [DONE]\n\n"
    payments = FakePayments({"c1"})
    async with open_gateway(FakeUpstream(body=body), payments) as client:
        response = await client.post(CHAT, json=asked(stream=True), headers={"PAYMENT-SIGNATURE": "c1"})
    *chunks, closing, done = events(response)
    assert [c["choices"][0]["delta"] for c in chunks] == deltas
    assert (closing["choices"][0]["finish_reason"], done) == ("tool_calls", "[DONE]")
    assert payments.metered[0].completion_tokens == 3


async def test_usage_is_always_asked_for_and_told_only_to_who_asked() -> None:
    fake = FakeUpstream()
    async with open_gateway(fake) as client:
        told = events(await client.post(CHAT, json=asked(stream=True, stream_options={"include_usage": True})))
        untold = events(await client.post(CHAT, json=asked(stream=True)))
    assert fake.last["stream_options"] == {"include_usage": True}
    assert told[-2]["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}
    assert not any(chunk.get("usage") for chunk in untold[:-1])
    assert all(chunk["choices"] for chunk in untold[:-1])


async def test_the_token_limit_is_always_set_and_the_caller_stays_unnamed() -> None:
    fake = FakeUpstream()
    async with open_gateway(fake, default_max_tokens=77, max_tokens=100) as client:
        await client.post(CHAT, json=asked(user="u-1", metadata={"a": "b"}, store=True, service_tier="priority"))
        assert fake.last == {"model": "theirs", "messages": asked()["messages"], "max_tokens": 77}
        await client.post(CHAT, json=asked(max_completion_tokens=9, max_tokens=50))
        assert (fake.last["max_completion_tokens"], "max_tokens" in fake.last) == (9, False)
        assert (await client.post(CHAT, json=asked(max_tokens=101))).status_code == 400
        count = len(fake.asked)
        for wrong in ({"temprature": 1}, {"web_search_options": {}}, {"best_of": 3}, {"messages": []}, {"n": 0},
                      {"n": 17}, {"messages": ["x"]}, {"stream_options": {"include_usage": True}}):  # fmt: skip
            assert (await client.post(CHAT, json=asked(**wrong))).status_code == 400
        assert len(fake.asked) == count


async def test_embeddings_pass_and_are_metered_by_their_prompt() -> None:
    payments = FakePayments({"c1"})
    fake = FakeUpstream(usage={"prompt_tokens": 3, "total_tokens": 3})
    async with open_gateway(fake, payments) as client:
        body = {"model": MODEL, "input": ["some words"], "dimensions": 1}
        response = await client.post("/v1/embeddings", json=body, headers={"PAYMENT-SIGNATURE": "c1"})
    assert response.json()["data"][0]["embedding"] == [1.0]
    assert (response.json()["model"], response.json()["usage"]) == (MODEL, {"prompt_tokens": 3, "total_tokens": 3})
    assert payments.metered == [Usage(3, 0)]
    assert "max_tokens" not in fake.last


@pytest.mark.parametrize("fault", [Unavailable("refused"), Late("slow"), 500, 502, 429, 401, 404])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_target_is_tried_before_the_first_byte(fault: Any, stream: bool) -> None:
    clock = FakeClock()
    fake = FakeUpstream(faults={"one": fault})
    async with open_gateway(fake, clock=clock, rest_s=10.0) as client:
        assert (await client.post(CHAT, json=asked(stream=stream))).status_code == 200
        assert [request.url.host for request in fake.asked] == ["one", "two"]
        assert (await client.post(CHAT, json=asked())).status_code == 200
        assert [request.url.host for request in fake.asked[2:]] == ["two"]  # the first one rests
        fake.faults = {}
        clock.advance(11)
        assert (await client.post(CHAT, json=asked())).status_code == 200
        assert fake.asked[-1].url.host == "one"
    assert "authorization" not in fake.asked[1].headers  # each target has its own key, or none


async def test_no_other_target_is_tried_after_the_first_byte_and_the_buyer_is_owed() -> None:
    payments = FakePayments({"c1"})
    fake = FakeUpstream(breaks_after=2)
    async with open_gateway(fake, payments) as client:
        response = await client.post(CHAT, json=asked(stream=True), headers={"PAYMENT-SIGNATURE": "c1"})
    assert events(response)[-1]["error"]["code"] == "unavailable"
    assert len(fake.asked) == 1
    assert list(payments.owed) == ["c1"]
    assert payments.metered == []


async def test_a_connection_that_was_closed_meanwhile_is_opened_again_once() -> None:
    fake = FakeUpstream()
    post, failures = fake.post, [HungUp("server disconnected")]

    async def flaky(url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        if failures:
            raise failures.pop()
        return await post(url, headers, body)

    fake.post = flaky  # type: ignore[method-assign]
    async with open_gateway(fake, targets=TARGETS[:1]) as client:
        assert (await client.post(CHAT, json=asked())).status_code == 200


@pytest.mark.parametrize(
    ("fault", "status", "retry"),
    [(401, 503, "1"), (403, 503, "1"), (404, 503, "1"), (500, 503, "1"), (302, 503, "1"),
     (httpx.Response(429, headers={"retry-after": "7"}), 503, "7"),
     (httpx.Response(503, headers={"retry-after": "9" * 99}), 503, "1"),
     (Late("slow"), 504, None), (Unavailable("x"), 503, "1")],
)  # fmt: skip
async def test_an_upstreams_failure_is_ours_in_the_envelope(fault: Any, status: int, retry: str | None) -> None:
    payments = FakePayments({"c1"})
    async with open_gateway(FakeUpstream(faults={"one": fault}), payments, targets=TARGETS[:1]) as client:
        for stream in (False, True):
            response = await client.post(CHAT, json=asked(stream=stream), headers={"PAYMENT-SIGNATURE": "c1"})
            assert (response.status_code, response.headers.get("retry-after")) == (status, retry)
            assert SECRET not in response.text
        assert (await client.get("/healthz/ready")).status_code == 503
    assert payments.settled == []


async def test_what_the_caller_did_wrong_is_told_in_the_upstreams_words_without_its_key() -> None:
    error = {
        "message": f"at http://one/v1 with {SECRET}: too long" + "x" * 9_999,
        "param": "messages",
        "code": "too_long",
    }
    fault = httpx.Response(400, json={"error": error})
    fake = FakeUpstream(faults={"one": fault})
    async with open_gateway(fake) as client:
        response = await client.post(CHAT, json=asked())
    told = response.json()["error"]
    assert (response.status_code, told["param"], told["code"]) == (400, "messages", "too_long")
    assert "too long" in told["message"]
    assert len(told["message"]) < 600
    assert SECRET not in response.text
    assert "http://one" not in response.text
    assert len(fake.asked) == 1  # the same anywhere


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b'{"error":3}', b'{"detail":"x"}', b"\xff", b"[" * 100_000])
async def test_a_complaint_that_cannot_be_read_is_a_plain_400(body: bytes) -> None:
    async with open_gateway(FakeUpstream(faults={"one": httpx.Response(422, content=body)})) as client:
        response = await client.post(CHAT, json=asked())
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_model_of_ours_and_an_upstream_stand_side_by_side() -> None:
    fake = FakeUpstream(faults={"one": 500, "two": 500})
    upstream = make_upstream(fake)
    local = LocalModel("ours", FakeEngine(), CharTokenizer())
    app = create_app(GatewayConfig(), [local, upstream], [Free()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["ours", MODEL]
        assert (await client.get("/v1/models/m")).json()["id"] == MODEL
        body = {"model": "ours", "prompt": "ab", "max_tokens": 2}
        assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "ab"
        assert (await client.post(CHAT, json=asked())).status_code == 503
        ready = await client.get("/healthz/ready")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "models": {"ours": True, MODEL: False}})
        missing = (await client.post(CHAT, json=asked(model="x"))).json()["error"]
        assert (missing["code"], "'ours', 'm'" in missing["message"]) == ("model_not_found", True)
    await upstream.aclose()


def test_a_table_of_models_without_one_or_with_two_of_a_name_is_refused() -> None:
    model = LocalModel("ours", FakeEngine(), CharTokenizer())
    for models in ([], [model, model]):
        with pytest.raises(Invalid, match="id of its own"):
            create_app(GatewayConfig(), models, [Free()])


@pytest.mark.parametrize(
    "url", ["", "one", "ftp://one/v1", "http:///v1", "http://user:word@one/v1", "file:///etc/passwd"]
)
def test_a_target_that_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(Invalid):
        Upstream(MODEL, [Target(url)])
    assert SECRET not in repr(TARGETS)
