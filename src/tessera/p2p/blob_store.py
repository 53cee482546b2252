"""A folder of content-addressed blobs.

    index = canonical JSON {"chunk": 1048576, "sha256": [hex of each chunk], "size": n}
    id    = SHA-256 of the index

The folder holds `<id>` and `<id>.index` for each blob; the index is written last, so a blob is there when its index is.
`<id>.part` is a fetch under way; what was checked in it is kept when the fetch is interrupted. Every name is parsed as
an id before it becomes a path, so no path leads outside. All methods block: call them from a thread when it matters.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import anyio
import structlog

from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Missing, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId, parse_blob_id

__all__ = ["CHUNK_BYTES", "INDEX_LIMIT", "BlobIndex", "BlobStore", "PartialBlob"]

log = structlog.get_logger()

CHUNK_BYTES = 1 << 20
MAX_CHUNKS = 1 << 17  # 128 GiB
INDEX_LIMIT = 16 + 67 * MAX_CHUNKS + 64  # bytes: 64 digits, two quotes and a comma for each chunk
CACHED_INDEXES = 16


@dataclass(frozen=True, slots=True)
class BlobIndex:
    """What a blob consists of."""

    size: int  # bytes
    chunks: tuple[bytes, ...]  # SHA-256 of each

    def to_bytes(self) -> bytes:
        hashes = [chunk.hex() for chunk in self.chunks]
        return encoding.encode({"chunk": CHUNK_BYTES, "sha256": hashes, "size": self.size})

    @property
    def id(self) -> BlobId:
        return BlobId(sha256(self.to_bytes()).hex())

    def chunk_size(self, number: int) -> int:
        """Bytes of chunk `number`: all are full but the last. Raises `Missing` when there is no such chunk."""
        if not 0 <= number < len(self.chunks):
            raise Missing(f"chunk {number} of a blob of {len(self.chunks)} chunks")
        return min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)

    def fits(self, number: int, data: bytes) -> bool:
        return len(data) == self.chunk_size(number) and sha256(data) == self.chunks[number]

    @classmethod
    def parse(cls, blob: BlobId, data: bytes) -> BlobIndex:
        """Raises `Invalid` unless `data` is the index that `blob` names."""
        if len(data) > INDEX_LIMIT or sha256(data).hex() != blob:
            raise Invalid(f"these {len(data)} bytes are not the index of blob {blob[:16]}…")
        value = encoding.decode(data, INDEX_LIMIT)
        if not isinstance(value, dict) or value.keys() != {"chunk", "sha256", "size"}:
            raise Invalid("a blob's index has the fields chunk, sha256, size")
        size, hashes = value["size"], value["sha256"]
        if value["chunk"] != CHUNK_BYTES or type(size) is not int or size < 0 or not isinstance(hashes, list):
            raise Invalid(f"a blob's index has chunks of {CHUNK_BYTES} bytes, a size and a list of hashes")
        if len(hashes) != -(-size // CHUNK_BYTES) or len(hashes) > MAX_CHUNKS:
            raise Invalid(f"{size} bytes have {-(-size // CHUNK_BYTES)} chunks, the index lists {len(hashes)}")
        return cls(size, tuple(bytes.fromhex(parse_blob_id(text)) for text in hashes))


class BlobStore:
    """The blobs in `folder`, which is made when it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetching: dict[BlobId, anyio.Event] = {}  # fetches under way in this process
        self._indexes: OrderedDict[BlobId, BlobIndex] = OrderedDict()
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, source: bytes | Path) -> BlobId:
        """Keep a copy of these bytes, or of this file's. Cost: one read, one write, one SHA-256.

        Raises: Invalid for a blob over 128 GiB; Missing for a file that is not there; Unavailable for a full disk.
        """
        with _disk(self.folder), tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            try:
                index = _copy(source, file)
                _flush(file)
                if self.has(index.id):
                    os.unlink(file.name)
                else:
                    self._commit(Path(file.name), index)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        return index.id

    def has(self, blob: BlobId) -> bool:
        return self._file(blob, ".index").is_file() and self._file(blob).is_file()

    def path(self, blob: BlobId) -> Path:
        """The file with its bytes; not to be written to. Raises `Missing`."""
        if not self.has(blob):
            raise Missing(f"blob {blob[:16]}… is not in this store")
        return self._file(blob)

    def index(self, blob: BlobId) -> BlobIndex:
        """Raises: Missing; Invalid when the index on disk is damaged."""
        known = self._indexes.get(blob)
        if known is not None:
            self._indexes.move_to_end(blob)
            return known
        self.path(blob)
        index = BlobIndex.parse(blob, self._file(blob, ".index").read_bytes())
        self._indexes[blob] = index
        if len(self._indexes) > CACHED_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def read_chunk(self, blob: BlobId, number: int) -> bytes:
        """One chunk, checked: a damaged disk must not make us serve wrong bytes, for which others would drop us.

        Raises: Missing; Unavailable when the bytes on disk are damaged, after which the blob is no longer offered.
        """
        index = self.index(blob)
        size = index.chunk_size(number)
        with self.path(blob).open("rb") as file:
            data = os.pread(file.fileno(), size, number * CHUNK_BYTES)
        if not index.fits(number, data):
            log.error("blob_damaged", blob=blob, chunk=number, file=str(self._file(blob)))
            self.remove(blob)
            raise Unavailable(f"blob {blob[:16]}… is damaged here: fetch it from another peer")
        return data

    def remove(self, blob: BlobId) -> None:
        """Forget a blob. Safe when it is not there."""
        self._indexes.pop(blob, None)
        self._file(blob, ".index").unlink(missing_ok=True)
        self._file(blob).unlink(missing_ok=True)

    def resume(self, index: BlobIndex) -> PartialBlob:
        """Go on with a fetch: what is on disk of it is checked again, and kept as far as it is right.

        Raises: Conflict when another process is at it; Unavailable for a full disk.
        """
        return PartialBlob(self, index, self._file(index.id, ".part"))

    def _commit(self, file: Path, index: BlobIndex) -> None:
        """Data first, index last: whoever sees the index sees the data."""
        blob = index.id
        file.replace(self._file(blob))
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as temporary:
            temporary.write(index.to_bytes())
            _flush(temporary)
        Path(temporary.name).replace(self._file(blob, ".index"))

    def _file(self, blob: BlobId, suffix: str = "") -> Path:
        return self.folder / (parse_blob_id(blob) + suffix)


