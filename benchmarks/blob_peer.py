"""A peer process for the figures of blobs: serves a folder's blobs, or fetches one. It is made to be killed.

    python benchmarks/blob_peer.py serve SEED FOLDER PORT RATE COUNTER
    python benchmarks/blob_peer.py fetch SEED FOLDER BLOB RECORD

`serve` listens on PORT (0: any), sends no more than RATE bytes per second (0: any), writes its record on a line, and
cuts all its streams at SIGHUP. In the 8 bytes of the file COUNTER it keeps what its links have sent in UDP datagrams:
headers, repeats and what went to a dead peer included; after a kill it is short of a piece at most. `fetch` writes how
many bytes are here as they come, and "done" in the end; SIGTERM cancels it.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import structlog

from tessera.core.errors import TesseraError
from tessera.core.ids import parse_blob_id
from tessera.core.signing import PeerKey
from tessera.p2p.blobs import BlobStore, fetch, serve_blobs
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.transport import PeerRecord, Stream

RAW = "raw/1"
RAW_BYTES = 256 * 1024  # of one message
LOOK_S = 0.05


class Counter:
    """What the links of a transport have sent, in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)
        self._before = int.from_bytes(self._map[:8], "big")
        self._links: dict[Any, int] = {}

    def look(self, transport: IrohTransport) -> None:
        for links in transport._links.values():  # no public name: only a benchmark asks
            for link in links:
                self._links[link] = link._connection.stats().udp_tx_bytes
        self._map[:8] = (self._before + sum(self._links.values())).to_bytes(8, "big")

    async def watch(self, transport: IrohTransport) -> None:
        while True:
            self.look(transport)
            await anyio.sleep(LOOK_S)


class Cap:
    """Rations bytes per second among all streams of this process."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._free_at = bytes_per_s, 0.0

    async def wait(self, size: int) -> None:
        if self._rate:
            now = anyio.current_time()
            self._free_at = max(now, self._free_at) + size / self._rate
            await anyio.sleep(self._free_at - now)


class MeteredStream:
    """A stream whose sending is counted and capped."""

    def __init__(self, stream: Stream, cap: Cap, look: Callable[[], None]) -> None:
        self._stream, self._cap, self._look = stream, cap, look

    async def send(self, data: bytes, *, last: bool = False) -> None:
        await self._cap.wait(len(data))
        await self._stream.send(data, last=last)
        self._look()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class MeteredTransport:
    """A transport whose served streams are counted and capped."""

    def __init__(self, transport: IrohTransport, cap: Cap, counter: Counter) -> None:
        self._transport, self._cap, self._counter = transport, cap, counter
        self._streams: set[Stream] = set()

    def serve(self, protocol: str, handler: Callable[[Any], Awaitable[None]], **settings: Any) -> None:
        async def metered(stream: Stream) -> None:
            self._streams.add(stream)
            try:
                await handler(MeteredStream(stream, self._cap, lambda: self._counter.look(self._transport)))
            finally:
                self._streams.discard(stream)

        self._transport.serve(protocol, metered, **settings)

    async def cut(self) -> None:
        """Drop what is being sent, in the middle of a message."""
        for stream in list(self._streams):
            await stream.abort()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def send_raw(stream: Stream) -> None:
    """As many bytes as are asked for, in large messages: what the transport itself can do."""
    left, block = int(await stream.recv(20)), bytes(RAW_BYTES)
    while left:
        size = min(left, RAW_BYTES)
        left -= size
        await stream.send(memoryview(block)[:size], last=not left)


async def serve(key: PeerKey, folder: Path, port: int, cap: Cap, counter: Counter) -> None:
    store = BlobStore(folder)
    with anyio.open_signal_receiver(signal.SIGHUP) as cuts:
        async with IrohTransport.start(key, bind=f"127.0.0.1:{port}") as transport:
            metered = MeteredTransport(transport, cap, counter)
            serve_blobs(metered, store)  # type: ignore[arg-type]
            transport.serve(RAW, send_raw)
            say(transport.record().to_text())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(counter.watch, transport)
                while True:
                    await cuts.__anext__()
                    await metered.cut()


async def get(key: PeerKey, folder: Path, blob: str, record: str) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_at_sigterm, tasks.cancel_scope)
        async with IrohTransport.start(key) as transport:
            store, peers = BlobStore(folder), [PeerRecord.from_text(record)]
            try:
                await fetch(
                    transport, peers, parse_blob_id(blob), store, timeout_s=600, progress=lambda here, _: say(str(here))
                )
            except TesseraError as error:
                sys.stderr.write(f"{error.code}: {error.message}\n")
                sys.exit(75)  # to be tried again
            say("done")
        tasks.cancel_scope.cancel()


async def cancel_at_sigterm(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as terms:
        await terms.__anext__()
        scope.cancel()


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for the parent
    what, seed, path, *rest = sys.argv[1:]
    peer = PeerKey(bytes.fromhex(seed))
    if what == "serve":
        anyio.run(serve, peer, Path(path), int(rest[0]), Cap(float(rest[1])), Counter(Path(rest[2])))
    else:
        anyio.run(get, peer, Path(path), rest[0], rest[1])
