"""Blobs behind a URL: uploads that break off, caches that are full, storages that lie or are not there."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blob_world import DATA, MISSING, served, stores
from tessera.core.errors import Invalid, Misbehaviour, Missing, Unavailable
from tessera.p2p.blob_backend import FsspecBackend, open_blob_store
from tessera.p2p.blob_index import CHUNK_BYTES
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blobs import fetch, serve_blobs
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import Transport


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4()}/team" if request.param == "memory" else f"file://{tmp_path}/team"


def machines(url: str, tmp_path: Path, *names: str, **settings: Any) -> Iterator[BlobStore]:
    """Stores of several machines on one storage."""
    return (open_blob_store(url, cache=tmp_path / name, **settings) for name in names)


def test_a_path_is_a_plain_folder(tmp_path: Path) -> None:
    for place in (tmp_path / "a", str(tmp_path / "a")):
        store = open_blob_store(place)
        blob = store.put(b"x")
        assert (tmp_path / "a" / blob).read_bytes() == b"x"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, len(DATA)])
def test_what_one_machine_puts_another_reads(url: str, tmp_path: Path, size: int) -> None:
    one, other = machines(url, tmp_path, "one", "other")
    blob = one.put(DATA[:size])
    assert other.has(blob)
    assert not other.is_here(blob)
    assert other.index(blob) == one.index(blob)
    if size:
        assert other.read_chunk(blob, 0) == DATA[: min(size, CHUNK_BYTES)]
        assert not other.is_here(blob), "one chunk is no reason to fetch them all"
    assert other.path(blob).read_bytes() == DATA[:size]
    assert other.is_here(blob)
    one.remove(blob)
    (third,) = machines(url, tmp_path, "third")
    assert not third.has(blob)
    for action in (third.path, third.index, lambda blob: third.read_chunk(blob, 0)):
        with pytest.raises(Missing):
            action(blob)


def test_an_upload_that_breaks_off_is_no_blob_and_goes_on(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machines(url, tmp_path, "one", "other")
    data = DATA * 3
    put_chunks, sent = FsspecBackend.put_chunks, list[int]()

    def breaks_off(self: FsspecBackend, blob: Any, chunks: dict[int, bytes]) -> None:
        if sent:
            raise Unavailable("the line is dead")
        sent.extend(chunks)
        put_chunks(self, blob, chunks)

    monkeypatch.setattr(FsspecBackend, "put_chunks", breaks_off)
    with pytest.raises(Unavailable, match="dead"):
        one.put(data)
    (blob,) = one.blobs()
    assert len(sent) == 8
    assert not other.has(blob)

    again = list[int]()
    monkeypatch.setattr(
        FsspecBackend, "put_chunks", lambda self, blob, c: (again.extend(c), put_chunks(self, blob, c))[1]
    )
    assert one.put(data) == blob
    assert sorted(sent + again) == list(range(16))
    assert other.path(blob).read_bytes() == data
    again.clear()
    one.put(data)
    assert again == [], "it is there already"


def test_a_chunk_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    one, other = machines(f"file://{tmp_path}/team", tmp_path, "one", "other")
    blob = one.put(DATA)
    chunk, index = tmp_path / "team" / blob / "000002", tmp_path / "team" / f"{blob}.index"
    index.unlink()
    chunk.write_bytes(chunk.read_bytes()[:1000])
    one.put(DATA)
    assert other.path(blob).read_bytes() == DATA


def test_an_index_that_was_half_written_is_no_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = machines(f"file://{tmp_path}/team", tmp_path, "one", "other")
    files = one._backend._fs  # type: ignore[union-attr]

    def breaks_off(path: str, data: bytes, **_: object) -> None:
        Path(path).write_bytes(data[:20])
        raise OSError("the cable is out")

    pipe = files.pipe
    monkeypatch.setattr(files, "pipe", lambda chunks: [Path(path).write_bytes(data) for path, data in chunks.items()])
    monkeypatch.setattr(files, "pipe_file", breaks_off)
    with pytest.raises(Unavailable, match="the cable is out"):
        one.put(DATA)
    monkeypatch.undo()
    assert files.pipe == pipe
    (blob,) = one.blobs()
    assert not other.has(blob)
    one.put(DATA)
    assert other.has(blob)


@pytest.mark.parametrize("what", ["chunk", "length", "index"])
def test_a_storage_with_other_bytes_is_named_and_nothing_wrong_comes_out(tmp_path: Path, what: str) -> None:
    one, other = machines(f"file://{tmp_path}/team", tmp_path, "one", "other")
    blob = one.put(DATA)
    file = tmp_path / "team" / (f"{blob}.index" if what == "index" else f"{blob}/000001")
    file.write_bytes(file.read_bytes() + b"x" if what == "length" else b"y" + file.read_bytes()[1:])
    with pytest.raises(Misbehaviour, match="the storage holds"):
        other.path(blob)
    with pytest.raises(Misbehaviour, match="the storage holds"):
        other.read_chunk(blob, 1)
    assert not other.is_here(blob)


def test_the_cache_keeps_to_its_quota_and_evicting_loses_nothing(url: str, tmp_path: Path) -> None:
    one, other = machines(url, tmp_path, "one", "other", quota_bytes=2 * len(DATA))
    blobs = [one.put(bytes([number]) + DATA, pin=None) for number in range(3)]
    assert len(one.blobs()) == 1
    for number, blob in enumerate(blobs):
        assert one.has(blob)
        assert one.path(blob).read_bytes() == bytes([number]) + DATA
        assert other.path(blob).stat().st_size == len(DATA) + 1
        assert one.usage().used_bytes < 2 * len(DATA)


def test_a_download_that_is_stopped_goes_on(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = machines(url, tmp_path, "one", "other")
    blob = one.put(DATA * 3)
    stops = iter([False, True])
    with pytest.raises(Unavailable, match="stopped"):
        other.pull(blob, stop=lambda: next(stops))
    asked, chunks = list[int](), FsspecBackend.chunks
    monkeypatch.setattr(FsspecBackend, "chunks", lambda self, blob, n: (asked.extend(n), chunks(self, blob, n))[1])
    assert other.path(blob).read_bytes() == DATA * 3
    assert asked == list(range(8, 16))


def test_peers_are_served_from_the_storage_and_the_storage_spares_a_fetch(url: str, tmp_path: Path) -> None:
    one, other = machines(url, tmp_path, "one", "other")
    (mine,) = stores(tmp_path, "mine")
    blob = one.put(DATA)

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, other)
        got = await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert got.path.read_bytes() == DATA
        assert not other.is_here(blob)
        got = await fetch(me, [], blob, other, timeout_s=60)
        assert (got.fetched_bytes, got.kept_bytes, got.received_bytes) == (0, len(DATA), 0)
        with pytest.raises(Missing, match="none of 1"):
            await fetch(me, [peer.record()], MISSING, other, timeout_s=60)

    served(1, body)


def test_a_storage_that_is_away_is_no_reason_not_to_ask_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs,) = stores(tmp_path, "theirs")
    (mine,) = machines(f"file://{tmp_path}/team", tmp_path, "one")
    blob = theirs.put(DATA)

    def away(self: FsspecBackend, blob: object) -> bytes:
        raise Unavailable("the storage is away")

    monkeypatch.setattr(FsspecBackend, "index", away)

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        with pytest.raises(Unavailable, match="is away"):
            await fetch(me, [], blob, mine, timeout_s=60)
        got = await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert got.path.read_bytes() == DATA

    served(1, body)


def test_what_the_storage_has_need_not_stay_in_the_cache(url: str, tmp_path: Path) -> None:
    (one,) = machines(url, tmp_path, "one")
    assert one.pins(one.put(DATA)) == set()
    assert one.pins(one.put(DATA + b"x", pin="mine")) == {"mine"}


# --- what can be wrong with a URL -----------------------------------------------------------------------------------


def test_a_scheme_that_nobody_knows_is_invalid() -> None:
    with pytest.raises(Invalid, match="give a folder, file://, or one of"):
        open_blob_store("carrier-pigeon://loft")


def test_a_driver_that_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def none(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", none)
    with pytest.raises(Unavailable, match="pip install s3fs"):
        open_blob_store("s3://bucket/team")


class NoCredentialsError(Exception):
    """As botocore's, which we need not have."""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NoCredentialsError("Unable to locate credentials"), "AWS_ACCESS_KEY_ID"),
        (PermissionError("Access Denied"), "does not let us read"),
        (ConnectionError("name resolution"), "check the address and the network"),
        (RuntimeError("anything else"), "RuntimeError: anything else"),
    ],
)
def test_what_a_driver_raises_becomes_unavailable_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    (store,) = machines(f"file://{tmp_path}/team", tmp_path, "one")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(store._backend._fs, "cat_file", fails)  # type: ignore[union-attr]
    with pytest.raises(Unavailable, match=text):
        store.has(MISSING)


def test_a_bucket_that_does_not_exist_is_no_missing_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store,) = machines(f"file://{tmp_path}/team", tmp_path, "one")

    def fails(*_: object, **__: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(store._backend._fs, "pipe", fails)  # type: ignore[union-attr]
    with pytest.raises(Unavailable, match="create the bucket or folder first"):
        store.put(DATA)
