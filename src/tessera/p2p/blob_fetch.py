"""One fetch of a blob from several peers at once.

Each peer has `WINDOW` streams. A stream brings one chunk from where its beginning on disk ends, so an interruption, a
peer that leaves and a peer that is too slow all cost a few pieces and no more. Whoever has nothing left to take looks
for a chunk that it would have sooner than the peer that brings it, and takes it over where that one is: near the end a
slow peer holds nothing up, and hardly a byte comes twice.

Nobody is named without proof. A chunk that came from one peer alone and is wrong proves that this one lied. One whose
parts came from several, or from before a restart, is fetched again from one peer alone; the right bytes then tell which
parts were wrong, since a hash of each peer's part is kept. What a liar brought of other chunks is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import anyio
import structlog
from anyio import to_thread

from tessera.core.errors import Late, Misbehaviour, Missing, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId, PeerId
from tessera.p2p.blob_attempt import Attempt, Span
from tessera.p2p.blob_index import INDEX_LIMIT, BlobIndex
from tessera.p2p.blob_pace import Pace
from tessera.p2p.blob_part import PartialBlob
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blob_wire import asking, misbehaves
from tessera.p2p.transport import PeerRecord, Transport

__all__ = ["Fetch", "Fetched", "Progress"]

log = structlog.get_logger()

T = TypeVar("T")

WINDOW = 3  # streams to one peer: while one waits a round trip for its next chunk, two fill the link
TRIES = 3  # in a row, for a peer that is away or slow; one that lacks the blob or lies gets no second
PAUSE_S = 1.0
INDEX_S = 60.0  # 8 MiB, the largest, at 1.2 Mb/s
STAGGER_S = 1.0  # after this long without an index, the next peer is asked for it too
INDEX_PEERS = 4  # asked for it at once
FLUSH_BYTES = 256 * 1024  # of a chunk go to disk at once
FLUSH_S = 0.01  # or what came in this time, whatever is less: a kill loses it
LOOK_S = 0.5  # how often a peer with nothing to do looks for a chunk to take over
TAKE_OVER = 2.0  # it has to be faster by this, and by
TAKE_OVER_S = 0.5

Progress = Callable[[int, int], None]  # bytes of the blob that are here, and all of them


@dataclass(frozen=True, slots=True)
class Fetched:
    """How a fetch went."""

    path: Path
    fetched_bytes: int  # of the blob
    kept_bytes: int  # of the blob, were on disk already
    received_bytes: int  # over the wire: index, headers, and what came twice or was wrong
    dropped: tuple[PeerId, ...]  # served wrong bytes


@dataclass(eq=False, slots=True)
class _Source:
    """A peer that is asked."""

    record: PeerRecord
    pace: Pace = field(default_factory=Pace)
    error: TesseraError | None = None  # why it is asked no more


@dataclass(eq=False, slots=True)
class _Hold:
    """A chunk in a peer's hands."""

    source: _Source
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    released: anyio.Event = field(default_factory=anyio.Event)
    heir: _Source | None = None  # takes it over


