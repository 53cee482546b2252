"""The shards that a worker holds: fetched once, mapped into memory, let go of.

What was asked for is noted on disk first, so that a crash leaves nothing behind that nobody would let go of: the next
life knows what the last one held.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import anyio
import structlog
from anyio import to_thread

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.ids import BlobId, parse_blob_id
from tessera.models.dataset import Ids, Shard, open_shard
from tessera.training.home import write_atomic

__all__ = ["Fetch", "Release", "Shelf"]

log = structlog.get_logger()

Fetch = Callable[[BlobId], Awaitable[Path]]
Release = Callable[[BlobId], None]

NOTE_LIMIT = 4 * 2**20  # bytes


class Shelf:
    """Shards of one vocabulary. `file` remembers which blobs are held."""

    def __init__(self, fetch: Fetch, release: Release, file: Path, vocab_size: int) -> None:
        self._fetch, self._release, self._file, self._vocab_size = fetch, release, file, vocab_size
        self._here: dict[Shard, Ids] = {}
        self._coming: dict[Shard, anyio.Event] = {}
        self._noted = _read_note(file)  # what `fetch` was asked for and `release` was not told of
        self._writing = anyio.Lock()

    @property
    def here(self) -> Mapping[Shard, Ids]:
        return self._here

    async def get(self, blob: BlobId) -> Path:
        """The file of any blob, noted as held."""
        if blob not in self._noted:
            self._noted.add(blob)
            await self._note()
        return await self._fetch(blob)

    async def bring(self, shard: Shard) -> Ids:
        """The ids of `shard`. Of several who ask at once one fetches; each hears of its own failure."""
        while (ids := self._here.get(shard)) is None:
            if (other := self._coming.get(shard)) is not None:
                await other.wait()
                continue
            over = self._coming[shard] = anyio.Event()
            try:
                path = await self.get(shard.blob)
                self._here[shard] = await to_thread.run_sync(open_shard, path, shard, self._vocab_size)
            finally:
                del self._coming[shard]
                over.set()
            log.info("data_here", shard=shard.blob, tokens=shard.tokens, held=len(self._here))
        return ids

    async def keep_only(self, shards: Iterable[Shard], also: Iterable[BlobId]) -> None:
        """Let go of everything but `shards`, what is being fetched, and the blobs `also`."""
        kept = set(shards)
        for shard in self._here.keys() - kept:
            del self._here[shard]
        wanted = {shard.blob for shard in (*kept, *self._coming)} | set(also)
        gone = sorted(self._noted - wanted)
        for blob in gone:
            await to_thread.run_sync(self._release, blob)
            self._noted.discard(blob)
            log.info("data_released", shard=blob)
        if gone:
            await self._note()

    async def _note(self) -> None:
        async with self._writing:  # the newest set is written last; a small local file
            await to_thread.run_sync(write_atomic, self._file, encoding.encode(sorted(self._noted)))


def _read_note(file: Path) -> set[BlobId]:
    """The blobs that an earlier life held."""
    try:
        with file.open("rb") as stream:
            value = encoding.decode(stream.read(NOTE_LIMIT + 1), NOTE_LIMIT)
        if not isinstance(value, list):
            raise Invalid(f"{file} is no list")
        return {parse_blob_id(blob) for blob in value}
    except FileNotFoundError:
        return set()
    except (OSError, Invalid) as error:  # what it held stays until somebody removes it; nothing else depends on it
        log.warning("held_data_unreadable", file=str(file), reason=str(error))
        return set()
