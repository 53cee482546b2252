"""What a store keeps, and what goes: pins, quota, use, crashes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blob_world import DATA, MISSING, stores
from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.core.ids import BlobId
from tessera.p2p import blob_room
from tessera.p2p.blob_index import CHUNK_BYTES, BlobIndex
from tessera.p2p.blob_store import OWN, BlobStore

MB = 1_000_000


def some(number: int, size: int = MB) -> bytes:
    return random.Random(number).randbytes(size)


def use(store: BlobStore, blob: BlobId, at: float) -> None:
    """As if it was last used `at`."""
    os.utime(store.folder / f"{blob}.index", (at, at))


# --- quota ----------------------------------------------------------------------------------------------------------


def test_what_was_not_used_for_the_longest_goes_first(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, quota_bytes=4 * MB)
    blobs = [store.put(some(number), pin=None) for number in range(3)]
    for blob, at in zip(blobs, (200, 100, 300), strict=True):
        use(store, blob, at)
    fourth = store.put(some(4), pin=None)
    assert store.blobs() == sorted([blobs[0], blobs[2], fourth])
    store.path(blobs[0])  # used just now
    store.put(some(5), pin=None)
    assert store.has(blobs[0])
    assert not store.has(blobs[2])
    assert store.usage().used_bytes <= 4 * MB


def test_a_pinned_blob_stays_until_nobody_wants_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, quota_bytes=3 * MB)
    blob = store.put(some(1), pin=None)
    store.pin(blob, "run-1")
    store.pin(blob, "run-2")
    use(store, blob, 1)
    store.put(some(2), pin=None)
    store.put(some(3), pin=None)
    store.unpin(blob, "run-1")
    store.unpin(blob, "never-pinned")
    assert BlobStore(tmp_path).pins(blob) == {"run-2"}, "pins outlive the process"
    store.put(some(4), pin=None)
    assert store.has(blob)
    store.unpin(blob, "run-2")
    use(store, blob, 1)
    store.put(some(5), pin=None)
    assert not store.has(blob)


def test_what_is_put_here_is_not_evicted_since_it_may_be_the_only_copy(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, quota_bytes=2 * MB)
    blob = store.put(some(1))
    assert store.pins(blob) == {OWN}
    with pytest.raises(Unavailable, match="raise the quota, or unpin or remove"):
        store.put(some(2))
    assert store.has(blob)


def test_a_request_that_cannot_be_met_takes_nothing_away(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, quota_bytes=4 * MB)
    kept = [store.put(some(1), pin="x"), store.put(some(2), pin=None)]
    with pytest.raises(Unavailable) as caught:
        store.put(some(3, 3 * MB + MB // 2), pin=None)
    assert caught.value.fields["need_bytes"] == pytest.approx(3 * MB + MB // 2, abs=1000)
    assert caught.value.fields["have_bytes"] == pytest.approx(3 * MB, abs=1000)
    assert store.blobs() == sorted(kept)
    store.put(some(3, 3 * MB - MB // 2), pin=None)
    assert not store.has(kept[1])


def test_without_a_quota_nothing_goes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(some(1), pin=None)
    monkeypatch.setattr(blob_room, "SPARE_BYTES", 1 << 60)  # as good as a full disk
    with pytest.raises(Unavailable, match="free some space, or choose a folder on another disk"):
        store.put(some(2), pin=None)
    with pytest.raises(Unavailable, match="bytes to spare"):
        store.resume(BlobIndex(5, (bytes(32),)))
    assert store.has(blob)


def test_usage_says_what_is_used_pinned_and_partial(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, quota_bytes=50 * MB)
    store.put(some(1))
    store.put(some(2), pin=None)
    index = BlobIndex(3 * MB, (bytes(32),) * 3)
    store.resume(index).close()
    usage = store.usage()
    assert usage.pinned_bytes == pytest.approx(MB, abs=1000)
    assert usage.partial_bytes == pytest.approx(3 * MB, abs=1000)
    assert usage.used_bytes == pytest.approx(5 * MB, abs=1000)
    assert usage.quota_bytes == 50 * MB
    assert usage.free_bytes > 0


def test_an_interrupted_fetch_goes_like_any_other_but_not_one_under_way(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, quota_bytes=4 * MB)
    index = BlobIndex(2 * MB, (bytes(32),) * 2)
    partial = store.resume(index)
    with pytest.raises(Unavailable, match="no room"):
        BlobStore(tmp_path, quota_bytes=4 * MB).put(some(1, 3 * MB), pin=None)
    partial.append(0, 0, b"here")
    partial.close()
    assert store.started_index(index.id) == index
    store.put(some(1, 3 * MB), pin=None)
    assert store.started_index(index.id) is None
    assert store.usage().partial_bytes == 0


def test_a_quota_under_one_chunk_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="at least"):
        BlobStore(tmp_path, quota_bytes=CHUNK_BYTES - 1)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "two words"])
def test_a_pins_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid, match="pin's name"):
        BlobStore(tmp_path).pin(MISSING, name)


def test_a_pin_may_come_before_its_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, quota_bytes=3 * MB)
    (tmp_path / "other").mkdir()
    blob = BlobStore(tmp_path / "other").put(some(1))
    store.pin(blob, "soon")
    assert store.put(some(1), pin=None) == blob
    use(store, blob, 1)
    store.put(some(2), pin=None)
    store.put(some(3), pin=None)
    assert store.has(blob)


def test_removing_takes_pins_and_interrupted_fetches_along(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put(DATA)
    index = BlobIndex(5, (bytes(32),))
    store.resume(index).close()
    store.remove(blob)
    store.remove(index.id)
    store.remove(MISSING)
    assert [file.name for file in tmp_path.iterdir()] == [".room"]


# --- crashes --------------------------------------------------------------------------------------------------------


def test_a_copy_that_was_killed_is_swept_away_and_one_under_way_is_not(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    file, fd = store._start_put(1000)
    dead = tmp_path / ("ab" * 32 + ".put")
    dead.touch()
    for path in (file, dead):
        os.utime(path, (1, 1))
    BlobStore(tmp_path)
    assert file.exists()
    assert not dead.exists()
    os.close(fd)
    BlobStore(tmp_path)
    assert not file.exists()


def test_a_crash_between_data_and_index_loses_nothing(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(DATA)
    index = theirs.index(blob)
    partial = mine.resume(index)
    for number in range(len(index.chunks)):
        partial.add(number, theirs.read_chunk(blob, number))
    partial.close()
    (mine.folder / f"{blob}.part").rename(mine.folder / blob)  # as `finish` does first
    assert not mine.has(blob)
    partial = mine.resume(index)
    assert partial.kept == set(range(len(index.chunks)))
    partial.finish()
    partial.close()
    assert mine.path(blob).read_bytes() == DATA
    assert sorted(file.name for file in mine.folder.iterdir()) == [".room", blob, f"{blob}.index"]


def test_a_journal_that_says_too_much_is_not_believed(tmp_path: Path) -> None:
    (store,) = stores(tmp_path, "a")
    index = BlobIndex(2 * CHUNK_BYTES, (bytes(32),) * 2)
    store.resume(index).close()
    journal = store.folder / f"{index.id}.journal"
    journal.write_bytes((1 << 31).to_bytes(4, "big") + CHUNK_BYTES.to_bytes(4, "big") + b"more")
    partial = store.resume(index)
    assert (partial.here_bytes, partial.kept) == (0, set())
    partial.close()


def test_two_stores_on_one_folder_see_each_others_blobs(tmp_path: Path) -> None:
    first, second = BlobStore(tmp_path), BlobStore(tmp_path)
    blob = first.put(b"x")
    assert second.index(blob).size == 1
    first.remove(blob)
    assert not second.has(blob)
    with pytest.raises(Exception, match="not in this store"):
        second.index(blob)


def test_a_finished_part_is_not_written_to_by_a_late_comer(tmp_path: Path) -> None:
    mine, theirs = stores(tmp_path, "mine", "theirs")
    blob = theirs.put(b"x")
    partial = mine.resume(theirs.index(blob))
    partial.add(0, b"x")
    with pytest.raises(Conflict):
        mine.resume(theirs.index(blob))
    partial.finish()
    partial.close()
    again = mine.resume(theirs.index(blob))
    with pytest.raises(Conflict, match="not 5"):
        again.append(0, 5, b"y")
    again.append(0, 0, b"y")
    again.close()
    assert mine.path(blob).read_bytes() == b"x"
