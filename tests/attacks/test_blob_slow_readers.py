"""Peers that ask for blobs and do not read them, or do not even ask: what they can hold is counted, and given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from blob_world import DATA, served, stores
from tessera.core import encoding
from tessera.core.ids import BlobId
from tessera.p2p import memory_wire
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blob_wire import BLOBS, MAX_STREAMS, READ_BYTES, TAKE_S
from tessera.p2p.blobs import fetch, serve_blobs
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import Transport


class Watched:
    """A store that counts what is open, and how much is read at once."""

    def __init__(self, store: BlobStore) -> None:
        self.index, self.open_index, self._store = store.index, store.open_index, store
        self.open = self.most_open = self.most_read = 0

    def open_chunk(self, blob: BlobId, number: int) -> Any:
        chunk, watched = self._store.open_chunk(blob, number), self
        watched.open += 1
        watched.most_open = max(watched.most_open, watched.open)

        class Chunk:
            size = chunk.size

            def read(self, offset: int, size: int) -> bytes:
                watched.most_read = max(watched.most_read, size)
                return chunk.read(offset, size)

            def close(self) -> None:
                watched.open -= 1
                chunk.close()

        return Chunk()


def test_slow_readers_hold_little_and_only_their_own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_wire, "WINDOW", 1 << 16)  # less than a chunk, so that a reader can hold a writer up
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob, watched = theirs.put(DATA), Watched(theirs)
    request = encoding.encode({"blob": blob, "chunk": 0, "offset": 0})

    async def ask_and_wait(transport: Transport, victim: Transport) -> None:
        stream = await transport.open(victim.record(), BLOBS, timeout_s=60, confirm=False)
        await stream.send(request, last=True)
        await anyio.sleep_forever()

    async def body(network: MemoryNetwork, me: Transport, victim: Transport, attacker: Transport) -> None:
        serve_blobs(victim, watched)  # type: ignore[arg-type]
        network.wire(victim.id, attacker.id).rate_bytes_per_s = 100.0
        async with anyio.create_task_group() as tasks:
            for _ in range(3 * MAX_STREAMS):
                tasks.start_soon(ask_and_wait, attacker, victim)
            await anyio.sleep(1)
            started = anyio.current_time()
            got = await fetch(me, [victim.record()], blob, mine, timeout_s=60)
            assert anyio.current_time() - started < 5
            assert got.path.read_bytes() == DATA
            assert watched.open == MAX_STREAMS
            await anyio.sleep(TAKE_S + 10)
            assert watched.open == 0
            tasks.cancel_scope.cancel()
        assert watched.most_open <= MAX_STREAMS + 3
        assert watched.most_read <= READ_BYTES

    served(2, body, rate_bytes_per_s=10e6)


def test_streams_on_which_nothing_is_asked_are_ended(tmp_path: Path) -> None:
    (theirs,) = stores(tmp_path, "theirs")
    blob = theirs.put(DATA)

    async def body(network: MemoryNetwork, me: Transport, victim: Transport) -> None:
        serve_blobs(victim, theirs)
        for _ in range(MAX_STREAMS):
            await me.open(victim.record(), BLOBS, timeout_s=60)
        await anyio.sleep(15)
        stream = await me.open(victim.record(), BLOBS, timeout_s=1)
        await stream.send(encoding.encode({"blob": blob}), last=True)
        assert (await stream.recv(100)).startswith(b'{"size":')

    served(1, body)
