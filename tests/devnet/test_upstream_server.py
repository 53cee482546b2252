"""`tessera serve --upstream`: two gateways in a row over real sockets, the second one an upstream like any other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import httpx
import pytest
from openai import AsyncOpenAI

from serving_sockets import listening
from tessera.core.clock import SystemClock
from tessera.core.errors import Late, Unavailable
from tessera.devnet.model_till import Access
from tessera.devnet.upstream_server import UpstreamServed, serve_upstream
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.keys import OperatorKeys
from tessera.serving.text import CharTokenizer
from tessera.serving.upstreams.outgoing import HttpPoster
from tessera.serving.upstreams.upstream import Target
from tessera.training.home import Home

pytestmark = pytest.mark.anyio
ASKED = {"model": "ours", "prompt": "ab", "max_tokens": 4}


@asynccontextmanager
async def in_a_row(tmp_path: Path, engine: FakeEngine, access: Access | None = None) -> AsyncIterator[UpstreamServed]:
    """`engine` as `theirs` behind a gateway that knows one key, served as `ours` by another."""
    app = create_app(GatewayConfig(), [LocalModel("theirs", engine, CharTokenizer())], [OperatorKeys(["upstream-key"])])
    async with listening(app) as url:
        targets = [Target("http://127.0.0.1:1/v1"), Target(f"{url}/v1", "theirs", "upstream-key")]
        opening = serve_upstream(Home(tmp_path), "ours", targets, 1_000, SystemClock(), access=access)
        async with opening as served:
            yield served


async def test_an_upstream_is_asked_with_its_own_key_and_callers_with_theirs(tmp_path: Path) -> None:
    async with in_a_row(tmp_path, FakeEngine()) as served, httpx.AsyncClient(base_url=served.url) as client:
        assert (await client.post("/v1/completions", json=ASKED)).status_code == 401
        keyed = {"authorization": f"Bearer {served.first_key}"}
        answer = await client.post("/v1/completions", json=ASKED, headers=keyed)
        assert answer.json()["choices"][0]["text"] == "abab"
        assert answer.json()["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
        assert (await client.get("/v1/models")).json()["data"][0]["context_length"] == 1_000
        streamed = await client.post("/v1/completions", json=ASKED | {"stream": True}, headers=keyed)
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert (await client.post("/v1/completions", json=ASKED | {"n": 3}, headers=keyed)).status_code == 200


async def test_leaving_frees_the_engine_behind_the_upstream(tmp_path: Path) -> None:
    engine = FakeEngine(delay_s=0.01, context=10_000)
    async with in_a_row(tmp_path, engine, Access(free=True)) as served:
        client = AsyncOpenAI(api_key="any", base_url=f"{served.url}/v1", max_retries=0)
        stream = await client.completions.create(model="ours", prompt="abc", max_tokens=900, stream=True)
        seen = 0
        async for chunk in stream:
            seen += len(chunk.choices[0].text)
            if seen >= 6:
                break
        assert engine.produced < 100  # a gateway that buffered would have waited for all 900
        await stream.close()
        with anyio.fail_after(10):
            while engine.open:
                await anyio.sleep(0.01)
        assert engine.produced < 300
        await client.close()


async def silent(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        await stream.receive()
        await anyio.sleep(60)


async def half(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        await stream.receive()
        await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf of it")


async def hanging_up(stream: anyio.abc.SocketStream) -> None:
    async with stream:
        await stream.receive()


async def read_all(poster: HttpPoster, url: str) -> bytes:
    reply = await poster.post(url, {}, b"{}")
    try:
        return b"".join([chunk async for chunk in reply.chunks()])
    finally:
        reply.close()


@pytest.mark.parametrize(("habit", "error"), [(silent, Late), (half, Unavailable), (hanging_up, Unavailable)])
async def test_a_server_that_breaks_is_a_named_error(habit: object, error: type[Exception]) -> None:
    poster = HttpPoster(connect_timeout_s=5, byte_timeout_s=0.2, max_connections=2)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, habit)
            with pytest.raises(error):
                await read_all(poster, f"http://127.0.0.1:{port}/")
            group.cancel_scope.cancel()
    await poster.aclose()


async def test_nobody_listening_is_unavailable() -> None:
    poster = HttpPoster(connect_timeout_s=5, byte_timeout_s=5, max_connections=2)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await poster.post("http://127.0.0.1:1/", {}, b"{}")
    await poster.aclose()


@pytest.mark.slow
async def test_the_command_serves_an_upstream(tmp_path: Path) -> None:
    app = create_app(GatewayConfig(), [LocalModel("theirs", FakeEngine(), CharTokenizer())], [OperatorKeys(["k"])])
    async with listening(app) as url:
        command = [sys.executable, "-m", "tessera", "serve", "ours", "--upstream", f"{url}/v1", "--upstream-model",
                   "theirs", "--free", "--json", "--port", "0", "--state-dir", str(tmp_path)]  # fmt: skip
        environment = os.environ | {"TESSERA_UPSTREAM_KEY": "k"}
        async with await anyio.open_process(command, env=environment, stderr=None) as process:
            assert process.stdout is not None
            with anyio.fail_after(100):
                facts = json.loads(await process.stdout.receive())
            async with httpx.AsyncClient() as client:
                answer = await client.post(f"{facts['url']}/completions", json=ASKED)
            assert answer.json()["choices"][0]["text"] == "abab"
            process.terminate()
