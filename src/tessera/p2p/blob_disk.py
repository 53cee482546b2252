"""The few things that everything about blobs does to a disk. All of them block."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tessera.core.errors import Conflict, Unavailable

__all__ = ["TEMPORARY", "disk", "lock_file", "open_file", "replace_file", "same_file", "sync_folder", "write_all"]

TEMPORARY = ".put-"  # begins the name of a file that no crash may leave behind for ever
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A disk that is full, broken or read-only is no bug: say so with `Unavailable`, and leave what is there."""
    try:
        yield
    except OSError as error:
        fix = "free some space" if error.errno in FULL else "check the disk and who may write there"
        raise Unavailable(f"cannot write in {folder}: {error.strerror or error}; {fix}", retry_after_s=60.0) from error


def open_file(path: Path) -> int:
    """A descriptor to read and write a file, which is made when it is missing; nobody else may read it."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def lock_file(fd: int, what: str, *, wait: bool = False) -> None:
    """Hold a file until its descriptor is closed. Raises `Conflict`, saying `what`, when another one holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise Conflict(what) from error


def same_file(fd: int, path: Path) -> bool:
    """Whether `path` still names what was opened."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def write_all(fd: int, data: bytes | memoryview, place: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, place)
        view, place = view[done:], place + done


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` so that a crash leaves the old file or the new one, whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=TEMPORARY, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Names that were given or taken in `folder` survive a power cut from here on."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