class PartialBlob:
    """A blob that is being fetched. `close` keeps what was checked, `finish` makes it a blob."""

    def __init__(self, store: BlobStore, index: BlobIndex, file: Path) -> None:
        self._store, self._index, self._path = store, index, file
        with _disk(store.folder):
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise Conflict(f"another process is fetching blob {index.id[:16]}… into {store.folder}") from error
        self.kept = self._check()

    def _check(self) -> set[int]:
        """The chunks that are there and right."""
        here = min(os.fstat(self._fd).st_size, self._index.size)
        whole = range(-(-here // CHUNK_BYTES))
        return {n for n in whole if self._index.fits(n, os.pread(self._fd, CHUNK_BYTES, n * CHUNK_BYTES))}

    def add(self, number: int, data: bytes) -> bool:
        """Keep a chunk, if it is right; False when it is not."""
        if not self._index.fits(number, data):
            return False
        with _disk(self._store.folder):
            done, start = 0, number * CHUNK_BYTES
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], start + done)
        self.kept.add(number)
        return True

    def finish(self) -> Path:
        """All chunks are here: make it a blob of the store."""
        if len(self.kept) != len(self._index.chunks):
            raise Conflict(f"{len(self.kept)} of {len(self._index.chunks)} chunks are here")
        with _disk(self._store.folder):
            os.ftruncate(self._fd, self._index.size)
            os.fsync(self._fd)
            self._store._commit(self._path, self._index)
        return self._store.path(self._index.id)

    def close(self) -> None:
        os.close(self._fd)


def _copy(source: bytes | Path, file: IO[bytes]) -> BlobIndex:
    size, chunks = 0, list[bytes]()
    for chunk in _chunks(source):
        if len(chunks) == MAX_CHUNKS:
            raise Invalid(f"a blob has at most {MAX_CHUNKS} chunks of {CHUNK_BYTES} bytes: split it")
        file.write(chunk)
        size += len(chunk)
        chunks.append(hashlib.sha256(chunk).digest())
    return BlobIndex(size, tuple(chunks))


def _chunks(source: bytes | Path) -> Iterator[bytes | memoryview]:
    if isinstance(source, Path):
        if not source.is_file():
            raise Missing(f"{source} is no file")
        with source.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    else:
        for start in range(0, len(source), CHUNK_BYTES):
            yield memoryview(source)[start : start + CHUNK_BYTES]


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A disk that is full or read-only is no bug: say so, and leave what is there."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"cannot write in {folder}: {error.strerror or error}", retry_after_s=60.0) from error
