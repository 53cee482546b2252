"""Connections that never finish a request's head: hung up on in time, whatever they drip, and others are served."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import anyio.abc
import httpx
import pytest

from serving_sockets import listening
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import Free
from tessera.serving.server import ServerLimits
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
LIMITS = ServerLimits(head_bytes=4_096, head_timeout_s=0.3)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    app = create_app(GatewayConfig(), [LocalModel("m", FakeEngine(), CharTokenizer())], [Free()])
    async with listening(app, LIMITS) as url:
        yield url


async def connect(url: str) -> anyio.abc.SocketStream:
    return await anyio.connect_tcp("127.0.0.1", int(url.rsplit(":", 1)[1]))


async def hung_up(stream: anyio.abc.SocketStream) -> bytes:
    """What the server says until it hangs up."""
    received = b""
    with anyio.fail_after(10):
        try:
            while True:
                received += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return received
        finally:
            await stream.aclose()


async def drip(stream: anyio.abc.SocketStream) -> None:
    try:
        for _ in range(1_000):
            await stream.send(b"x: y\r\n")
            await anyio.sleep(0.02)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        return
    raise AssertionError("nobody hung up")


async def test_a_silent_connection_is_closed(url: str) -> None:
    async with await connect(url) as stream:
        assert await hung_up(stream) == b""


async def test_dripping_headers_renew_nothing(url: str) -> None:
    async with await connect(url) as stream, anyio.create_task_group() as group:
        await stream.send(b"POST /v1/completions HTTP/1.1\r\nHost: g\r\n")
        group.start_soon(drip, stream)
        await hung_up(stream)


async def test_the_second_request_of_a_connection_has_the_same_deadline(url: str) -> None:
    async with await connect(url) as stream, anyio.create_task_group() as group:
        await stream.send(b"GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n")
        assert (await stream.receive()).startswith(b"HTTP/1.1 200")
        await stream.send(b"GET /healthz HTTP/1.1\r\n")
        group.start_soon(drip, stream)
        await hung_up(stream)


async def test_a_head_that_is_too_large_is_refused(url: str) -> None:
    async with await connect(url) as stream:
        await stream.send(b"GET /healthz HTTP/1.1\r\nHost: g\r\nx: " + b"y" * 8_192 + b"\r\n")
        assert (await hung_up(stream)).startswith(b"HTTP/1.1 400")


async def test_an_answer_that_takes_longer_than_a_head_may_is_not_cut_off() -> None:
    engine = FakeEngine(delay_s=0.1)
    app = create_app(GatewayConfig(), [LocalModel("m", engine, CharTokenizer())], [Free()])
    async with listening(app, LIMITS) as url, httpx.AsyncClient(base_url=url) as client:
        asked = {"model": "m", "prompt": "ab", "max_tokens": 4}
        for _ in range(2):
            assert (await client.post("/v1/completions", json=asked)).json()["choices"][0]["text"] == "abab"


async def test_many_silent_connections_do_not_keep_others_out(url: str) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(50):
            stream = await connect(url)
            group.start_soon(hung_up, stream)
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/healthz")).status_code == 200
