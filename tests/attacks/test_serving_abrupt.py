"""Clients that vanish with a reset, at every moment: no session, place or payment stays held, and others are served."""

from __future__ import annotations

import json
import random
import socket
import struct

import anyio
import httpx
import pytest

from serving_sockets import listening
from serving_upstream import FakeUpstream, make_upstream
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
CLIENTS = 60


def request(number: int, stream: bool) -> bytes:
    """Every other one asks the upstream."""
    asked = {"model": ("ours", "m")[number % 2], "messages": [{"role": "user", "content": "ab"}], "max_tokens": 400}
    body = json.dumps(asked | {"stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nPAYMENT-SIGNATURE: {number}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def vanish(port: int, number: int, rng: random.Random) -> None:
    """Sends all of a request or a part of it, reads a little or nothing, and resets the connection."""
    stream = await anyio.connect_tcp("127.0.0.1", port)
    sent = request(number, stream=rng.random() < 0.7)
    await stream.send(sent if rng.random() < 0.7 else sent[: rng.randrange(1, len(sent))])
    with anyio.move_on_after(rng.random() * 0.2):
        await stream.receive(rng.randrange(1, 4_000))
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()


async def test_clients_that_reset_their_connections_leave_nothing_behind() -> None:
    rng = random.Random(7)
    engine = FakeEngine(delay_s=0.002, context=1_000)
    fake = FakeUpstream(pieces=["x"] * 400, delay_s=0.002)
    upstream, payments = make_upstream(fake), FakePayments({str(number) for number in range(CLIENTS)})
    model = LocalModel("ours", engine, CharTokenizer())
    app = create_app(GatewayConfig(max_concurrent=CLIENTS, body_timeout_s=0.5), [model, upstream], [payments])
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        async with anyio.create_task_group() as group:
            for number in range(CLIENTS):
                group.start_soon(vanish, int(url.rsplit(":", 1)[1]), number, rng)
        with anyio.fail_after(20):
            while engine.open or fake.open or (await client.get("/healthz")).json()["active"]:
                await anyio.sleep(0.02)
        assert payments.held == set()
        assert engine.started > 5
        assert len(fake.asked) > 5
        payments.coins.add("last")
        asked = {"model": "ours", "prompt": "ab", "max_tokens": 4}
        answer = await client.post("/v1/completions", json=asked, headers={"PAYMENT-SIGNATURE": "last"})
        assert answer.json()["choices"][0]["text"] == "abab"
    for number in range(CLIENTS):  # whose money moved has had a part of an answer, or is owed one
        assert (str(number) in payments.coins) != (str(number) in payments.settled)
    await upstream.aclose()
