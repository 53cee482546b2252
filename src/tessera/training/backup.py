"""A state directory in one file, taken while the node works.

The file is a tar, sealed or not (`backup_stream`): first `tessera-backup.json` (who, when, which layout), then the
files, last `tessera-backup.sums` with the SHA-256 of each. What makes the snapshot one:

- A file that is replaced by renaming is either the old one or the new one.
- A database is copied through SQLite's own backup, or page by page while nobody folds its log into it.
- Databases come last: receipts may be newer than the checkpoints beside them, never older, so that no work that a
  restored node believes to have done lacks its receipt.

Left out: logs, locks, blobs unless asked for (they can be fetched again), checkpoints but the newest two of a run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from tessera import __version__
from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.training.backup_stream import OpenWriter, SealedWriter, Writer
from tessera.training.files import write_atomic
from tessera.training.home import Home

__all__ = ["ABOUT", "FORMAT", "SUMS", "Taken", "last_backup", "take_backup"]

FORMAT = 1
ABOUT, SUMS = "tessera-backup.json", "tessera-backup.sums"
NOTE = "backup.json"  # in the state directory: when the last one was taken
KEPT_CHECKPOINTS = 2
BLOCK = 512  # bytes, of a tar
PIECE = 1 << 20
TRIES = 20  # of copying a database whose log is folded in meanwhile
PATIENCE_S = 5.0
LOCK_S = 0.2

_CHECKPOINT = re.compile(r"(?P<folder>.*/)?step-(?P<step>\d{9})\.ckpt")


@dataclass(frozen=True)
class Taken:
    """What a backup holds."""

    files: int
    size_bytes: int  # of the files
    peer: str


def take_backup(
    home: Home, target: Path, passphrase: str | None, *, blobs: bool = False, checkpoints: bool = True
) -> Taken:
    """Write the backup of `home` to `target`, sealed unless `passphrase` is None.

    Raises: Conflict when `target` exists; Invalid for a place that it cannot lie in; Unavailable when a disk is full
    or a database stays locked. Nothing is left behind then.
    """
    if target.exists():
        raise Conflict(f"{target} exists: name a new file")
    if target.resolve().is_relative_to(home.path.resolve()):
        raise Invalid(f"{target} lies in the state directory: a backup belongs on another disk")
    part = target.with_name(f".{target.name}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            writer: Writer = OpenWriter(file) if passphrase is None else SealedWriter(file, passphrase)
            taken = _write(home, writer, blobs=blobs, checkpoints=checkpoints)
            os.fsync(file.fileno())
        part.rename(target)
    except OSError as error:
        raise Unavailable(f"cannot write the backup to {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    note = {"time": int(time.time()), "sealed": passphrase is not None}
    write_atomic(home.path / NOTE, json.dumps(note).encode())
    return taken


def last_backup(state: Path) -> float | None:
    """When the last backup was taken, in seconds since 1970; None = never."""
    try:
        return float(json.loads((state / NOTE).read_bytes()[:1024])["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(home: Home, writer: Writer, *, blobs: bool, checkpoints: bool) -> Taken:
    peer = next(entry.address for entry in home.keys.entries() if entry.name == "peer")
    about = {
        "format": FORMAT,
        "tessera": __version__,
        "layout": int((home.path / "version").read_text()),
        "created": int(time.time()),
        "peer": peer,
    }
    tar = _Tar(writer)
    tar.add_bytes(ABOUT, json.dumps(about, indent=1).encode())
    plain, databases = _choose(home.path, blobs=blobs, checkpoints=checkpoints)
    for file in plain:
        with suppress(FileNotFoundError):  # replaced or pruned since we looked
            tar.add_file(file.relative_to(home.path).as_posix(), file)
    with tempfile.TemporaryDirectory(prefix="tessera-backup-") as folder:
        for number, file in enumerate(databases):
            copy = Path(folder) / f"{number}.sqlite"
            copy_database(file, copy)
            tar.add_file(file.relative_to(home.path).as_posix(), copy)
            copy.unlink()
    files, size = len(tar.sums), tar.size_bytes
    tar.add_bytes(SUMS, json.dumps(tar.sums, indent=0, sort_keys=True).encode())
    writer.write(bytes(2 * BLOCK))
    writer.finish()
    return Taken(files - 1, size, peer)


def _choose(state: Path, *, blobs: bool, checkpoints: bool) -> tuple[list[Path], list[Path]]:
    """The files to take: those that are replaced whole, and the databases."""
    plain: list[Path] = []
    databases: list[Path] = []
    steps: dict[str | None, list[Path]] = {}
    for file in _walk(state, blobs=blobs):
        name = file.relative_to(state).as_posix()
        if match := _CHECKPOINT.fullmatch(name):
            if checkpoints:
                steps.setdefault(match["folder"], []).append(file)
        elif file.suffix == ".sqlite":
            databases.append(file)
        elif not re.search(r"\.sqlite-(wal|shm|journal)$|\.log(\.\d+)?$|\.part$", file.name):
            plain.append(file)
    for files in steps.values():
        plain += sorted(files)[-KEPT_CHECKPOINTS:]
    return plain, sorted(databases)


def _walk(state: Path, *, blobs: bool) -> Iterator[Path]:
    skipped = {"logs", "snapshots"} if blobs else {"logs", "snapshots", "blobs"}
    for folder, folders, names in os.walk(state):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if name not in ("lock", NOTE) and not name.startswith(".") and file.is_file() and not file.is_symlink():
                yield file


@dataclass
class _Tar:
    """Writes a ustar, one file after the other."""

    writer: Writer
    sums: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0

    def add_bytes(self, name: str, data: bytes) -> None:
        self._head(name, len(data))
        self.writer.write(data + bytes(-len(data) % BLOCK))
        self.sums[name] = sha256(data).hexdigest()

    def add_file(self, name: str, file: Path) -> None:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            digest, left = sha256(), size
            self._head(name, size)
            while left:
                piece = opened.read(min(PIECE, left))
                if not piece:
                    raise Unavailable(f"{file} became shorter while it was read: take the backup again")
                digest.update(piece)
                self.writer.write(piece)
                left -= len(piece)
        self.writer.write(bytes(-size % BLOCK))
        self.sums[name] = digest.hexdigest()
        self.size_bytes += size

    def _head(self, name: str, size: int) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o600, int(time.time())
        try:
            self.writer.write(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
        except (ValueError, UnicodeError) as error:
            raise Invalid(f"{name} cannot be put into a backup: {error}") from error


def copy_database(source: Path, target: Path) -> None:
    """A consistent copy of a SQLite database that may be in use. Raises `Unavailable` when it cannot be had."""
    try:
        try:
            _copy_shared(source, target)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            _copy_locked(source, target)
        with closing(sqlite3.connect(target, isolation_level=None)) as copy:
            copy.execute("pragma journal_mode = delete")  # folds a log into the file
            (verdict,) = copy.execute("pragma quick_check(1)").fetchone()
        if verdict != "ok":
            raise Invalid(f"{source} is damaged: {verdict}")
    except sqlite3.Error as error:
        raise Unavailable(f"cannot copy the database {source}: {error}") from error


def _copy_shared(source: Path, target: Path) -> None:
    """SQLite's own backup, in one step: nobody has to wait for it. It would wait for a lock for ever: we do not."""
    deadline = time.monotonic() + PATIENCE_S

    def watch(status: int, remaining: int, total: int) -> None:
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > deadline:
            raise Unavailable(f"{source} stays locked for {PATIENCE_S:.0f} s: try again", retry_after_s=5.0)

    url = f"{source.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(url, uri=True, timeout=LOCK_S)) as old, closing(sqlite3.connect(target)) as new:
        old.execute("select count(*) from sqlite_master").fetchone()  # fails at once when its owner never unlocks it
        old.backup(new, progress=watch)


def _copy_locked(source: Path, target: Path) -> None:
    """Copy a database that its owner never unlocks: the file and its log, between two folds of one into the other.

    While the file's time and the log's salts stay the same, the log only grows at its end; its frames carry checksums,
    so that half a frame at the end is not taken for one.
    """
    source_log = source.with_name(source.name + "-wal")
    target_log = target.with_name(target.name + "-wal")
    for _ in range(TRIES):
        before = _moment(source, source_log)
        target.unlink(missing_ok=True)
        target_log.unlink(missing_ok=True)
        shutil.copyfile(source, target)
        with suppress(FileNotFoundError):
            shutil.copyfile(source_log, target_log)
        if _moment(source, source_log) == before:
            return
        time.sleep(0.05)
    raise Unavailable(f"{source} changes too fast to be copied: try again", retry_after_s=5.0)


def _moment(source: Path, log: Path) -> tuple[int, int, bytes]:
    found = source.stat()
    try:
        with log.open("rb") as opened:
            salts = opened.read(32)
    except FileNotFoundError:
        salts = b""
    return found.st_mtime_ns, found.st_size, salts
