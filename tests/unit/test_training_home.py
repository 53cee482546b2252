"""A state directory over the years: older layouts, leftovers, what takes the room."""

import os
import time
from pathlib import Path

import pytest

from tessera.core.errors import Conflict, Invalid
from tessera.training.files import drop_leftovers, keep_short, write_atomic
from tessera.training.home import Home
from tessera.training.migrations import Migration, migrate


def _split(state: Path) -> None:
    """Layout 2: the notes lie in a folder."""
    (state / "notes").mkdir(exist_ok=True)
    os.replace(state / "note.txt", state / "notes" / "note.txt")


def _shout(state: Path) -> None:
    """Layout 3."""
    file = state / "notes" / "note.txt"
    file.write_text(file.read_text().upper())


STEPS = (Migration(2, ("note.txt",), _split), Migration(3, ("notes/*",), _shout))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A state directory of layout 1, with keys and a note."""
    Home(tmp_path)
    (tmp_path / "note.txt").write_text("keep me")
    return tmp_path


def test_an_older_state_comes_forward_step_by_step_with_a_copy(old: Path) -> None:
    key = Home(old).peer_key
    home = Home(old, STEPS)
    assert home.peer_key == key
    assert (old / "version").read_text() == "3"
    assert (old / "notes" / "note.txt").read_text() == "KEEP ME"
    assert [copy.name for copy in old.glob(".before-*")] == [".before-2"]
    assert (old / ".before-2" / "notes" / "note.txt").read_text() == "keep me"
    assert not migrate(old, STEPS)  # nothing is left to do


def test_a_step_that_was_interrupted_is_undone_and_done_again(old: Path) -> None:
    def break_off(state: Path) -> None:
        (state / "note.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Home(old, (Migration(2, ("note.txt",), break_off),))
    assert (old / "version").read_text() == "1"
    Home(old, STEPS)
    assert (old / "notes" / "note.txt").read_text() == "KEEP ME"


def test_a_half_made_copy_is_made_again(old: Path) -> None:
    (old / ".before-1.part").mkdir()
    (old / ".before-1.part" / "note.txt").write_text("ke")
    Home(old, STEPS[:1])
    assert (old / ".before-1" / "note.txt").read_text() == "keep me"


def test_a_state_in_use_is_not_brought_forward(old: Path) -> None:
    with Home(old).locked(), pytest.raises(Conflict, match="in use by process"):
        Home(old, STEPS)
    assert (old / "note.txt").exists()


def test_a_newer_state_is_refused_naming_both_layouts(old: Path) -> None:
    Home(old, STEPS)
    with pytest.raises(Invalid, match=r"has layout 3, of a newer Tessera; this one knows layouts up to 1"):
        Home(old)
    (old / "version").write_text("one")
    with pytest.raises(Invalid, match="says version 'one'"):
        Home(old)


def test_a_layout_without_a_way_to_ours_is_refused(old: Path) -> None:
    with pytest.raises(Invalid, match="no way from it to layout 3"):
        Home(old, STEPS[1:])


def test_what_a_killed_process_left_is_removed_when_the_state_is_opened(tmp_path: Path) -> None:
    home = Home(tmp_path)
    run = tmp_path / "runs" / ("ab" * 32)
    run.mkdir(parents=True)
    left = [tmp_path / ".peer.key.abcd1234", run / ".roster.json.x_yz1234"]
    kept = [tmp_path / ".peer.key.abcd1235", tmp_path / ".hidden", tmp_path / "account.key"]
    for file in (*left, *kept[:2]):
        file.write_text("x")
    for file in (*left, kept[1]):
        os.utime(file, (time.time() - 3600,) * 2)
    with home.locked():
        assert not any(file.exists() for file in left)
        assert all(file.exists() for file in kept)  # one is being written right now


def test_leftovers_are_what_write_atomic_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process removes nothing
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "wish", b"leave")
    monkeypatch.undo()
    assert len(drop_leftovers(tmp_path, now=time.time() + 3600)) == 1
    assert list(tmp_path.iterdir()) == []


def test_settings_may_be_there_before_the_first_start(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert Home(tmp_path).peer_key


def test_usage_says_what_takes_the_room(tmp_path: Path) -> None:
    home = Home(tmp_path)
    folder = home.run_folder("ab" * 32)  # type: ignore[arg-type]
    files = {
        "blobs": home.blobs / "cd" / "ef",
        "checkpoints": folder / "checkpoints" / "step-000000010.ckpt",
        "books": folder / "book.sqlite-wal",
        "logs": tmp_path / "logs" / "worker.log.1",
        "chain": tmp_path / "chain.sqlite",
    }
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 100_000)
    usage = home.usage()
    assert {kind for kind, size in usage.items() if size >= 100_000} == {*files, "all"}
    assert usage["all"] == sum(size for kind, size in usage.items() if kind != "all")
    assert home.blob_quota(None) is None
    assert home.blob_quota(10**9) == 10**9 - (usage["all"] - usage["blobs"])
    assert home.blob_quota(1000) == 1 << 20  # what a blob store needs to work at all


def test_a_log_of_another_process_stays_short(tmp_path: Path) -> None:
    file = tmp_path / "worker.log"
    with file.open("ab", buffering=0) as writer:  # as a child process has it
        for number in range(100):
            writer.write(b"%09d\n" % number)
            keep_short(file, 200)
        assert file.stat().st_size <= 200
        assert (tmp_path / "worker.log.1").stat().st_size <= 210
        assert file.read_bytes().endswith(b"000000099\n")
        assert b"\0" not in file.read_bytes()
    assert not keep_short(tmp_path / "none.log", 200)
