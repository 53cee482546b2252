"""Tokens metered equal tokens counted independently: by the engine, for each request, however the request ends."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from serving_upstream import FakeUpstream, make_upstream
from tessera.serving.engine import FakeEngine, Sampling, Token
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments, Usage
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
STOP_TOKEN = 0
ALPHABET = "ab €😀é"
ROUTES = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


class CountingEngine(FakeEngine):
    """Counts, for each request, what it yields. A request's prompt ends with its number."""

    def __init__(self) -> None:
        super().__init__(self._write, context=2_000)
        self.yielded: Counter[int] = Counter()

    def _write(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        rng = random.Random(sampling.seed)
        text = "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(0, 40))).encode()
        cut = text[: rng.randrange(0, len(text) + 1)]  # perhaps in the middle of a character
        return [*cut, STOP_TOKEN, *text] if rng.random() < 0.5 else list(text)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Any:
        number = int(bytes(prompt).decode().rsplit("#", 1)[1])
        async with aclosing(super().generate(prompt, sampling)) as tokens:
            async for token in tokens:
                self.yielded[number] += 1
                yield token if sampling.logprobs is None else Token(token.id, -1.0)


class Purse(FakePayments):
    """Knows which request each metered usage belongs to."""

    def __init__(self, coins: set[str]) -> None:
        super().__init__(coins)
        self.by_coin: dict[str, Usage] = {}

    async def hold(self, request: Any) -> Any:
        hold = await super().hold(request)
        finish = hold.finish

        async def told(usage: Usage, **how: Any) -> dict[str, str]:
            assert hold.coin not in self.by_coin, "metered twice"
            self.by_coin[hold.coin] = usage
            return await finish(usage, **how)

        hold.finish = told  # type: ignore[method-assign]
        return hold


def record(rng: random.Random, number: int) -> tuple[str, dict[str, Any], int | None]:
    """A request's kind and body, and after how many messages of its answer the client hangs up."""
    kind = rng.choice(list(ROUTES))
    text = "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(0, 8))) + f"#{number}"
    body: dict[str, Any] = {"model": "m", "max_tokens": rng.randrange(1, 60), "stream": rng.random() < 0.6}
    body |= {"messages": [{"role": "user", "content": text}]} if kind == "chat" else {"prompt": text}
    if rng.random() < 0.3:
        body["n"] = rng.randrange(1, 5)
    if rng.random() < 0.5:
        body["stop"] = ["".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 4))) for _ in range(2)]
    if rng.random() < 0.2:
        body["logprobs"] = True if kind == "chat" else 0
    if body["stream"] and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    leaves = rng.randrange(0, 25) if rng.random() < 0.4 else None
    return kind, body, leaves


async def ask(app: Any, kind: str, body: dict[str, Any], coin: str, leaves: int | None) -> bytes:
    """What arrives until the client hangs up after `leaves` messages; 0: at once."""
    gone, content, received = anyio.Event(), [json.dumps(body).encode()], []

    async def receive() -> dict[str, Any]:
        if content:
            return {"type": "http.request", "body": content.pop(), "more_body": False}
        if leaves != 0:
            await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        received.append(message.get("body", b""))
        if leaves is not None and len(received) >= leaves:
            gone.set()
            await anyio.lowlevel.checkpoint()

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": ROUTES[kind],
        "query_string": b"", "headers": [(b"payment-signature", coin.encode())], "server": ("g", 80),
        "client": ("1.2.3.4", 5),
    }  # fmt: skip
    await app(scope, receive, send)
    return b"".join(received)


@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.slow)])
async def test_what_is_metered_is_what_the_engine_yielded(count: int) -> None:
    rng, engine = random.Random(count), CountingEngine()
    purse = Purse({str(number) for number in range(count)})
    model = LocalModel("m", engine, CharTokenizer(), stop_tokens=(STOP_TOKEN,))
    app = create_app(GatewayConfig(max_concurrent=64), [model], [purse])
    ends: Counter[str] = Counter()
    for number in range(count):
        kind, body, leaves = record(rng, number)
        answer = await ask(app, kind, body, str(number), leaves)
        usage = purse.by_coin.get(str(number))
        if usage is None:  # the client left before the first byte: nothing is paid, or what was paid is owed
            assert leaves is not None
            assert str(number) in purse.coins or str(number) in purse.owed
            ends["nothing"] += 1
            continue
        prompt = body["prompt"] if kind == "completion" else body["messages"][0]["content"]
        assert usage == Usage(len(prompt.encode()), engine.yielded[number]), (number, body, leaves)
        whole = b"[DONE]" in answer or not body["stream"]
        ends["whole" if whole else "cancelled"] += 1
        if told := told_usage(answer, body):
            assert told == engine.yielded[number]
            ends["told"] += 1
    assert engine.open == 0
    assert min(ends[end] for end in ("whole", "cancelled", "nothing", "told")) >= count // 50, ends


def told_usage(answer: bytes, body: dict[str, Any]) -> int | None:
    """What the answer itself says, if it is complete and was asked to say."""
    if not body["stream"]:
        return json.loads(answer)["usage"]["completion_tokens"] if answer else None
    if "stream_options" not in body or b"[DONE]" not in answer:
        return None
    last = answer.decode().removesuffix("\n\n").split("\n\n")[-2]
    return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]


@pytest.mark.parametrize("count", [50, pytest.param(1_000, marks=pytest.mark.slow)])
async def test_what_is_metered_is_what_an_upstream_sent(count: int) -> None:
    """Each piece is a token. A report is exact where there is one; else streams are counted as they pass."""
    rng = random.Random(count)
    purse = Purse({str(number) for number in range(count)})
    fake = FakeUpstream()
    upstream = make_upstream(fake)
    app = create_app(GatewayConfig(max_concurrent=64), [upstream], [purse])
    ends: Counter[str] = Counter()
    for number in range(count):
        kind, body, leaves = record(rng, number)
        body = {name: value for name, value in body.items() if name not in ("n", "logprobs")}
        made = rng.randrange(1, body["max_tokens"] + 1)
        fake.pieces = ["".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 5))) for _ in range(made)]
        reports = rng.random() < 0.5 or not body["stream"]
        fake.usage = {"prompt_tokens": 1, "completion_tokens": made} if reports else None
        fake.sent = 0
        answer = await ask(app, kind, body, str(number), leaves)
        usage = purse.by_coin.get(str(number))
        if usage is None:
            assert leaves is not None
            ends["nothing"] += 1
        else:
            assert usage.completion_tokens == min(fake.sent, made) if body["stream"] else made, (number, body, leaves)
            ends["whole" if b"[DONE]" in answer or not body["stream"] else "cancelled"] += 1
    assert fake.open == 0
    assert min(ends[end] for end in ("whole", "cancelled", "nothing")) >= count // 50, ends
    await upstream.aclose()
