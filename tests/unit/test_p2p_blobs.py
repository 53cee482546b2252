"""Blobs: put, kept, served, fetched; with liars, cuts and damaged disks."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import anyio
import pytest

from blob_world import DATA, MISSING, Counting, serve_wrong, served, stores
from p2p_world import key
from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Missing, Unavailable
from tessera.core.ids import BlobId
from tessera.p2p.blob_index import CHUNK_BYTES, BlobIndex
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blob_wire import asking, piece_bytes
from tessera.p2p.blobs import fetch, serve_blobs
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import PeerRecord, Transport

# --- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(DATA)])
def test_bytes_and_a_file_with_the_same_bytes_are_the_same_blob(tmp_path: Path, size: int) -> None:
    first, second = stores(tmp_path, "a", "b")
    (tmp_path / "file").write_bytes(DATA[:size])
    blob = first.put(DATA[:size])
    assert second.put(tmp_path / "file") == blob == first.put(DATA[:size])
    assert first.has(blob)
    assert first.path(blob).read_bytes() == second.path(blob).read_bytes() == DATA[:size]
    assert sorted(file.name for file in first.folder.iterdir()) == [".room", blob, f"{blob}.index", f"{blob}.pin-own"]


def test_the_id_is_the_hash_of_the_index() -> None:
    index = BlobIndex(0, ())
    assert index.to_bytes() == b'{"chunk":1048576,"sha256":[],"size":0}'
    assert index.id == "2a04eb97cd31b611bfdc2c201b5812fd2474f1e0dbaefd26b32b3a555175491e"


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "/etc/passwd", "AB" * 32, "ab" * 31 + "/.", "ab" * 33])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (store,) = stores(tmp_path, "a")
    for action in (store.path, store.has, store.index, store.remove, lambda n: store.read_chunk(n, 0)):
        with pytest.raises(Invalid, match="blob id"):
            action(BlobId(name))


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    (store,) = stores(tmp_path, "a")
    blob = store.put(b"x")
    for action in (
        lambda: store.path(MISSING),
        lambda: store.index(MISSING),
        lambda: store.read_chunk(blob, 1),
        lambda: store.read_chunk(blob, -1),
        lambda: store.put(tmp_path / "no such file"),
    ):
        with pytest.raises(Missing):
            action()


def test_a_blob_that_the_disk_damaged_is_not_served_and_not_offered_again(tmp_path: Path) -> None:
    (store,) = stores(tmp_path, "a")
    blob = store.put(DATA)
    with store.path(blob).open("r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(b"damage")
    assert store.read_chunk(blob, 0) == DATA[:CHUNK_BYTES]
    with pytest.raises(Unavailable, match="damaged"):
        store.read_chunk(blob, 1)
    assert not store.has(blob)


def test_a_disk_that_refuses_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="cannot write"):
        BlobStore(tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"chunk":1,"sha256":[],"size":0}',
        b'{"chunk":1048576,"sha256":[],"size":1}',
        b'{"chunk":1048576,"sha256":["zz"],"size":1}',
        b'{"chunk":1048576,"sha256":[],"size":-1}',
        b'{"chunk":1048576,"sha256":[],"size":true}',
        b'{"chunk":1048576,"sha256":{},"size":0}',
        b'{"chunk":1048576,"sha256":[],"size":0,"x":1}',
    ],
)
def test_an_index_that_makes_no_sense_is_invalid_even_with_a_right_hash(text: bytes) -> None:
    with pytest.raises(Invalid):
        BlobIndex.parse(BlobId(hashlib.sha256(text).hexdigest()), text)


def test_only_one_process_fetches_a_blob_into_a_folder(tmp_path: Path) -> None:
    (store,) = stores(tmp_path, "a")
    index = BlobIndex(1, (bytes(32),))
    partial = store.resume(index)
    with pytest.raises(Conflict, match="another process"):
        BlobStore(store.folder).resume(index)
    with pytest.raises(Conflict, match="0 of 1"):
        partial.finish()
    partial.close()
    store.resume(index).close()


# --- from peers -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_blob_comes_over_from_three_peers_at_nearly_three_times_the_rate(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA * 3)
    took: list[float] = []

    async def body(network: MemoryNetwork, me: Transport, *peers: Transport) -> None:
        for peer in peers:
            serve_blobs(peer, theirs)
        for sources in (peers[:1], peers):
            started = anyio.current_time()
            got = await fetch(me, [peer.record() for peer in sources], blob, mine, timeout_s=600)
            took.append(anyio.current_time() - started)
            assert got.path.read_bytes() == DATA * 3
            assert (got.fetched_bytes, got.kept_bytes, got.dropped) == (3 * len(DATA), 0, ())
            again = await fetch(me, [], blob, mine, timeout_s=1)
            assert (again.fetched_bytes, again.kept_bytes) == (0, 3 * len(DATA))
            mine.remove(blob)

    served(3, body, rate_bytes_per_s=2e6)
    assert took[0] > 2 * took[1]


def test_an_empty_blob_comes_over(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(b"")

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        got = await fetch(me, [peer.record()], blob, mine, timeout_s=5)
        assert got.path.read_bytes() == b""

    served(1, body)


@pytest.mark.parametrize("index", [False, True], ids=["chunks", "index"])
def test_a_peer_that_serves_wrong_bytes_is_dropped_and_named(tmp_path: Path, index: bool) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)

    async def body(network: MemoryNetwork, me: Transport, liar: Transport, honest: Transport) -> None:
        serve_wrong(liar, theirs, index=index)
        serve_blobs(honest, theirs)
        with pytest.raises(Misbehaviour) as caught:
            await fetch(me, [liar.record()], blob, mine, timeout_s=30)
        assert caught.value.evidence == [liar.id]
        assert liar.id[:16] in caught.value.message
        got = await fetch(me, [liar.record(), honest.record()], blob, mine, timeout_s=30)
        assert got.path.read_bytes() == DATA
        assert got.dropped == (liar.id,)

    served(2, body)


@pytest.mark.slow
def test_a_fetch_cut_twenty_times_transfers_a_few_pieces_twice(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    data = random.Random(9).randbytes(20 * CHUNK_BYTES + 5)
    blob = theirs.put(data)
    received = 0

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        nonlocal received
        serve_blobs(peer, theirs)
        rng, cuts, counting, got = random.Random(4), 0, Counting(me), None
        while got is None:
            try:
                patience = rng.uniform(0.06, 0.16) if cuts < 20 else 600
                got = await fetch(counting, [peer.record()], blob, mine, timeout_s=patience)  # type: ignore[arg-type]
            except Late:
                cuts += 1
        assert cuts == 20
        assert got.kept_bytes + got.fetched_bytes == len(data)
        assert got.fetched_bytes < got.received_bytes < 1.02 * got.fetched_bytes
        received = counting.received_bytes

    served(1, body, rate_bytes_per_s=10e6)
    assert mine.path(blob).read_bytes() == data
    assert len(data) < received <= len(data) * 1.01 + 20 * 4 * piece_bytes(len(data)) < 1.1 * len(data)


def test_a_fetch_goes_on_after_a_restart_with_what_it_kept(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)
    partial = mine.resume(theirs.index(blob))
    for number in (0, 2):
        assert partial.add(number, theirs.read_chunk(blob, number))
    assert not partial.add(1, theirs.read_chunk(blob, 0)), "a right chunk at the wrong place"
    partial.close()
    with (mine.folder / f"{blob}.part").open("r+b") as file:
        file.write(b"rot")  # chunk 0 is damaged while nobody looks
    assert mine.started_index(blob) == theirs.index(blob)

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        got = await fetch(me, [peer.record()], blob, BlobStore(mine.folder), timeout_s=30)
        assert (got.kept_bytes, got.fetched_bytes) == (CHUNK_BYTES, len(DATA) - CHUNK_BYTES)
        assert got.path.read_bytes() == DATA

    served(1, body)


def test_a_peer_that_dies_hands_its_chunks_to_the_others(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA * 2)

    async def body(network: MemoryNetwork, me: Transport, mortal: Transport, other: Transport) -> None:
        serve_blobs(mortal, theirs)
        serve_blobs(other, theirs)
        records = [mortal.record(), other.record()]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: fetch(me, records, blob, mine, timeout_s=120))
            await anyio.sleep(1)
            network.kill(mortal.id)
        assert mine.path(blob).read_bytes() == DATA * 2

    served(2, body, rate_bytes_per_s=2e6)


def test_nobody_has_it_or_nobody_answers(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")

    async def body(network: MemoryNetwork, me: Transport, peer: Transport, dead: Transport) -> None:
        serve_blobs(peer, theirs)
        gone = dead.record()
        network.kill(dead.id)
        with pytest.raises(Missing, match="none of 1"):
            await fetch(me, [peer.record()], MISSING, mine, timeout_s=30)
        with pytest.raises(Unavailable):
            await fetch(me, [gone], MISSING, mine, timeout_s=30)
        with pytest.raises(Unavailable):
            await fetch(me, [], MISSING, mine, timeout_s=30)
        with pytest.raises(Late):
            await fetch(me, [gone], MISSING, mine, timeout_s=1)
        with pytest.raises(Invalid):
            await fetch(me, [peer.record()], BlobId("../../secret"), mine, timeout_s=30)

    served(2, body)


def test_two_fetches_of_one_blob_become_one(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)
    fetched: list[int] = []

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)

        async def one() -> None:
            fetched.append((await fetch(me, [peer.record()], blob, mine, timeout_s=30)).fetched_bytes)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)

    served(1, body)
    assert sorted(fetched) == [0, len(DATA)]


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"blob": "../x"},
        {"blob": [MISSING]},
        {"blob": MISSING, "chunk": 0},
        {"blob": MISSING, "chunk": "0", "offset": 0},
        {"blob": MISSING, "chunk": 0, "offset": True},
        {"blob": MISSING, "chunk": -1, "offset": 0},
        {"blob": MISSING, "chunk": 0, "offset": 0, "x": 1},
        [],
    ],
)
def test_a_request_for_a_blob_that_makes_no_sense_is_invalid(tmp_path: Path, request_: Any) -> None:
    (store,) = stores(tmp_path, "a")

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, store)
        with pytest.raises(Invalid):
            async with asking(me, peer.record(), request_, range(10), lambda count: None):
                pytest.fail("an answer")

    served(1, body)


@pytest.mark.anyio
async def test_a_blob_comes_over_real_links(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    data = os.urandom(20_000_000)
    blob = theirs.put(data)
    async with IrohTransport.start(key(1)) as me, IrohTransport.start(key(2)) as a, IrohTransport.start(key(3)) as b:
        serve_blobs(a, theirs)
        serve_wrong(b, theirs)
        records: list[PeerRecord] = [b.record(), a.record()]
        got = await fetch(me, records, blob, mine, timeout_s=60)
    assert got.path.read_bytes() == data
    assert got.dropped == (key(3).id,)
