"""An upstream for tests: an OpenAI-like server without a socket: it answers, dawdles, lies and breaks as it is told."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from tessera.core.errors import Unavailable
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.paying.charging import Free, Payments
from tessera.serving.upstreams.outgoing import Reply
from tessera.serving.upstreams.upstream import Target, Upstream, UpstreamConfig

MODEL = "m"
SECRET = "sk-upstream-secret"
TARGETS = (Target("http://one/v1", model="theirs", api_key=SECRET), Target("http://two/v1"))


@dataclass
class FakeUpstream:
    """`pieces` are what it says, `usage` what it reports. `faults` by host: an exception, a status, or a response."""

    pieces: Sequence[str] = ("Hel", "lo ", "€")
    usage: dict[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 2, "completion_tokens": 5})
    delay_s: float = 0.0
    faults: dict[str, Any] = field(default_factory=dict)
    body: bytes | None = None  # instead of an answer
    headers: dict[str, str] = field(default_factory=dict)
    breaks_after: int | None = None  # pieces
    asked: list[httpx.Request] = field(default_factory=list)
    open: int = 0
    sent: int = 0

    @property
    def last(self) -> dict[str, Any]:
        return json.loads(self.asked[-1].content)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """See `Poster.post`."""
        self.asked.append(httpx.Request("POST", url, headers=headers, content=body))
        reply = self.answer(self.asked[-1])
        assert isinstance(reply.stream, Body)
        return FakeReply(reply.status_code, reply.headers, reply.stream)

    async def aclose(self) -> None:
        """Nothing is kept."""

    def answer(self, request: httpx.Request) -> httpx.Response:
        fault = self.faults.get(request.url.host)
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, httpx.Response):
            return httpx.Response(fault.status_code, headers=fault.headers, stream=Body(self, [fault.content]))
        if isinstance(fault, int):
            told = {"error": {"message": f"failed with {SECRET}", "type": "x"}}
            return httpx.Response(fault, stream=Body(self, [json.dumps(told).encode()]))
        body = json.loads(request.content)
        if self.body is not None:
            return httpx.Response(200, headers=self.headers, stream=Body(self, [self.body]))
        if request.url.path.endswith("embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [1.0]}]
            answer = {"object": "list", "data": data, "model": "theirs", "usage": self.usage}
            return httpx.Response(200, stream=Body(self, [json.dumps(answer).encode()]))
        chat = request.url.path.endswith("chat/completions")
        chunks = self._stream(body, chat) if body.get("stream") else [self._whole(chat)]
        return httpx.Response(200, headers=self.headers, stream=Body(self, chunks))

    def _whole(self, chat: bool) -> bytes:
        text = "".join(self.pieces)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return json.dumps(self._named("chat.completion", [choice]) | {"usage": self.usage}).encode()

    def _stream(self, body: dict[str, Any], chat: bool) -> list[bytes]:
        def said(text: str, reason: str | None = None) -> dict[str, Any]:
            return {"index": 0, "finish_reason": reason} | ({"delta": {"content": text}} if chat else {"text": text})

        chunks = [self._event(self._named("chunk", [said(piece)])) for piece in self.pieces]
        chunks.append(self._event(self._named("chunk", [said("", "stop")])))
        if self.usage is not None and body.get("stream_options", {}).get("include_usage"):
            chunks.append(self._event(self._named("chunk", []) | {"usage": self.usage}))
        return [*chunks, b"data: [DONE]\n\n"]

    def _named(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": "up-1", "object": kind, "created": 1, "model": "theirs", "choices": choices}

    def _event(self, data: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(data).encode() + b"\n\n"


class Body(httpx.AsyncByteStream):
    """Chunks as they come; knows whether somebody still reads."""

    def __init__(self, owner: FakeUpstream, chunks: Sequence[bytes]) -> None:
        self._owner, self._chunks, self._closed = owner, chunks, False
        owner.open += 1

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number, chunk in enumerate(self._chunks):
            if number == self._owner.breaks_after:
                raise Unavailable("gone")
            await anyio.sleep(self._owner.delay_s)
            self._owner.sent += 1
            yield chunk

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._owner.open -= 1


@dataclass
class FakeReply:
    status: int
    headers: Mapping[str, str]
    stream: Body

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        async for chunk in self.stream:
            yield chunk

    def close(self) -> None:
        self.stream.close()


def make_upstream(fake: FakeUpstream, *, targets: Sequence[Target] = TARGETS, **settings: Any) -> Upstream:
    tokenizer, clock = settings.pop("tokenizer", None), settings.pop("clock", None)
    return Upstream(MODEL, targets, UpstreamConfig(**settings), tokenizer=tokenizer, clock=clock, poster=fake)


@asynccontextmanager
async def open_gateway(fake: FakeUpstream, *ways: Payments, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    upstream = make_upstream(fake, **settings)
    app = create_app(GatewayConfig(token_timeout_s=5, max_concurrent=64), [upstream], ways or [Free()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client
        assert (await client.get("/healthz")).json()["active"] == 0
    await upstream.aclose()
    assert fake.open == 0, "a call to the upstream was left open"
