"""Bytes on their way into a store, and out of it in pieces. All of it blocks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tessera.core.errors import Invalid, Missing, Unavailable
from tessera.p2p.blob_disk import write_all
from tessera.p2p.blob_index import CHUNK_BYTES, MAX_CHUNKS, BlobIndex

__all__ = ["FewBytes", "OpenChunk", "Readable", "copy_into", "size_of"]


class Readable(Protocol):
    """Bytes that were checked, to be read in pieces. Close it in the end."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes: ...

    def close(self) -> None: ...


class OpenChunk:
    """A `Readable` on a part of an open file: costs a descriptor and no memory, and eviction does not end it."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._start, self.size = fd, start, size

    def read(self, offset: int, size: int) -> bytes:
        """Raises `Unavailable` when the disk fails."""
        try:
            return os.pread(self._fd, min(size, self.size - offset), self._start + offset)
        except OSError as error:
            raise Unavailable(f"cannot read a chunk: {error.strerror or error}") from error

    def close(self) -> None:
        os.close(self._fd)


class FewBytes:
    """A `Readable` on a few bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def close(self) -> None:
        """Nothing to give back."""


def size_of(source: bytes | Path) -> int:
    """Raises: Missing for a file that is not there; Invalid for more than a blob can hold."""
    if isinstance(source, bytes):
        return len(source)
    if not source.is_file():
        raise Missing(f"{source} is no file")
    size = source.stat().st_size
    if size > MAX_CHUNKS * CHUNK_BYTES:
        raise _too_large()
    return size


def _too_large() -> Invalid:
    return Invalid(f"a blob has at most {MAX_CHUNKS} chunks of {CHUNK_BYTES} bytes: split it")


def copy_into(source: bytes | Path, fd: int) -> BlobIndex:
    """Write the bytes from the beginning of a file on; what they are."""
    size, chunks = 0, list[bytes]()
    for chunk in _chunks(source):
        if len(chunks) == MAX_CHUNKS:
            raise _too_large()
        write_all(fd, chunk, size)
        size += len(chunk)
        chunks.append(hashlib.sha256(chunk).digest())
    return BlobIndex(size, tuple(chunks))


def _chunks(source: bytes | Path) -> Iterator[bytes | memoryview]:
    if isinstance(source, Path):
        with source.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    else:
        for start in range(0, len(source), CHUNK_BYTES):
            yield memoryview(source)[start : start + CHUNK_BYTES]
