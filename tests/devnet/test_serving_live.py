"""The gateway behind a real server and real sockets: pieces arrive while the model works, and leaving stops it."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from openai import AsyncOpenAI

from serving_sockets import listening
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import Free
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
MODEL = "m"


@asynccontextmanager
async def serving(engine: FakeEngine, **settings: Any) -> AsyncIterator[str]:
    app = create_app(GatewayConfig(**settings), [LocalModel(MODEL, engine, CharTokenizer())], [Free()])
    async with listening(app) as url:
        yield url


async def test_pieces_arrive_one_by_one_and_leaving_frees_the_engine() -> None:
    engine = FakeEngine(delay_s=0.01, context=10_000)
    async with serving(engine) as url:
        client = AsyncOpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0)
        stream = await client.completions.create(model=MODEL, prompt="abc", max_tokens=5_000, stream=True)
        seen = 0
        async for chunk in stream:
            seen += len(chunk.choices[0].text)
            if seen >= 6:
                break
        assert engine.produced < 100  # a gateway that buffered would have run to the end, 50 s later
        await stream.close()
        with anyio.fail_after(5):
            while engine.open:
                await anyio.sleep(0.01)
        assert engine.produced < 200
        await client.close()


async def test_a_whole_answer_and_an_error_over_sockets() -> None:
    async with serving(FakeEngine()) as url, httpx.AsyncClient(base_url=url) as client:
        asked = {"model": MODEL, "prompt": "ab", "max_tokens": 4}
        assert (await client.post("/v1/completions", json=asked)).json()["choices"][0]["text"] == "abab"
        refused = await client.post("/v1/completions", content=b"x" * (2 << 20))
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
        assert (await client.get("/healthz")).json()["active"] == 0


async def test_a_slow_loris_is_answered_408_and_hung_up_on() -> None:
    async with serving(FakeEngine(), body_timeout_s=0.1) as url:
        port = int(url.rsplit(":", 1)[1])
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(b"POST /v1/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 1000\r\n\r\n{")
            received = b""
            with anyio.fail_after(5):
                while b"\r\n\r\n" not in received:
                    received += await stream.receive()
            assert received.startswith(b"HTTP/1.1 408")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_works_unchanged() -> None:
    asked = json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "stream": True}
    )
    async with serving(FakeEngine()) as url:
        command = ["curl", "-sSN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json",
                   "-H", "Authorization: Bearer any", "-d", asked]  # fmt: skip
        done = await anyio.run_process(command)
    assert done.stdout.endswith(b"data: [DONE]\n\n")
    assert done.stdout.count(b'"content":"') == 5
