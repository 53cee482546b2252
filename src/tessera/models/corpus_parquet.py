"""Parquet files, one document in each row. Each file is read by a process of its own (`corpus_parquet_child`).

That process is believed no more than the file: it has a deadline for every answer, what it sends has a limit, and when
it dies, the file is to blame. Needs pyarrow: the extra `data`.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tessera.core.errors import Invalid
from tessera.models.corpus import Piece, Skipped
from tessera.models.corpus_rows import LINE_LIMIT, piece_of

__all__ = ["Parquet"]

ANSWER_S = 120.0
_READER = (sys.executable, "-m", "tessera.models.corpus_parquet_child")
_HEAD = 5  # bytes: kind, length
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Parquet:
    """Rows of a column `field` of text. An offset is a row."""

    field: str = "text"

    @classmethod
    def checked(cls, field: str) -> Parquet:
        """Raises `Invalid` when pyarrow is missing."""
        if find_spec("pyarrow") is None:
            raise Invalid("reading Parquet needs pyarrow: pip install 'tessera-network[data]'")
        return cls(field)

    def read(self, path: Path, name: str, offset: int, skipped: Skipped) -> Iterator[Piece]:
        row = offset
        for kind, text in _frames(path, name, self.field, offset):
            row += 1
            if kind == b"B":
                skipped.row(name, f"row {row}", text)
            else:
                yield from piece_of(text, row, skipped)


def _frames(path: Path, name: str, field: str, offset: int) -> Iterator[tuple[bytes, str]]:
    """Rows, as the child tells them. Raises `Invalid` when the file is bad."""
    # One thread and the plain allocator: the child's address space is limited.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    child = subprocess.Popen(
        [*_READER, str(path.absolute()), name, field, str(offset)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        reader = _Reader(child, name)
        while True:
            head = reader.take(_HEAD)
            kind, size = head[:1], int.from_bytes(head[1:], "little")
            if kind not in (b"T", b"B", b"X", b"E") or size > LINE_LIMIT:
                raise Invalid(f"{name} is no sound Parquet file: it confused its reader")
            text = reader.take(size).decode(errors="replace")
            if kind == b"X":
                raise Invalid(text)
            if kind == b"E":
                return
            yield kind, text
    finally:
        child.kill()
        child.communicate()


class _Reader:
    """Bytes from the child, with a deadline."""

    def __init__(self, child: subprocess.Popen[bytes], name: str) -> None:
        if child.stdout is None:
            raise RuntimeError("the child has no output")
        self._child, self._fd, self._name = child, child.stdout.fileno(), name
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._held, self._place = b"", 0

    def take(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            if self._place == len(self._held):
                self._held, self._place = self._more(), 0
            part = self._held[self._place : self._place + missing]
            self._place += len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _more(self) -> bytes:
        if not self._poll.poll(ANSWER_S * 1000):
            raise Invalid(f"{self._name} is no sound Parquet file: no row came out of it in {ANSWER_S:.0f} s")
        data = os.read(self._fd, _AT_ONCE)
        if not data:
            code = self._child.wait()
            raise Invalid(f"{self._name} is no sound Parquet file: its reader died of it (exit code {code})")
        return data