class Fetch:
    """`_left` counts the chunks that are not on disk; those in nobody's hands are in `_todo`."""

    def __init__(
        self,
        transport: Transport,
        peers: Sequence[PeerRecord],
        blob: BlobId,
        store: BlobStore,
        progress: Progress | None,
    ) -> None:
        self._transport, self._blob, self._store, self._progress = transport, blob, store, progress
        self._sources = [_Source(peer) for peer in {peer.id: peer for peer in peers}.values()]
        self._todo: deque[int] = deque()
        self._holds: dict[int, _Hold] = {}
        self._spans: dict[int, list[Span]] = {}  # who brought the beginnings that are on disk
        self._suspects: dict[int, list[Span]] = {}  # who brought chunks that turned out wrong
        self._left = 0
        self._here: list[int] = []  # of each chunk, what was on disk before and was right
        self._received = 0
        self._changed = anyio.Event()
        self._fatal: TesseraError | None = None  # ours, not a peer's
        self._scope = anyio.CancelScope()

    async def run(self) -> Fetched:
        """Raises: see `tessera.p2p.blobs.fetch`."""
        started = await to_thread.run_sync(self._store.started_index, self._blob)
        index = started or await self._fetch_index()
        partial = await to_thread.run_sync(self._store.resume, index)
        self._here = [partial.prefix(number) for number in range(len(index.chunks))]
        try:
            await self._fetch_chunks(index, partial)
            path = await to_thread.run_sync(partial.finish)
        finally:
            here, received = partial.here_bytes, self._received
            log.info("blob_fetch_ended", blob=self._blob, size=index.size, here_bytes=here, received_bytes=received)
            partial.close()
        kept = sum(self._here)
        return Fetched(path, index.size - kept, kept, received, self._liars())

    # --- the index --------------------------------------------------------------------------------------------------

    async def _fetch_index(self) -> BlobIndex:
        """From whoever has it first. A peer that is slow or away here may still bring chunks."""
        for _ in range(TRIES):
            errors, found = dict[PeerId, TesseraError](), list[BlobIndex]()
            places = anyio.Semaphore(INDEX_PEERS)
            async with anyio.create_task_group() as tasks:
                for source in self._asked():
                    asked = anyio.Event()
                    tasks.start_soon(self._ask_index, source, places, asked, errors, found, tasks.cancel_scope)
                    with anyio.move_on_after(STAGGER_S):
                        await asked.wait()
            if found:
                return found[0]
            if not self._asked():
                break
            await anyio.sleep(PAUSE_S)
        for source in self._asked():
            self._drop(source, errors[source.record.id])
        raise self._failure()

    async def _ask_index(
        self,
        source: _Source,
        places: anyio.Semaphore,
        asked: anyio.Event,
        errors: dict[PeerId, TesseraError],
        found: list[BlobIndex],
        scope: anyio.CancelScope,
    ) -> None:
        try:
            async with places:
                found.append(await self._index_from(source))
            scope.cancel()
        except TesseraError as error:
            errors[source.record.id] = error
            if not isinstance(error, Unavailable | Late):
                self._drop(source, error)
        finally:
            asked.set()

    async def _index_from(self, source: _Source) -> BlobIndex:
        data = bytearray()
        sizes = range(1, INDEX_LIMIT + 1)
        try:
            with anyio.fail_after(INDEX_S):
                async with asking(self._transport, source.record, {"blob": self._blob}, sizes, self._count) as answer:
                    while piece := await answer.piece():
                        data += piece
        except TimeoutError:
            raise Late(f"{source.record.id[:16]}… did not send the index within {INDEX_S:g} s") from None
        if sha256(bytes(data)).hex() != self._blob:
            raise self._lie(source, f"{len(data)} bytes that are not its index")
        return await to_thread.run_sync(BlobIndex.parse, self._blob, bytes(data))

    # --- the chunks -------------------------------------------------------------------------------------------------

    async def _fetch_chunks(self, index: BlobIndex, partial: PartialBlob) -> None:
        self._index, self._partial = index, partial
        self._todo.extend(n for n in range(len(index.chunks)) if n not in partial.kept)
        self._left = len(self._todo)
        self._report()
        async with anyio.create_task_group() as tasks:
            self._scope = tasks.cancel_scope
            for _ in range(WINDOW):
                for source in self._asked():
                    tasks.start_soon(self._work, source)
        if self._fatal is not None:
            raise self._fatal
        if self._left:
            raise self._failure()

    async def _work(self, source: _Source) -> None:
        tries = 0
        while (number := await self._take(source)) is not None:
            before = self._partial.prefix(number)
            try:
                await self._hold(source, number)
                tries = 0
            except TesseraError as error:
                tries = 1 if self._partial.prefix(number) > before else tries + 1
                if tries == TRIES or not isinstance(error, Unavailable | Late):
                    self._drop(source, error)
                else:
                    await anyio.sleep(PAUSE_S)

    async def _take(self, source: _Source) -> int | None:
        """A chunk to fetch; waits while others may still give theirs back; None when all are here."""
        while self._left and source.error is None:
            if self._todo:
                return self._todo.popleft()
            number = self._slowest(source)
            if number is None:
                with anyio.move_on_after(LOOK_S):
                    await self._changed.wait()
                continue
            hold = self._holds[number]
            hold.heir = source
            hold.scope.cancel()
            await hold.released.wait()
            if number not in self._partial.kept:
                self._todo.appendleft(number)
        return None

    def _slowest(self, source: _Source) -> int | None:
        """The chunk that is longest in coming, if `source` would have it much sooner."""
        worst, worst_s, now = None, 0.0, anyio.current_time()
        for number, hold in self._holds.items():
            if hold.source is source or hold.heir is not None:
                continue
            left = self._index.chunk_size(number) - self._partial.prefix(number)
            theirs_s = hold.source.pace.seconds(left, now, streams=hold.source.pace.streams)
            ours_s = source.pace.seconds(left, now, streams=source.pace.streams + 1)
            if theirs_s > max(worst_s, TAKE_OVER * ours_s + TAKE_OVER_S):
                worst, worst_s = number, theirs_s
        return worst

    async def _hold(self, source: _Source, number: int) -> None:
        hold = self._holds[number] = _Hold(source)
        source.pace.begin(anyio.current_time())
        try:
            with hold.scope:
                await self._pull(source, number)
        finally:
            source.pace.end(anyio.current_time())
            del self._holds[number]
            if number in self._partial.kept:
                self._left -= 1
            elif hold.heir is None:
                self._todo.appendleft(number)
            hold.released.set()
            self._wake()

    async def _pull(self, source: _Source, number: int) -> None:
        """Bring what is missing of a chunk. What came is on disk, and who brought it is noted, however this ends."""
        attempt = await to_thread.run_sync(Attempt, self._partial, number, source.record.id)
        missing = self._index.chunk_size(number) - attempt.start
        try:
            if missing:
                await self._receive(source, number, missing, attempt)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close(source, number, attempt)

    async def _receive(self, source: _Source, number: int, missing: int, attempt: Attempt) -> None:
        request = {"blob": self._blob, "chunk": number, "offset": attempt.start}
        sizes = range(missing, missing + 1)
        async with asking(self._transport, source.record, request, sizes, self._count) as answer:
            while piece := await answer.piece():
                now = anyio.current_time()
                source.pace.note(len(piece), now)
                attempt.hold(piece, now)
                if attempt.waiting_bytes >= FLUSH_BYTES or now - attempt.waiting_since >= FLUSH_S:
                    with anyio.CancelScope(shield=True):
                        await self._flush(attempt)

    async def _flush(self, attempt: Attempt) -> None:
        if attempt.waiting_bytes:
            await self._on_disk(attempt.flush)
            self._report()

    async def _close(self, source: _Source, number: int, attempt: Attempt) -> None:
        """The attempt is over: keep what came, and look at a chunk that is whole."""
        await self._flush(attempt)
        spans = self._spans.setdefault(number, [])
        if attempt.end > attempt.start:
            spans.append(attempt.span())
        if attempt.end < self._index.chunk_size(number):
            if number in self._suspects:  # to come from one peer alone
                await self._cut(number, 0)
            return
        if await self._on_disk(attempt.settle):
            del self._spans[number]
            await self._judge(number)
            return
        await self._cut(number, 0)
        self._suspects.setdefault(number, []).extend(spans)
        if not attempt.start:
            raise self._lie(source, f"{attempt.end} bytes that are not chunk {number}")
        log.info("blob_chunk_wrong", blob=self._blob, chunk=number, peers=sorted({span.peer for span in spans}))

    async def _cut(self, number: int, size: int) -> None:
        """Forget what is here of a chunk from `size` on."""
        await self._on_disk(lambda: self._partial.cut(number, size))
        self._here[number] = min(self._here[number], size)
        self._spans[number] = [span for span in self._spans.get(number, ()) if span.end <= size]
        self._report()

    async def _judge(self, number: int) -> None:
        """A chunk is right at last: whoever had brought other bytes for it has lied."""
        spans = self._suspects.pop(number, [])
        if not spans:
            return
        chunk = await self._on_disk(lambda: self._partial.read(number, self._index.chunk_size(number)))
        if not self._index.fits(number, chunk):
            return  # the disk has damaged it since: that proves nothing
        liars = {span.peer for span in spans if not span.fits(chunk)}
        for source in self._sources:
            if source.record.id in liars:
                self._drop(source, self._lie(source, f"bytes that are not of chunk {number}"))

    async def _on_disk(self, action: Callable[[], T]) -> T:
        """Our own disk's failure ends the fetch: no other peer can help."""
        try:
            return await to_thread.run_sync(action)
        except TesseraError as error:
            self._fatal = self._fatal or error
            self._scope.cancel()
            raise

    # --- peers ------------------------------------------------------------------------------------------------------

    def _asked(self) -> list[_Source]:
        return [source for source in self._sources if source.error is None]

    def _drop(self, source: _Source, error: TesseraError) -> None:
        if source.error is None and self._fatal is None:
            source.error = error
            peer = source.record.id
            log.info("blob_peer_dropped", blob=self._blob, peer_id=peer, code=error.code, reason=error.message)
        self._wake()

    def _lie(self, source: _Source, what: str) -> Misbehaviour:
        return misbehaves(source.record.id, f"serves wrong bytes for blob {self._blob[:16]}…: {what}", blob=self._blob)

    def _liars(self) -> tuple[PeerId, ...]:
        return tuple(source.record.id for source in self._sources if isinstance(source.error, Misbehaviour))

    def _failure(self) -> TesseraError:
        blob, liars = f"blob {self._blob[:16]}…", self._liars()
        errors = [source.error for source in self._sources if source.error is not None]
        if liars:
            what = "; ".join(error.message for error in errors if isinstance(error, Misbehaviour))
            return Misbehaviour(f"no peer is left for {blob}; wrong bytes came: {what[:1000]}", evidence=list(liars))
        if errors and all(isinstance(error, Missing) for error in errors):
            return Missing(f"none of {len(errors)} peers has {blob}")
        reasons = "; ".join(error.message for error in errors)
        return Unavailable(f"no peer is left for {blob}: {reasons[:1000] or 'none was given'}")

    # --- counts -----------------------------------------------------------------------------------------------------

    def _count(self, received_bytes: int) -> None:
        self._received += received_bytes

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._partial.here_bytes, self._index.size)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
