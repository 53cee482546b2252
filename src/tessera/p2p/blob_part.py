"""A blob that is being fetched: its file with holes, and a journal of how far each chunk has come.

    <id>.part        the bytes, each at its place; as long as the blob from the start, so that its room is taken
    <id>.part-index  the index, so that going on needs no peer for it
    <id>.journal     for each chunk, 4 bytes big-endian: how many bytes of its beginning are in <id>.part

Bytes are written before the journal says so: after a kill at any moment the journal never says too much. A chunk that
is said to be whole is believed only when its hash is right; a beginning is believed by nobody until its chunk is whole.
One process at a time works on a part; another gets `Conflict`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from tessera.core.errors import Conflict
from tessera.p2p.blob_disk import disk, lock_file, open_file, same_file, write_all
from tessera.p2p.blob_index import CHUNK_BYTES, BlobIndex

__all__ = ["PartialBlob"]

ENTRY_BYTES = 4  # of the journal, for each chunk


class PartialBlob:
    """Made by `BlobStore.resume`. Methods block, and may be called from several threads for different chunks.

    Making it takes the room that the blob needs, and is quick; `check` reads what is here.

    Args:
        file: `<folder>/<id>.part`; the others lie beside it.
        commit: makes the finished file a blob of the store, and returns its path.
    """

    def __init__(self, index: BlobIndex, file: Path, commit: Callable[[Path, BlobIndex], Path]) -> None:
        self.index = index
        self._path, self._journal_path, self._commit = file, file.with_suffix(".journal"), commit
        self._lock = threading.Lock()  # of the counts, not of the bytes
        self._prefixes: list[int] = []
        self._here = 0
        self.kept: set[int] = set()  # chunks that are here and right
        self._fds: list[int] = []
        try:
            with disk(file.parent):
                self._fds.append(open_file(file))
                other = f"another process is fetching blob {index.id[:16]}… into {file.parent}"
                lock_file(self._fds[0], other)
                if not same_file(self._fds[0], file):  # it was finished or dropped between our open and our lock
                    raise Conflict(other)
                self._fds.append(open_file(self._journal_path))
                self._load()
                os.ftruncate(self._fds[0], index.size)
        except BaseException:
            self.close()
            raise

    @property
    def here_bytes(self) -> int:
        """What is on disk of it, whole chunks and beginnings."""
        return self._here

    def prefix(self, number: int) -> int:
        """How many bytes of the beginning of a chunk are here, right or wrong."""
        return self._prefixes[number]

    def read(self, number: int, size: int) -> bytes:
        """The first `size` bytes of a chunk, as they are on disk."""
        with disk(self._path.parent):
            return os.pread(self._fds[0], size, number * CHUNK_BYTES)

    def append(self, number: int, offset: int, data: bytes) -> None:
        """More of the beginning of a chunk, unchecked. Raises: Conflict where it does not continue; Unavailable."""
        if offset != self._prefixes[number] or offset + len(data) > self.index.chunk_size(number):
            raise Conflict(f"chunk {number} is here up to {self._prefixes[number]}, not {offset}")
        with disk(self._path.parent):
            write_all(self._fds[0], data, number * CHUNK_BYTES + offset)
        self._note(number, offset + len(data))

    def cut(self, number: int, size: int = 0) -> None:
        """Forget what is here of a chunk beyond its first `size` bytes."""
        if size < self._prefixes[number]:
            self.kept.discard(number)
            self._note(number, size)

    def keep(self, number: int) -> bool:
        """The chunk is all here: keep it if it is right, else forget it; says which. Cost: one SHA-256 of it."""
        if self._right(number):
            self.kept.add(number)
            return True
        self.cut(number)
        return False

    def settle(self, number: int, digest: bytes) -> bool:
        """As `keep`, for whoever has hashed the bytes on their way here."""
        if self._prefixes[number] == self.index.chunk_size(number) and digest == self.index.chunks[number]:
            self.kept.add(number)
            return True
        self.cut(number)
        return False

    def add(self, number: int, data: bytes) -> bool:
        """Keep a whole chunk, if it is right; False when it is not."""
        if not self.index.fits(number, data):
            return False
        self.cut(number)
        self.append(number, 0, data)
        self.kept.add(number)
        return True

    def finish(self) -> Path:
        """All chunks are here: make it a blob of the store."""
        if len(self.kept) != len(self.index.chunks):
            raise Conflict(f"{len(self.kept)} of {len(self.index.chunks)} chunks are here")
        with disk(self._path.parent):
            os.fsync(self._fds[0])
            path = self._commit(self._path, self.index)
            self._journal_path.unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Keeps what is here for the next time. Safe to repeat."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def _load(self) -> None:
        """The journal, as far as it makes sense: it is our own, but disks break."""
        length = len(self.index.chunks) * ENTRY_BYTES
        data = os.pread(self._fds[1], length, 0).ljust(length, b"\0")
        os.ftruncate(self._fds[1], length)
        here = os.fstat(self._fds[0]).st_size
        for number in range(len(self.index.chunks)):
            said = int.from_bytes(data[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES], "big")
            room = min(self.index.chunk_size(number), here - number * CHUNK_BYTES)
            self._prefixes.append(said if said <= room else 0)
        self._here = sum(self._prefixes)

    def check(self) -> None:
        """Keep the whole chunks that are right, and forget the others. Cost: one SHA-256 of what is here."""
        for number in range(len(self.index.chunks)):
            if self._prefixes[number] == self.index.chunk_size(number):
                self.keep(number)

    def _right(self, number: int) -> bool:
        return self.index.fits(number, self.read(number, self._prefixes[number]))

    def _note(self, number: int, size: int) -> None:
        with disk(self._path.parent):
            write_all(self._fds[1], size.to_bytes(ENTRY_BYTES, "big"), number * ENTRY_BYTES)
        with self._lock:
            self._here += size - self._prefixes[number]
            self._prefixes[number] = size
