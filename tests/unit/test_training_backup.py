"""A node in one file and back: whole, or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tessera.chain.journal import Journal
from tessera.core.errors import Conflict, Invalid, Missing, Refused, Unavailable
from tessera.core.ids import RunId
from tessera.core.signing import PeerKey
from tessera.training import backup_restore, backup_stream, sealing
from tessera.training.backup import copy_database, last_backup, take_backup
from tessera.training.backup_restore import restore_backup
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.home import Home
from tessera.training.receipts import Receipt

PASSPHRASE = "correct horse battery"
RUN = RunId("ab" * 32)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup_stream, "SCRYPT_N", 1 << 10)


def _said(passphrase: str = PASSPHRASE) -> Callable[[], str]:
    return lambda: passphrase


def _receipts(count: int) -> list[Receipt]:
    worker, signer = PeerKey(b"\1" * 32), PeerKey(b"\2" * 32)
    drafts = (Receipt(RUN, step, worker.id, signer.id, "forward", (0, 1, 2), b"\xcd" * 32) for step in range(count))
    return [draft.signed_by(signer) for draft in drafts]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A worker in the middle of a run."""
    home = Home(tmp_path / "state")
    (home.path / "config.toml").write_text("[join]\nthreads = 2\n")
    folder = home.run_folder(RUN)
    (folder / "manifest.json").write_text("{}")
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (0, 10, 20, 30):
        checkpoints.save(step, bytes([step]) * 300_000)
    for name in ("blobs/cd", "logs/worker.log", "lock"):
        (home.path / name).parent.mkdir(exist_ok=True)
        (home.path / name).write_text("not taken")
    return home


def _names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_a_node_comes_back_as_it_was(home: Home, tmp_path: Path) -> None:
    book = ReceiptBook(home.run_folder(RUN) / "book.sqlite")
    book.add(_receipts(50))  # and stays open: the worker is at work
    taken = take_backup(home, tmp_path / "b", PASSPHRASE)
    data = (tmp_path / "b").read_bytes()
    assert (tmp_path / "b").stat().st_mode & 0o077 == 0
    assert home.account_key.secret.hex().encode() not in data
    assert b"manifest" not in data
    back = restore_backup(tmp_path / "b", tmp_path / "new" / "state", _said())
    again = Home.existing(tmp_path / "new" / "state")
    assert (again.peer_key, again.account_key) == (home.peer_key, home.account_key)
    assert (back.peer, back.files) == (home.peer_key.id, taken.files)
    assert _names(again.path) == {
        "version", "peer.key", "account.key", "config.toml", f"runs/{RUN}/manifest.json", f"runs/{RUN}/book.sqlite",
        f"runs/{RUN}/checkpoints/step-000000020.ckpt", f"runs/{RUN}/checkpoints/step-000000030.ckpt",
    }  # fmt: skip
    assert Checkpoints(again.run_folder(RUN) / "checkpoints").load(30) == bytes([30]) * 300_000
    kept = ReceiptBook(again.run_folder(RUN) / "book.sqlite")
    assert kept.of_steps(RUN, range(99)) == book.of_steps(RUN, range(99)) != []
    assert all(file.stat().st_mode & 0o077 == 0 for file in again.path.glob("*.key"))
    book.close()
    kept.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b", "new", "state"]


def test_what_goes_in_is_chosen(home: Home, tmp_path: Path) -> None:
    take_backup(home, tmp_path / "b", None, blobs=True, checkpoints=False)
    with tarfile.open(tmp_path / "b") as tar:  # an open backup is a tar like any other
        names = {member.name for member in tar}
    assert "blobs/cd" in names
    assert not any(name.endswith(".ckpt") or name.startswith("logs") or name == "lock" for name in names)
    restore_backup(tmp_path / "b", tmp_path / "new", lambda: pytest.fail("an open backup asks nothing"))
    assert Home(tmp_path / "new").peer_key == home.peer_key


