"""Bring a backup back: everything is checked in a folder of its own, which then becomes the state directory.

Nothing is believed: names stay inside the folder, only plain files are taken, sizes and counts are limited, every
SHA-256 must match, and no file may be missing or unmentioned. A failure leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tessera.core.errors import Conflict, Invalid, Missing, Unavailable
from tessera.core.ids import parse_peer_id
from tessera.training.backup import ABOUT, BLOCK, FORMAT, PIECE, SUMS
from tessera.training.backup_stream import MAGIC, OpenReader, Reader, SealedReader
from tessera.training.home import Home
from tessera.training.migrations import STATE_VERSION

__all__ = ["Restored", "restore_backup"]

MAX_FILES = 200_000
MAX_DEPTH = 16
NOTE_LIMIT = 64 << 20  # bytes of the first and the last file
_PART = re.compile(r"(?!\.)[^/\x00-\x1f\x7f]{1,200}")  # no hidden files: neither . nor ..


@dataclass(frozen=True)
class Restored:
    """What came back."""

    files: int
    size_bytes: int
    created: int  # when the backup was taken, seconds since 1970
    peer: str


def restore_backup(source: Path, state: Path, passphrase: Callable[[], str], *, max_bytes: int = 1 << 42) -> Restored:
    """Make `state`, which must be missing or empty, from the backup `source`.

    Args:
        passphrase: asked only when the backup is sealed.
        max_bytes: refuse what would take more room than this.

    Raises: Conflict when `state` holds something; Invalid for a backup that is damaged, cut short, altered, of a newer
    layout, or none; Refused for a wrong passphrase; Unavailable when the disk is full.
    """
    _check_empty(state)
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        with (
            source.open("rb") as file,
            tempfile.TemporaryDirectory(dir=state.parent, prefix=f".{state.name}.restore-") as name,
        ):
            folder = Path(name) / "state"
            folder.mkdir(mode=0o700)
            sealed = file.read(len(MAGIC)) == MAGIC
            if not sealed:
                file.seek(0)
            reader: Reader = SealedReader(file, passphrase()) if sealed else OpenReader(file)
            restored = _unpack(reader, folder, max_bytes)
            _check_empty(state)
            folder.rename(state)  # an empty directory is replaced
    except FileNotFoundError as error:
        raise Missing(f"there is no {error.filename}") from error
    except OSError as error:
        raise Unavailable(f"cannot restore {source} to {state}: {error.strerror or error}; nothing was kept") from error
    return restored


def _unpack(reader: Reader, folder: Path, max_bytes: int) -> Restored:
    sums: dict[str, str] = {}
    name, size = _head(reader)
    if name != ABOUT:
        raise Invalid(f"this file is no backup: it begins with {name[:60]!r}")
    data = _body(reader, size)
    about, sums[ABOUT] = _about(data), sha256(data).hexdigest()
    total = 0
    while (head := _head(reader))[0] != SUMS:
        name, size = head
        total += size
        if name in sums or len(sums) >= MAX_FILES:
            raise Invalid(f"this backup names {name!r} twice, or more than {MAX_FILES} files")
        if total > max_bytes:
            raise Invalid(f"this backup holds more than {max_bytes} bytes")
        sums[name] = _extract(reader, folder, name, size)
    _compare(_body(reader, head[1]), sums)
    reader.finish()
    _check_identity(folder, about)
    return Restored(len(sums) - 1, total, about["created"], about["peer"])


def _head(reader: Reader) -> tuple[str, int]:
    """The next file's name and size. Raises `Invalid` for anything but a plain file inside the folder."""
    block = reader.read(BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise Invalid("this file is no backup, or its list of files ends too early") from error
    parts = info.name.split("/")
    if info.type != tarfile.REGTYPE or info.size < 0:
        raise Invalid(f"this backup holds something that is no plain file: {info.name[:60]!r}")
    if len(parts) > MAX_DEPTH or not all(_PART.fullmatch(part) for part in parts):
        raise Invalid(f"this backup names a file that no state directory has: {info.name[:80]!r}")
    return info.name, info.size


def _body(reader: Reader, size: int) -> bytes:
    if size > NOTE_LIMIT:
        raise Invalid(f"this backup's own notes are {size} bytes long: at most {NOTE_LIMIT} are expected")
    data = reader.read(size)
    reader.read(-size % BLOCK)
    return data


def _extract(reader: Reader, folder: Path, name: str, size: int) -> str:
    target, digest, left = folder / name, sha256(), size
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = target.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise Invalid(f"this backup names {name!r} both as a file and as a folder") from error
    with file:
        target.chmod(0o600)
        while left:
            piece = reader.read(min(PIECE, left))
            digest.update(piece)
            file.write(piece)
            left -= len(piece)
    reader.read(-size % BLOCK)
    return digest.hexdigest()


def _about(data: bytes) -> dict[str, Any]:
    try:
        about = json.loads(data)
        numbers = {name: about[name] for name in ("format", "layout", "created")}
        peer = parse_peer_id(about["peer"])
    except (ValueError, KeyError, TypeError, RecursionError, Invalid) as error:
        raise Invalid("this file is no backup: it does not say whose it is") from error
    if not all(type(number) is int and number >= 0 for number in numbers.values()):
        raise Invalid("this file is no backup: its numbers are none")
    if numbers["format"] > FORMAT or numbers["layout"] > STATE_VERSION:
        raise Invalid(
            f"this backup is of a newer Tessera (format {numbers['format']}, layout {numbers['layout']}); this one "
            f"reads format {FORMAT} and layouts up to {STATE_VERSION}: upgrade first"
        )
    return {**numbers, "peer": peer}


def _compare(data: bytes, sums: dict[str, str]) -> None:
    try:
        expected = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Invalid("this backup's list of checksums is damaged") from error
    if expected == sums:
        return
    known = expected if isinstance(expected, dict) else {}
    wrong = sorted(name for name in known.keys() | sums.keys() if known.get(name) != sums.get(name))
    raise Invalid(f"this backup is damaged: {', '.join(wrong[:5]) or 'its checksums'} do not match; nothing was kept")


def _check_identity(folder: Path, about: dict[str, Any]) -> None:
    """The directory opens, and is who the backup says. Opens no key."""
    missing = [name for name in ("version", "peer.key", "account.key") if not (folder / name).is_file()]
    if missing:
        raise Invalid(f"this backup holds no whole identity: {', '.join(missing)} is missing")
    entries = {entry.name: entry.address for entry in Home.existing(folder).keys.entries()}
    if entries["peer"] != about["peer"]:
        raise Invalid(f"this backup says that it is {about['peer'][:16]}…'s, its key is {entries['peer'][:16]}…'s")
    (folder / "lock").unlink(missing_ok=True)


def _check_empty(state: Path) -> None:
    try:
        found = sorted(entry.name for entry in state.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise Conflict(f"{state} is a file: name a folder that is missing or empty") from error
    if found:
        raise Conflict(f"{state} is not empty ({', '.join(found[:3])}): restore into a new folder")
