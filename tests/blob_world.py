"""What the tests of blobs share: stores, peers in virtual time, liars, and a transport that counts."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

from p2p_world import key
from tessera.core.ids import BlobId
from tessera.p2p.blob_index import CHUNK_BYTES
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blobs import serve_blobs
from tessera.p2p.memory import MemoryNetwork, run_virtual
from tessera.p2p.transport import Transport

DATA = random.Random(1).randbytes(5 * CHUNK_BYTES + 77)
MISSING = BlobId("ab" * 32)


def stores(folder: Path, *names: str) -> list[BlobStore]:
    return [BlobStore(folder / name) for name in names]


def served(count: int, body: Callable[..., Awaitable[None]], **settings: Any) -> None:
    """Run `body(network, me, peers...)` with `count` peers in virtual time."""

    async def main() -> None:
        network = MemoryNetwork(random.Random(3), delay_s=0.01, **settings)
        async with network.start(key(1)) as me:
            async with anyio.create_task_group() as tasks:
                peers: list[Transport] = []

                async def peer(number: int, *, task_status: Any) -> None:
                    async with network.start(key(number)) as transport:
                        peers.append(transport)
                        task_status.started()
                        await anyio.sleep_forever()

                for number in range(2, 2 + count):
                    await tasks.start(peer, number)
                await body(network, me, *peers)
                tasks.cancel_scope.cancel()

    run_virtual(main)


class Spoiled:
    """Bytes of which one is wrong."""

    def __init__(self, right: Any, place: int) -> None:
        self._right, self._place, self.size = right, place % right.size, right.size

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(self._right.read(offset, size))
        if offset <= self._place < offset + len(data):
            data[self._place - offset] ^= 1
        return bytes(data)

    def close(self) -> None:
        self._right.close()


class Liar:
    """A store that serves wrong bytes: of the chunks that `lies` picks, the byte at `place`; or of the index."""

    def __init__(self, store: BlobStore, *, index: bool = False, place: int = -1, lies: Any = lambda number: True):
        self._store, self._index, self._place, self._lies = store, index, place, lies
        self.index = store.index

    def open_index(self, blob: BlobId) -> Any:
        right = self._store.open_index(blob)
        return Spoiled(right, -1) if self._index else right

    def open_chunk(self, blob: BlobId, number: int) -> Any:
        right = self._store.open_chunk(blob, number)
        return Spoiled(right, self._place) if self._lies(number) and not self._index else right


def serve_wrong(transport: Transport, store: BlobStore, **how: Any) -> None:
    serve_blobs(transport, Liar(store, **how))  # type: ignore[arg-type]


class Counting:
    """A transport that counts what its streams receive, whatever the fetch says of it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.streams: list[Any] = []

    async def open(self, *args: Any, **settings: Any) -> Any:
        self.streams.append(await self._transport.open(*args, **settings))
        return self.streams[-1]

    @property
    def received_bytes(self) -> int:
        return sum(stream.received_bytes for stream in self.streams)