def test_protected_keys_stay_protected(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SCRYPT_N", 1 << 10)
    home.keys.protect("another passphrase")
    take_backup(home, tmp_path / "b", PASSPHRASE)
    restore_backup(tmp_path / "b", tmp_path / "new", _said())
    assert Home(tmp_path / "new").keys.entries() == home.keys.entries()


def test_the_last_backup_is_remembered(home: Home, tmp_path: Path) -> None:
    assert last_backup(home.path) is None
    take_backup(home, tmp_path / "b", PASSPHRASE)
    taken = last_backup(home.path)
    assert taken is not None
    assert abs(taken - time.time()) < 60
    (home.path / "backup.json").write_text("[]")
    assert last_backup(home.path) is None


def test_a_backup_overwrites_nothing_and_lies_elsewhere(home: Home, tmp_path: Path) -> None:
    (tmp_path / "b").write_text("older")
    with pytest.raises(Conflict, match="exists: name a new file"):
        take_backup(home, tmp_path / "b", PASSPHRASE)
    with pytest.raises(Invalid, match="another disk"):
        take_backup(home, home.path / "b", PASSPHRASE)
    with pytest.raises(Unavailable, match="cannot write"):
        take_backup(home, tmp_path / "nowhere" / "b", PASSPHRASE)
    with pytest.raises(Invalid, match="empty passphrase"):
        take_backup(home, tmp_path / "c", "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b", "state"]
    assert (tmp_path / "b").read_text() == "older"


# --- databases that are in use ----------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from tessera.chain.journal import Entry, Journal
journal, number = Journal(Path(sys.argv[1]), {"chain_id": 7}, {}), 0
while True:
    journal.append(Entry(number, number, bytes(3000), 1, bytes(32), bytes(32)))
    number += 1
    if number == 20:
        print("writing", flush=True)
"""


def test_a_chain_that_its_node_holds_is_copied_between_two_blocks(tmp_path: Path) -> None:
    file = tmp_path / "chain.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == b"writing\n"
        copies = []
        for number in range(3):
            copies.append(tmp_path / f"copy-{number}.sqlite")
            copy_database(file, copies[-1])
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    heights = []
    for copy in copies:
        journal = Journal(copy, {"chain_id": 7}, {})
        numbers = [entry.number for entry in journal.entries()]
        journal.close()
        assert numbers == list(range(len(numbers)))
        heights.append(len(numbers))
    assert 20 <= heights[0] < heights[-1]  # it went on meanwhile


def test_a_damaged_database_is_named(home: Home, tmp_path: Path) -> None:
    (home.path / "chain.sqlite").write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    with pytest.raises((Unavailable, Invalid), match=r"chain\.sqlite"):
        take_backup(home, tmp_path / "b", PASSPHRASE)
    assert not (tmp_path / "b").exists()


# --- what must not be restored ----------------------------------------------------------------------------------------


def _refused(
    tmp_path: Path, data: bytes, error: type[Exception] = Invalid, match: str = "backup", **limits: Any
) -> None:
    (tmp_path / "bad").write_bytes(data)
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(error, match=match):
        restore_backup(tmp_path / "bad", tmp_path / "new", _said(), **limits)
    assert {entry.name for entry in tmp_path.iterdir()} == before  # nothing is left behind


def test_a_directory_that_holds_something_is_refused(home: Home, tmp_path: Path) -> None:
    take_backup(home, tmp_path / "b", PASSPHRASE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("mine")
    with pytest.raises(Conflict, match="is not empty"):
        restore_backup(tmp_path / "b", tmp_path / "mine", _said())
    with pytest.raises(Conflict, match="is a file"):
        restore_backup(tmp_path / "b", tmp_path / "mine" / "thesis.doc", _said())
    with pytest.raises(Missing):
        restore_backup(tmp_path / "nothing", tmp_path / "new", _said())
    (tmp_path / "empty").mkdir()
    assert restore_backup(tmp_path / "b", tmp_path / "empty", _said()).peer == home.peer_key.id


def test_a_wrong_passphrase_is_told_from_damage(home: Home, tmp_path: Path) -> None:
    take_backup(home, tmp_path / "b", PASSPHRASE)
    with pytest.raises(Refused, match="does not open the backup"):
        restore_backup(tmp_path / "b", tmp_path / "new", _said("wrong"))
    data = (tmp_path / "b").read_bytes()
    _refused(tmp_path, data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:], match="damaged or was altered")


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_or_shortened_backup_is_refused(sealed: bool, home: Home, tmp_path: Path) -> None:
    take_backup(home, tmp_path / "b", PASSPHRASE if sealed else None)
    data = (tmp_path / "b").read_bytes()
    for part in (0, 10, 300, len(data) // 2, len(data) - 1100, len(data) - 30 if sealed else len(data) - 1200):
        _refused(tmp_path, data[:part])
    begin = len(backup_stream.MAGIC)
    places = (begin + 1, begin + 150, begin + 400, len(data) // 2, len(data) - 1) if sealed else (3, 600, 40_000)
    for place in places:
        bent = bytearray(data)
        bent[place] ^= 4
        _refused(tmp_path, bytes(bent), (Invalid, Refused))  # type: ignore[arg-type]
    _refused(tmp_path, data + b"x", match="altered")
    _refused(tmp_path, b"", match="cut short")
    _refused(tmp_path, os.urandom(5000), match="no backup")


@pytest.mark.parametrize(
    "params",
    [{"n": 1 << 30}, {"n": 1000}, {"r": 1 << 20}, {"p": 99}, {"n": True}, {"salt": "00"}, {"n": "2"}, {"check": 7}],
)
def test_a_backup_that_asks_for_too_much_work_is_refused(params: dict[str, Any], home: Home, tmp_path: Path) -> None:
    take_backup(home, tmp_path / "b", PASSPHRASE)
    line, rest = (tmp_path / "b").read_bytes()[len(backup_stream.MAGIC) :].split(b"\n", 1)
    bent = json.dumps({**json.loads(line), **params}).encode()
    _refused(tmp_path, backup_stream.MAGIC + bent + b"\n" + rest)


def _tar(home: Home, tmp_path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> bytes:
    """An open backup whose members somebody has changed; its checksums are right again."""
    take_backup(home, tmp_path / "b", None)
    with tarfile.open(tmp_path / "b") as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    (tmp_path / "b").unlink()
    notes = members.pop()
    change(members)
    sums = {info.name: backup_restore.sha256(data).hexdigest() for info, data in members}
    text = json.dumps(sums).encode()
    notes[0].size = len(text)
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in [*members, (notes[0], text)]:
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, BytesIO(data))
    return out.getvalue()


def _member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return lambda members: members.append((info, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_member("../evil"), "no state directory has"),
        (_member("/tmp/evil"), "no state directory has"),
        (_member("runs/../../evil"), "no state directory has"),
        (_member("runs//evil"), "no state directory has"),
        (_member("./evil"), "no state directory has"),
        (_member(".hidden"), "no state directory has"),
        (_member("a\nb"), "no state directory has"),
        (_member("/".join("a" * 40)), "no state directory has"),
        (_member("link", b"", tarfile.SYMTYPE, "/etc/passwd"), "no plain file"),
        (_member("link", b"", tarfile.LNKTYPE, "peer.key"), "no plain file"),
        (_member("fifo", b"", tarfile.FIFOTYPE), "no plain file"),
        (_member("folder", b"", tarfile.DIRTYPE), "no plain file"),
        (_member("peer.key"), "twice"),
        (_member("peer.key/below"), "both as a file and as a folder"),
        (_member("runs"), "both as a file and as a folder"),
        (lambda members: members.pop(0), "begins with"),
        (lambda members: members.clear(), "begins with"),
    ],
)
def test_a_backup_that_reaches_out_of_its_folder_is_refused(
    change: Any, message: str, home: Home, tmp_path: Path
) -> None:
    data = _tar(home, tmp_path, change)
    _refused(tmp_path, data, match=message)
    assert not (tmp_path.parent / "evil").exists()


def _edited(name: str, edit: Callable[[bytes], bytes]) -> Any:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[:] = [(info, edit(data) if info.name == name else data) for info, data in members]

    return change


def _about(**changes: Any) -> Any:
    return _edited("tessera-backup.json", lambda data: json.dumps({**json.loads(data), **changes}).encode())


def _without(name: str) -> Any:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[:] = [member for member in members if member[0].name != name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_about(layout=99), "of a newer Tessera .format 1, layout 99.; this one reads format 1 and layouts up to"),
        (_about(format=2), "of a newer Tessera"),
        (_about(peer="ab" * 32), "its key is"),
        (_about(peer="me"), "whose it is"),
        (_about(created=-1), "numbers"),
        (_without("account.key"), "account.key is missing"),
        (_without("version"), "version is missing"),
        (_edited("account.key", lambda data: b"zz"), "account.key is damaged"),
    ],
)
def test_a_backup_without_a_whole_identity_is_refused(change: Any, message: str, home: Home, tmp_path: Path) -> None:
    _refused(tmp_path, _tar(home, tmp_path, change), match=message)


def test_a_changed_file_is_named(home: Home, tmp_path: Path) -> None:
    take_backup(home, tmp_path / "b", None)
    data = (tmp_path / "b").read_bytes()
    assert data.count(b"threads = 2") == 1
    _refused(tmp_path, data.replace(b"threads = 2", b"threads = 9"), match=r"config\.toml do not match")


def test_too_large_a_backup_is_refused(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_backup(home, tmp_path / "b", PASSPHRASE)
    data = (tmp_path / "b").read_bytes()
    _refused(tmp_path, data, match="more than 100000 bytes", max_bytes=100_000)
    monkeypatch.setattr(backup_restore, "MAX_FILES", 3)
    _refused(tmp_path, data, match="more than 3 files")


def test_a_full_disk_leaves_nothing_behind(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_backup(home, tmp_path / "b", PASSPHRASE)
    data = (tmp_path / "b").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(backup_restore, "_extract", full)
    _refused(tmp_path, data, Unavailable, "No space left on device; nothing was kept")
    monkeypatch.setattr("tessera.training.backup._Tar.add_file", full)
    with pytest.raises(Unavailable, match="No space left"):
        take_backup(home, tmp_path / "c", PASSPHRASE)
    assert not any(entry.name.startswith((".", "c")) for entry in tmp_path.iterdir())
