"""What the tests of peers share: the same world on each adapter, and a peer that can be killed.

The memory world runs in virtual time; the iroh and zmq worlds in real time, on loopback. `python tests/p2p_world.py
ENGINE SEED` is a peer process of its own, for those who want to kill one.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.memory import MemoryNetwork, run_virtual
from tessera.p2p.transport import PeerRecord, Stream, Transport
from tessera.p2p.zmq_transport import ZmqTransport

LIMIT = 16 << 20


def key(number: int) -> PeerKey:
    return PeerKey(bytes([number]) * 32)


async def echo(stream: Stream) -> None:
    while data := await stream.recv(LIMIT):
        await stream.send(data)


async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """Says who asked what, and gives the body back, after `wait_s`."""
    await anyio.sleep(request.get("wait_s", 0))
    return {"peer": peer, "request": request}, body


async def block(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """Holds up its whole event loop."""
    time.sleep(request["seconds"])  # noqa: ASYNC251
    return {}, b""


def serve_all(transport: Transport) -> None:
    transport.serve("echo/1", echo)
    serve_calls(transport, "answer/1", answer, request_limit=1 << 20, max_streams=256)


@dataclass
class Doomed:
    """A peer that serves `echo/1` and `answer/1` until `kill()`, which it does not survive to say goodbye."""

    record: PeerRecord
    kill: Callable[[], None]
    pid: int = 0  # of its process, where it has one of its own


class MemoryWorld:
    name = "memory"
    silence_s = 1.0  # at least this long until a dead peer is noticed

    def __init__(self) -> None:
        self.network = MemoryNetwork(random.Random(7), delay_s=0.001)

    def run(self, contract: Callable[..., Awaitable[None]]) -> None:
        run_virtual(contract, self)

    def start(self, peer: PeerKey) -> AbstractAsyncContextManager[Transport]:
        return self.network.start(peer)

    def dead_address(self) -> str:
        return "memory:node:9999"

    @asynccontextmanager
    async def doomed(self, peer: PeerKey) -> AsyncIterator[Doomed]:
        async with self.network.start(peer) as transport:
            serve_all(transport)
            yield Doomed(transport.record(), lambda: self.network.kill(peer.id))


@asynccontextmanager
async def process(engine: str, peer: PeerKey) -> AsyncIterator[Doomed]:
    """A peer in a process of its own."""
    command = [sys.executable, __file__, engine, peer.seed.hex()]
    async with await anyio.open_process(command, stderr=None) as child:
        if child.stdout is None:
            raise RuntimeError("the process has no output")
        try:
            text = b""
            with anyio.fail_after(30):
                while not text.endswith(b"\n"):
                    text += await child.stdout.receive()
            yield Doomed(PeerRecord.from_text(text.decode().strip()), child.kill, child.pid)
        finally:
            if child.returncode is None:
                child.kill()


class IrohWorld:
    name = "iroh"
    silence_s = 1.0

    def run(self, contract: Callable[..., Awaitable[None]]) -> None:
        anyio.run(contract, self)

    def start(self, peer: PeerKey) -> AbstractAsyncContextManager[Transport]:
        return IrohTransport.start(peer)

    def dead_address(self) -> str:
        return "iroh:127.0.0.1:9"

    def doomed(self, peer: PeerKey) -> AbstractAsyncContextManager[Doomed]:
        return process("iroh", peer)


class ZmqWorld:
    name = "zmq"
    silence_s = 0.0  # the kernel of a killed process says so

    def run(self, contract: Callable[..., Awaitable[None]]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as self.dead:
            anyio.run(contract, self)

    def start(self, peer: PeerKey) -> AbstractAsyncContextManager[Transport]:
        return ZmqTransport.start(peer)

    def dead_address(self) -> str:
        """Somebody who lets us connect and never says a word."""
        return f"zmq:127.0.0.1:{self.dead.getsockname()[1]}"

    def doomed(self, peer: PeerKey) -> AbstractAsyncContextManager[Doomed]:
        return process("zmq", peer)


WORLDS: list[Callable[[], Any]] = [MemoryWorld, IrohWorld, ZmqWorld]


async def _be_a_peer(engine: str, seed: bytes) -> None:
    start = {"iroh": IrohTransport.start, "zmq": ZmqTransport.start}[engine]
    async with start(PeerKey(seed)) as transport:
        serve_all(transport)
        serve_calls(transport, "block/1", block)
        sys.stdout.write(transport.record().to_text() + "\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(_be_a_peer, sys.argv[1], bytes.fromhex(sys.argv[2]))
