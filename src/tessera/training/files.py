"""Files that a crash leaves whole: each is written beside itself, flushed, and renamed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera.core.errors import Conflict

__all__ = ["drop_leftovers", "keep_short", "one_at_a_time", "write_atomic"]

LEFTOVER_S = 60.0  # a file being written is renamed within milliseconds; older ones belong to a process that is gone
_TEMPORARY = re.compile(r"\.[\w.-]+\.[a-z0-9_]{8}")  # what `write_atomic` names them


def write_atomic(file: Path, data: bytes, *, mode: int = 0o644, replace: bool = True) -> None:
    """Write beside `file`, flush to the disk, rename. A crash leaves the old content or the new, never a part.

    With `replace=False` a file that exists by then stays as it is.
    """
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as temporary:
            temporary.write(data)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.chmod(name, mode)
        if replace:
            os.replace(name, file)
            return
        with suppress(FileExistsError):
            os.link(name, file)
        os.unlink(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def drop_leftovers(folder: Path, now: float | None = None) -> list[Path]:
    """Remove what a killed `write_atomic` left in `folder`, not below it. Returns what is gone. Raises `OSError`."""
    before = (time.time() if now is None else now) - LEFTOVER_S
    gone = []
    for file in folder.glob(".*"):
        with suppress(FileNotFoundError):
            if _TEMPORARY.fullmatch(file.name) and file.is_file() and file.stat().st_mtime < before:
                file.unlink()
                gone.append(file)
    return gone


@contextmanager
def one_at_a_time(file: Path, what: str) -> Iterator[None]:
    """Hold `file`, which is made when it is missing, for this process. Raises `Conflict` when another one holds it."""
    with file.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(f"another process {what}: wait for it") from error
        yield


def keep_short(file: Path, limit_bytes: int) -> bool:
    """Bound a file that another process appends to: over the limit, its content moves to `<name>.1` and it is emptied.

    What is written between the copy and the emptying is lost: a log may lose lines, never grow without end. The writer
    must have opened the file for appending. Returns whether it was too long. Raises `OSError`.
    """
    with suppress(FileNotFoundError):
        if file.stat().st_size > limit_bytes:
            shutil.copyfile(file, file.with_name(f"{file.name}.1"))
            os.truncate(file, 0)
            return True
    return False
