"""Blobs as others have to cut, name, ask for and send them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from p2p_world import key
from tessera.core import encoding
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blob_wire import BLOBS, piece_bytes, serve_blobs
from tessera.p2p.memory import MemoryNetwork, run_virtual

Golden = Callable[[str, Any], None]

CASES = [("", 0), ("a", 1), ("tessera\n", 131_072), ("tessera\n", 131_073), ("0123456789abcdef", 200_000)]


def exchanges(store: BlobStore, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is said on the streams of these requests: the first message each way, and how long the others are."""
    said: list[dict[str, Any]] = []

    async def main() -> None:
        network = MemoryNetwork(random.Random(1))
        async with network.start(key(1)) as me, network.start(key(2)) as peer:
            serve_blobs(peer, store)
            for request in requests:
                stream = await me.open(peer.record(), BLOBS, timeout_s=5)
                asked = encoding.encode(request)
                await stream.send(asked, last=True)
                head, pieces = await stream.recv(10_000), []
                with anyio.fail_after(5):
                    while piece := await stream.recv(1 << 20):
                        pieces.append(len(piece))
                said.append({"request": asked.decode(), "answer": head.decode(), "pieces": pieces})

    run_virtual(main)
    return said


def test_a_blob_is_cut_named_and_sent_as_recorded(golden: Golden, tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blobs = [store.put(text.encode() * times) for text, times in CASES]
    small, large = blobs[1], blobs[4]
    requests: list[dict[str, Any]] = [
        {"blob": small},
        {"blob": small, "chunk": 0, "offset": 0},
        {"blob": large, "chunk": 3, "offset": 40_000},
        {"blob": large, "chunk": 3, "offset": 60_000},
        {"blob": large, "chunk": 4, "offset": 0},
        {"blob": "ab" * 32},
        {"blob": large, "chunk": 0},
    ]
    golden(
        "specs/vectors/blobs.json",
        {
            "protocol": BLOBS,
            "blobs": [
                {"text": text, "times": times, "index": store.index(blob).to_bytes().decode(), "id": blob}
                for (text, times), blob in zip(CASES, blobs, strict=True)
            ],
            "streams": exchanges(store, requests),
            "piece_bytes": {str(size): piece_bytes(size) for size in (0, 8 << 20, 16 << 20, 100_000_000, 1 << 37)},
        },
    )
