"""An upstream that lies, floods, stalls or breaks: the caller gets an error in the envelope and pays for nothing."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import pytest

from serving_upstream import MODEL, FakeUpstream, make_upstream, open_gateway
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.paying.charging import FakePayments, Usage
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
PAID = {"PAYMENT-SIGNATURE": "c1"}


def asked(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi there"}], "max_tokens": 50} | changes


def chunk(*choices: Any, **more: Any) -> bytes:
    return b"data: " + json.dumps({"id": "x", "choices": choices} | more).encode() + b"\n\n"


STOP = {"index": 0, "delta": {}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    "body",
    [b"", b"\n\n", b"data: {\n\n", b"data: []\n\n", b"data: [DONE]\n\n", b"x" * 5_000, b"data: " + b"x" * 5_000,
     b"data: x\n" * 3_000, b"data: " + b"[" * 900 + b"\n\n", b'{"choices":[]}', b"data: 1\n\n",
     chunk({"index": 0, "delta": {"content": "never closed"}}), chunk(error={"message": "sorry"}), chunk(STOP, STOP),
     chunk(STOP | {"index": 1}), chunk(STOP | {"index": "0"}), chunk(STOP | {"index": -1}),
     chunk({"index": 0, "delta": {"content": "x"}, "logprobs": {"content": float("-inf")}}) + chunk(STOP),
     b'data: {"choices":{"a":1}}\n\n', chunk({"index": 0, "delta": {"content": "x" * 2_000}}) * 20],
)  # fmt: skip
async def test_a_stream_that_is_none_is_an_error_and_not_paid_for(body: bytes) -> None:
    payments = FakePayments({"c1"})
    fake = FakeUpstream(body=body)
    async with open_gateway(fake, payments, max_event_bytes=4_096, max_answer_bytes=20_000) as client:
        response = await client.post(CHAT, json=asked(stream=True), headers=PAID)
    if response.status_code == 200:
        last = response.text.removesuffix("\n\n").split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert list(payments.owed) == ["c1"]
    else:
        assert (response.status_code, payments.settled) == (503, [])
    assert payments.metered == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"choices":3}',
        b"x" * 30_000,
        b"[" * 5_000,
        b'{"choices":[' + b"[" * 10_000,
        b'{"choices":[{"message":{"content":"x"},"logprobs":-1e999}]}',
    ],
)
async def test_a_whole_answer_that_is_none_is_a_503_and_not_paid_for(body: bytes) -> None:
    payments = FakePayments({"c1"})
    async with open_gateway(FakeUpstream(body=body), payments, max_answer_bytes=20_000) as client:
        response = await client.post(CHAT, json=asked(), headers=PAID)
    assert (response.status_code, payments.settled) == (503, [])


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
async def test_a_number_that_is_none_does_not_reach_the_upstream(number: str) -> None:
    payments, fake = FakePayments({"c1"}), FakeUpstream()
    async with open_gateway(fake, payments) as client:
        body = json.dumps(asked())[:-1] + f', "min_p": {number}}}'
        response = await client.post(CHAT, content=body, headers=PAID)
    assert (response.status_code, payments.settled, fake.asked) == (400, [], [])


async def test_an_upstream_that_knows_no_n_is_whole_with_one_choice() -> None:
    one = chunk({"index": 0, "delta": {"content": "x"}}) + chunk(STOP)
    for body, whole in ((one + b"data: [DONE]\n\n", True), (one, False)):
        async with open_gateway(FakeUpstream(body=body)) as client:
            response = await client.post(CHAT, json=asked(stream=True, n=2))
        assert response.text.endswith("data: [DONE]\n\n") == whole


async def test_a_compressed_bomb_is_not_opened() -> None:
    fake = FakeUpstream(headers={"content-encoding": "gzip"}, body=b"\x1f\x8b" + b"\0" * 100)
    async with open_gateway(fake) as client:
        assert (await client.post(CHAT, json=asked())).status_code == 503
    assert fake.asked[0].headers["accept-encoding"] == "identity"


async def test_half_a_surrogate_pair_passes_as_it_is() -> None:
    halves = [chunk({"index": 0, "delta": {"content": half}}) for half in ("\ud83d", "\ude00")]
    fake = FakeUpstream(body=b"".join(halves) + chunk(STOP))
    async with open_gateway(fake) as client:
        response = await client.post(CHAT, json=asked(stream=True))
    assert "\\ud83d" in response.text
    assert response.text.endswith("data: [DONE]\n\n")


ABSURD: list[Any] = [
    None, [], "5", {"completion_tokens": "5"}, {"completion_tokens": -5}, {"completion_tokens": 2.5},
    {"completion_tokens": True}, {"completion_tokens": 10**30}, {"completion_tokens": 51}, {"completion_tokens": 2},
    {"completion_tokens": 0},
]  # fmt: skip


@pytest.mark.parametrize("usage", ABSURD)
async def test_absurd_usage_is_replaced_by_our_own_count(usage: Any) -> None:
    payments = FakePayments({"c1", "c2"})
    fake = FakeUpstream(usage=usage)  # three pieces of nine bytes
    async with open_gateway(fake, payments) as client:
        streamed = await client.post(
            CHAT, json=asked(stream=True, stream_options={"include_usage": True}), headers=PAID
        )
        whole = await client.post(CHAT, json=asked(), headers={"PAYMENT-SIGNATURE": "c2"})
    believed = usage == {"completion_tokens": 2}  # of a whole answer nothing says that there were three pieces
    assert payments.metered == [Usage(2, 3), Usage(2, 2)]
    assert believed or whole.json()["usage"]["completion_tokens"] == 9 // 4
    assert '"completion_tokens":3' in streamed.text


@pytest.mark.parametrize(
    ("usage", "expected"),
    [({"prompt_tokens": 3, "completion_tokens": 7}, Usage(3, 7)),
     ({"prompt_tokens": 10**6, "completion_tokens": 7}, Usage(8, 7)),
     ({"prompt_tokens": 0, "completion_tokens": 10**6}, Usage(8, 9)), (None, Usage(8, 9))],
)  # fmt: skip
async def test_with_the_tokenizer_our_own_count_is_exact(usage: Any, expected: Usage) -> None:
    payments = FakePayments({"c1", "c2"})
    async with open_gateway(FakeUpstream(usage=usage), payments, tokenizer=CharTokenizer()) as client:
        await client.post(CHAT, json=asked(stream=True), headers=PAID)
        await client.post(CHAT, json=asked(), headers={"PAYMENT-SIGNATURE": "c2"})
    assert payments.metered == [expected, expected]


async def test_hidden_reasoning_is_believed_within_what_was_allowed() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 45, "completion_tokens_details": {"reasoning_tokens": 40}}
    payments = FakePayments({"c1"})
    async with open_gateway(FakeUpstream(usage=usage), payments) as client:
        await client.post(CHAT, json=asked(), headers=PAID)
    assert payments.metered == [Usage(3, 45)]


async def test_more_than_what_was_paid_for_is_never_metered() -> None:
    payments = FakePayments({"c1"})
    fake = FakeUpstream(pieces=["x"] * 200, usage={"prompt_tokens": 1, "completion_tokens": 200})
    async with open_gateway(fake, payments) as client:
        await client.post(CHAT, json=asked(stream=True), headers=PAID)
    assert payments.metered == [Usage(1, 50)]


async def test_a_caller_who_leaves_closes_the_upstreams_call_and_pays_for_what_passed() -> None:
    payments = FakePayments({"c1"})
    fake = FakeUpstream(pieces=["x"] * 10_000, delay_s=0.001)
    upstream = make_upstream(fake)
    app = create_app(GatewayConfig(), [upstream], [payments])
    gone = anyio.Event()
    seen = 0

    async def receive() -> dict[str, Any]:
        if not content:
            await gone.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": content.pop(), "more_body": False}

    async def send(message: Any) -> None:
        nonlocal seen
        seen += message.get("body", b"").count(b"data: ")
        if seen >= 20:
            gone.set()

    content = [json.dumps(asked(stream=True, max_tokens=20_000)).encode()]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": CHAT, "query_string": b"",
        "headers": [(b"payment-signature", b"c1")], "server": ("g", 80), "client": ("1.2.3.4", 5),
    }  # fmt: skip
    with anyio.fail_after(10):
        await app(scope, receive, send)
    assert fake.open == 0
    assert seen <= fake.sent < 100
    assert payments.metered == [Usage(2, fake.sent)]
    await upstream.aclose()


async def test_a_silent_upstream_is_late() -> None:
    fake = FakeUpstream(delay_s=30)
    upstream = make_upstream(fake)
    app = create_app(GatewayConfig(token_timeout_s=0.05, answer_timeout_s=0.05), [upstream], [FakePayments({"c1"})])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as client:
        for stream in (True, False):
            response = await client.post(CHAT, json=asked(stream=stream), headers=PAID)
            assert (response.status_code, response.json()["error"]["code"]) == (504, "late")
    assert fake.open == 0
    await upstream.aclose()


@pytest.mark.parametrize("value", [10**30, -1, 2.5, "9", True, [], {}])
async def test_a_request_cannot_unset_its_own_limit(value: Any) -> None:
    fake = FakeUpstream()
    async with open_gateway(fake) as client:
        for name in ("max_tokens", "max_completion_tokens", "n"):
            assert (await client.post(CHAT, json=asked(**{name: value}))).status_code == 400
    assert fake.asked == []
