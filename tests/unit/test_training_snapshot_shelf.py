"""What lies on a holder's disk: found again after a restart, given out only when right, private."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tessera.core.errors import Conflict, Invalid, Missing, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import RunId
from tessera.training import snapshot_shelf
from tessera.training.snapshot_code import share_hash
from tessera.training.snapshot_header import TAG, Piece, SnapshotHeader
from tessera.training.snapshot_shelf import Shelf
from training_world import peer_keys

MAKER, OWNER, OTHER = peer_keys(3)
FRAGMENT = bytes(range(200)) * 5


def header_of(step: int, fragment: bytes = FRAGMENT, stage: int = 0, share: str = "words") -> SnapshotHeader:
    pieces = (
        Piece(OTHER.id, "00" * 32, "00" * 32),
        Piece(OWNER.id, sha256(fragment).hex(), share_hash(share)),
    )
    size = 2 * len(fragment) - TAG
    return SnapshotHeader(RunId("ab" * 32), stage, 1, step, size, "00" * 32, 2, pieces, MAKER.id).signed_by(MAKER)


def shelf_in(folder: Path, stage_bytes: int = 1 << 20) -> Shelf:
    return Shelf(folder, peer=OWNER.id, stage_bytes=stage_bytes)


def keep(shelf: Shelf, header: SnapshotHeader, fragment: bytes = FRAGMENT) -> None:
    assert header.fragment_bytes == len(fragment)
    assert shelf.begin(header, "words") == (0, False)
    assert shelf.write(MAKER.id, header.digest, 0, fragment) == (len(fragment), True)


def test_a_restart_finds_what_is_whole_and_goes_on_with_what_is_not(tmp_path: Path) -> None:
    shelf, whole, half = shelf_in(tmp_path), header_of(10), header_of(20)
    keep(shelf, whole)
    shelf.begin(half, "words")
    assert shelf.write(MAKER.id, half.digest, 0, FRAGMENT[:600]) == (600, False)
    (tmp_path / "stray.part").write_bytes(b"of nothing")
    again = shelf_in(tmp_path)
    assert again.headers() == [whole]
    assert again.read(whole.digest, 0, 2000) == ("words", FRAGMENT)
    assert again.begin(half, "words") == (600, False)
    assert again.write(MAKER.id, half.digest, 600, FRAGMENT[600:]) == (1000, True)
    assert again.headers(0) == [half, whole]
    assert again.headers(1) == []
    assert not (tmp_path / "stray.part").exists()


def test_a_fragment_whose_check_a_crash_prevented_is_checked_after_all(tmp_path: Path) -> None:
    shelf, header = shelf_in(tmp_path), header_of(10)
    shelf.begin(header, "words")
    (tmp_path / f"{header.digest}.part").write_bytes(FRAGMENT)
    again = shelf_in(tmp_path)
    assert again.headers() == []
    assert again.begin(header, "words") == (999, False)
    assert again.write(MAKER.id, header.digest, 999, FRAGMENT[999:]) == (1000, True)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"header":{},"share":"x"}', b"\xff" * 10, b"x" * 70_000])
def test_a_damaged_head_is_dropped_with_its_fragment(content: bytes, tmp_path: Path) -> None:
    shelf, header = shelf_in(tmp_path), header_of(10)
    keep(shelf, header)
    (tmp_path / f"{header.digest}.head").write_bytes(content)
    assert shelf_in(tmp_path).headers() == []
    assert list(tmp_path.iterdir()) == []


def test_a_head_under_another_name_or_without_a_fragment_is_dropped(tmp_path: Path) -> None:
    keep(shelf_in(tmp_path), header_of(10))
    head = tmp_path / f"{header_of(10).digest}.head"
    (tmp_path / f"{'ab' * 32}.head").write_bytes(head.read_bytes())
    (tmp_path / f"{header_of(10).digest}.data").unlink()
    assert shelf_in(tmp_path).headers() == []
    assert list(tmp_path.iterdir()) == []


def test_a_fragment_that_was_damaged_on_disk_is_not_given_out(tmp_path: Path) -> None:
    shelf, header = shelf_in(tmp_path), header_of(10)
    keep(shelf, header)
    file = tmp_path / f"{header.digest}.data"
    file.write_bytes(FRAGMENT[:-1] + b"?")
    with pytest.raises(Unavailable, match="damaged"):
        shelf.read(header.digest, 0, 10)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Missing):
        shelf.read(header.digest, 0, 10)
    keep(shelf, header)
    for offset in (-1, 1000, 2000):
        with pytest.raises(Invalid):
            shelf.read(header.digest, offset, 10)


def test_nobody_else_on_the_machine_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    keep(shelf_in(folder), header_of(10))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {0o700, 0o600}


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, header = shelf_in(tmp_path), header_of(10)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_shelf, "write_atomic", full)
        with pytest.raises(Unavailable, match="free some space"):
            shelf.begin(header, "words")
    assert list(tmp_path.iterdir()) == []
    shelf.begin(header, "words")
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_shelf, "write_all", full)
        with pytest.raises(Unavailable, match="free some space"):
            shelf.write(MAKER.id, header.digest, 0, FRAGMENT)
    assert shelf.write(MAKER.id, header.digest, 0, FRAGMENT) == (1000, True)


def test_a_snapshot_that_is_under_way_gives_way_to_a_newer_one(tmp_path: Path) -> None:
    shelf, older, newer = shelf_in(tmp_path), header_of(10), header_of(20)
    shelf.begin(older, "words")
    shelf.write(MAKER.id, older.digest, 0, FRAGMENT[:100])
    shelf.begin(newer, "words")
    with pytest.raises(Missing):
        shelf.write(MAKER.id, older.digest, 100, FRAGMENT[100:200])
    with pytest.raises(Conflict):
        shelf.begin(older, "words")
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".head", ".part"]


def test_a_piece_of_somebody_else_is_refused(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, peer=MAKER.id, stage_bytes=1 << 20)
    with pytest.raises(Invalid):
        shelf.begin(header_of(10), "words")
