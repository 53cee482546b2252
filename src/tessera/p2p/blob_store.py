"""A folder of content-addressed blobs, within a quota, with an object storage behind it where there is one.

The folder holds `<id>` and `<id>.index` for each blob; the index is written last, so a blob is there when its index is.
A fetch under way is a `PartialBlob`, and goes on after an interruption. Every name is parsed as an id before it
becomes a path, so no path leads outside. All methods block: call them from a thread when it matters.

With a `backend`, the folder is its cache: what is put goes there as well, and what is not here is fetched from there.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import anyio
import structlog

from tessera.core.errors import Invalid, Misbehaviour, Missing, Unavailable
from tessera.core.ids import BlobId, parse_blob_id
from tessera.p2p.blob_disk import TEMPORARY, disk, lock_file, open_file, replace_file, sync_folder, write_all
from tessera.p2p.blob_index import CHUNK_BYTES, BlobIndex
from tessera.p2p.blob_part import PartialBlob
from tessera.p2p.blob_room import PART, PIN, PUT, Room, Usage, holdings, is_held
from tessera.p2p.blob_source import FewBytes, OpenChunk, Readable, copy_into, size_of

__all__ = ["OWN", "BlobBackend", "BlobStore"]

log = structlog.get_logger()

CACHED_INDEXES = 16
BATCH = 8  # chunks that go to or come from the backend at once: 8 MiB of memory
OWN = "own"  # the pin of what was put here: perhaps nobody else has it
IN_MEMORY = 256 * 1024  # bytes of an index; a longer one is sent from a file
STALE_S = 3600.0
_PIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


class BlobBackend(Protocol):
    """Where blobs live when a folder is not enough. Blocking; what it returns is checked by the store.

    Raises, in all methods: Missing for what is not there; Unavailable when it does not answer or does not let us.
    """

    def index(self, blob: BlobId) -> bytes: ...

    def chunks(self, blob: BlobId, numbers: Sequence[int]) -> list[bytes]: ...

    def sizes(self, blob: BlobId) -> Mapping[int, int]:
        """The bytes of each chunk that is there already, whole blob or not."""
        ...

    def put_chunks(self, blob: BlobId, chunks: Mapping[int, bytes]) -> None: ...

    def put_index(self, blob: BlobId, data: bytes) -> None:
        """Last, when all chunks are there: from now on the blob is."""
        ...

    def remove(self, blob: BlobId) -> None: ...


class BlobStore:
    """The blobs in `folder`, which is made when it is missing.

    Args:
        quota_bytes: most bytes in the folder; what is not pinned goes when something new needs its room. None: the
            disk is the limit, and nothing goes by itself.
        backend: what lies behind; see `open_blob_store`.
    """

    def __init__(self, folder: Path, *, quota_bytes: int | None = None, backend: BlobBackend | None = None) -> None:
        if quota_bytes is not None and quota_bytes < CHUNK_BYTES:
            raise Invalid(f"a quota is at least {CHUNK_BYTES:,} bytes, not {quota_bytes:,}")
        self.folder = folder
        self.fetching: dict[BlobId, anyio.Event] = {}  # fetches under way in this process
        self._backend = backend
        self._indexes: OrderedDict[BlobId, BlobIndex] = OrderedDict()
        self._lock = threading.Lock()  # of the indexes
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
        self._room = Room(folder, quota_bytes)

    # --- blobs ------------------------------------------------------------------------------------------------------

    def put(self, source: bytes | Path, *, pin: str | None = OWN) -> BlobId:
        """Keep a copy of these bytes, or of this file's.

        Args:
            pin: keeps it from being evicted, since nobody else may have it; None to let it go like any other. The
                default comes off again once a backend has it all.

        Raises: Invalid for a blob over 128 GiB; Missing for a file that is not there; Unavailable for a full disk, a
        quota that is used up, or a backend that does not answer (what was copied is then here, and `put` goes on).
        Cost: one read, one write, one SHA-256; the upload, of what the backend has not got.
        """
        size = size_of(source)
        file, fd = self._start_put(size)
        try:
            with disk(self.folder):
                index = copy_into(source, fd)
                os.ftruncate(fd, index.size)
                os.fsync(fd)
            if pin is not None:
                self.pin(index.id, pin)
            if not self.is_here(index.id):
                self._commit(file, index)
                self._drop_part(index.id)
        finally:
            os.close(fd)
            file.unlink(missing_ok=True)
        if self._backend is not None:
            self._upload(index, self._backend)
            if pin == OWN:
                self.unpin(index.id, OWN)
        return index.id

    def has(self, blob: BlobId) -> bool:
        """Whether it can be read from here, from the folder or the backend."""
        if self.is_here(blob) or self._backend is None:
            return self.is_here(blob)
        try:
            self.index(blob)
        except Missing:
            return False
        return True

    def is_here(self, blob: BlobId) -> bool:
        """Whether it is whole in the folder."""
        return self._file(blob, ".index").is_file() and self._file(blob).is_file()

    def path(self, blob: BlobId) -> Path:
        """The file with its bytes, fetched from the backend where needed; not to be written to.

        Pin what is to stay: with a quota, the next blob may take its place. Raises: Missing, Unavailable.
        """
        if not self.is_here(blob):
            return self.pull(blob)
        self._touch(blob)
        return self._file(blob)

    def index(self, blob: BlobId) -> BlobIndex:
        """Raises: Missing; Invalid when the index on disk is damaged; Unavailable, Misbehaviour from the backend."""
        here = self.is_here(blob)
        with self._lock:
            known = self._indexes.get(blob) if here or self._backend else None
            if known is not None:
                self._indexes.move_to_end(blob)
                return known
        if here:
            index = BlobIndex.parse(blob, self._file(blob, ".index").read_bytes())
        elif self._backend is not None:
            index = _stored_index(blob, self._backend)
        else:
            raise self._missing(blob)
        with self._lock:
            self._indexes[blob] = index
            while len(self._indexes) > CACHED_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def open_index(self, blob: BlobId) -> Readable:
        """The index, as bytes. Raises as `index`."""
        data = self.index(blob).to_bytes()
        return FewBytes(data) if len(data) <= IN_MEMORY else self._spool(data)

    def read_chunk(self, blob: BlobId, number: int) -> bytes:
        """One chunk, checked. Raises as `open_chunk`."""
        chunk = self.open_chunk(blob, number)
        try:
            return chunk.read(0, chunk.size)
        finally:
            chunk.close()

    def open_chunk(self, blob: BlobId, number: int) -> OpenChunk:
        """One chunk, checked: a damaged disk must not make us serve wrong bytes, for which others would drop us.

        Raises: Missing; Unavailable when the bytes on disk are damaged, after which the blob is no longer offered.
        Cost: one SHA-256 of it, 1 MiB of memory meanwhile.
        """
        index = self.index(blob)
        size = index.chunk_size(number)
        if not self.is_here(blob):
            return self._spooled(index, number)
        with disk(self.folder):
            fd = os.open(self._file(blob), os.O_RDONLY | os.O_CLOEXEC)
        try:
            start = number * CHUNK_BYTES
            if index.fits(number, os.pread(fd, size, start)):
                self._touch(blob)
                return OpenChunk(fd, start, size)
            log.error("blob_damaged", blob=blob, chunk=number, file=str(self._file(blob)))
            self._forget(blob)
            raise Unavailable(f"blob {blob[:16]}… is damaged here: fetch it from another peer")
        except BaseException:
            os.close(fd)
            raise

    def remove(self, blob: BlobId) -> None:
        """Forget a blob with its pins, and what an interrupted fetch of it left, here and behind. Safe to repeat."""
        self._forget(blob)
        self._drop_part(blob)
        for name in self.pins(blob):
            self.unpin(blob, name)
        if self._backend is not None:
            self._backend.remove(blob)

    # --- what stays -------------------------------------------------------------------------------------------------

    def pin(self, blob: BlobId, name: str) -> None:
        """Keep a blob while `name` wants it, whatever else needs room; also one that is yet to be fetched."""
        with disk(self.folder):
            self._pin_file(blob, name).touch()

    def unpin(self, blob: BlobId, name: str) -> None:
        """`name` needs it no more. Once nobody does, it may be evicted. Safe when it was not pinned."""
        with disk(self.folder):
            self._pin_file(blob, name).unlink(missing_ok=True)

    def pins(self, blob: BlobId) -> set[str]:
        """Who wants it kept."""
        start = parse_blob_id(blob) + PIN
        return {file.name.removeprefix(start) for file in self.folder.glob(f"{start}*")}

    def usage(self) -> Usage:
        """Cost: one look at each file."""
        with disk(self.folder):
            return self._room.usage()

    def blobs(self) -> list[BlobId]:
        """What is whole in the folder, sorted."""
        with disk(self.folder):
            return sorted(holding.blob for holding in holdings(self.folder).values() if holding.whole)

    # --- fetches ----------------------------------------------------------------------------------------------------

    def resume(self, index: BlobIndex) -> PartialBlob:
        """Go on with a fetch: whole chunks on disk are checked again, and kept as far as they are right.

        Raises: Conflict when another process is at it; Unavailable when there is no room, before a byte is fetched.
        Cost: one SHA-256 of what is here.
        """
        blob, data = index.id, index.to_bytes()
        with self._room.make(blob, index.size + len(data)):
            with disk(self.folder):
                if self._file(blob).exists() and not self.is_here(blob):  # a crash between data and index
                    self._file(blob).replace(self._file(blob, PART))
                if not self._file(blob, ".part-index").exists():
                    replace_file(self._file(blob, ".part-index"), data)
            partial = PartialBlob(index, self._file(blob, PART), self._commit)
        try:
            partial.check()
        except BaseException:
            partial.close()
            raise
        return partial

    def started_index(self, blob: BlobId) -> BlobIndex | None:
        """The index of a fetch that was interrupted, so that no peer has to send it again."""
        try:
            return BlobIndex.parse(blob, self._file(blob, ".part-index").read_bytes())
        except (FileNotFoundError, Invalid):
            return None

    def pull(self, blob: BlobId, *, stop: Callable[[], bool] = lambda: False) -> Path:
        """Have a blob in the folder that the backend has; goes on with what is here of it.

        Args:
            stop: asked between batches of 8 MiB; True ends it with `Unavailable`, and keeps what came.

        Raises: Missing; Unavailable; Misbehaviour when the backend holds other bytes than the blob's.
        """
        backend = self._backend
        if backend is None:
            raise self._missing(blob)
        index = self.index(blob)
        partial = self.resume(index)
        try:
            todo = [number for number in range(len(index.chunks)) if number not in partial.kept]
            for start in range(0, len(todo), BATCH):
                if stop():
                    raise Unavailable(f"fetching blob {blob[:16]}… was stopped")
                numbers = todo[start : start + BATCH]
                for number, data in zip(numbers, backend.chunks(blob, numbers), strict=True):
                    if not partial.add(number, data):
                        raise _damaged(blob, number)
            return partial.finish()
        finally:
            partial.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _start_put(self, size: int) -> tuple[Path, int]:
        file = self.folder / (secrets.token_hex(32) + PUT)
        with self._room.make(None, size + 67 * (size // CHUNK_BYTES + 2)):
            with disk(self.folder):
                fd = open_file(file)
                try:
                    lock_file(fd, "our own file")
                    os.ftruncate(fd, size)
                except BaseException:
                    os.close(fd)
                    file.unlink(missing_ok=True)
                    raise
        return file, fd

    def _commit(self, file: Path, index: BlobIndex) -> Path:
        """Data first, index last: whoever sees the index sees the data."""
        with disk(self.folder):
            file.replace(self._file(index.id))
            started = self._file(index.id, ".part-index")
            if not started.exists():
                replace_file(started, index.to_bytes())
            sync_folder(self.folder)
            started.replace(self._file(index.id, ".index"))
            self._touch(index.id)
            sync_folder(self.folder)
        return self._file(index.id)

    def _upload(self, index: BlobIndex, backend: BlobBackend) -> None:
        blob = index.id
        with suppress(Missing):
            if backend.index(blob) == index.to_bytes():
                return
        there = backend.sizes(blob)
        todo = [number for number in range(len(index.chunks)) if there.get(number) != index.chunk_size(number)]
        for start in range(0, len(todo), BATCH):
            batch = {number: self.read_chunk(blob, number) for number in todo[start : start + BATCH]}
            backend.put_chunks(blob, batch)
        backend.put_index(blob, index.to_bytes())

    def _spooled(self, index: BlobIndex, number: int) -> OpenChunk:
        """A chunk of the backend, in a file without a name."""
        if self._backend is None:
            raise self._missing(index.id)
        (data,) = self._backend.chunks(index.id, [number])
        if not index.fits(number, data):
            raise _damaged(index.id, number)
        return self._spool(data)

    def _spool(self, data: bytes) -> OpenChunk:
        with disk(self.folder), tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
            write_all(file.fileno(), data, 0)
            return OpenChunk(os.dup(file.fileno()), 0, len(data))

    def _touch(self, blob: BlobId) -> None:
        """It was used just now."""
        with suppress(FileNotFoundError):  # evicted in this moment, which is for the caller to find out
            os.utime(self._file(blob, ".index"))

    def _forget(self, blob: BlobId) -> None:
        with self._lock:
            self._indexes.pop(blob, None)
        self._file(blob, ".index").unlink(missing_ok=True)
        self._file(blob).unlink(missing_ok=True)

    def _drop_part(self, blob: BlobId) -> None:
        """What an interrupted fetch left; one that is under way ends by itself."""
        with self._room.alone():
            if not is_held(self._file(blob, PART)):
                for suffix in (PART, ".journal", ".part-index"):
                    self._file(blob, suffix).unlink(missing_ok=True)

    def _missing(self, blob: BlobId) -> Missing:
        return Missing(f"blob {blob[:16]}… is not in this store")

    def _pin_file(self, blob: BlobId, name: str) -> Path:
        if _PIN_NAME.fullmatch(name) is None:
            raise Invalid(
                f"a pin's name is up to 64 letters, digits, points, dashes and underscores, not {name[:80]!r}"
            )
        return self._file(blob, PIN + name)

    def _file(self, blob: BlobId, suffix: str = "") -> Path:
        return self.folder / (parse_blob_id(blob) + suffix)


def _stored_index(blob: BlobId, backend: BlobBackend) -> BlobIndex:
    try:
        return BlobIndex.parse(blob, backend.index(blob))
    except Invalid as error:
        raise Misbehaviour(f"the storage holds another index for blob {blob[:16]}…: {error.message}") from error


def _damaged(blob: BlobId, number: int) -> Misbehaviour:
    fix = "remove the blob there and put it again"
    return Misbehaviour(f"the storage holds other bytes for chunk {number} of blob {blob[:16]}…: {fix}")


def _sweep(folder: Path) -> None:
    """What a process that was killed while it wrote left behind."""
    for file in (*folder.glob(f"*{PUT}"), *folder.glob(f"{TEMPORARY}*")):
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > STALE_S and not is_held(file):
                file.unlink()
