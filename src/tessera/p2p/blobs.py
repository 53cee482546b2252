"""Blobs between peers: whoever has one may serve it, and nothing that arrives is believed unchecked.

Each chunk is compared with its hash on arrival, so it may come from any peer; one that serves other bytes is dropped
and named. A fetch asks all its peers at once, `WINDOW` chunks each, and goes on from what is on disk after an
interruption.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import structlog
from anyio import to_thread

from tessera.core.errors import Invalid, Late, Misbehaviour, Missing, TesseraError, Unavailable
from tessera.core.ids import BlobId, PeerId, parse_blob_id
from tessera.p2p.blob_store import CHUNK_BYTES, INDEX_LIMIT, BlobIndex, BlobStore, PartialBlob
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport

__all__ = ["BLOBS", "BlobStore", "Fetched", "fetch", "serve_blobs"]

log = structlog.get_logger()

BLOBS = "tessera/blob/1"
REQUEST_LIMIT = 256  # bytes
HEAD_BYTES = 64  # of a reply
WINDOW = 4  # chunks asked of one peer at once: fills 80 Mb/s at 50 ms round trip
INDEX_S = 20.0
CHUNK_S = 30.0  # 1 MiB at 0.28 Mb/s
TRIES = 3  # for a peer that is away or slow; one that lacks the blob or lies gets no second
PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """How a fetch went."""

    path: Path
    fetched_bytes: int
    kept_bytes: int  # were on disk already
    dropped: tuple[PeerId, ...]  # served wrong bytes


def serve_blobs(transport: Transport, store: BlobStore) -> None:
    """Offer what is in `store` to every peer: `{"blob": id}` asks for the index, with `"chunk": n` for a chunk."""

    async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        blob, number = parse_blob_id(request.get("blob")), request.get("chunk")
        if body or not request.keys() <= {"blob", "chunk"} or type(number) not in (int, type(None)):
            raise Invalid("a request for a blob has the fields blob and, for a chunk, its number")
        if number is None:
            index = await to_thread.run_sync(store.index, blob)
            return {}, index.to_bytes()
        return {}, await to_thread.run_sync(store.read_chunk, blob, number)

    serve_calls(transport, BLOBS, answer, request_limit=REQUEST_LIMIT)


async def fetch(
    transport: Transport, peers: Sequence[PeerRecord], blob: BlobId, store: BlobStore, *, timeout_s: float
) -> Fetched:
    """Have `blob` in `store`, from any of `peers`. What is fetched before a failure is kept for the next try.

    Raises: Late; Missing when no peer has it; Misbehaviour, with the peers' names, when none is left because some
    served wrong bytes; Unavailable when none is left for other reasons, or the disk is full.
    """
    blob = parse_blob_id(blob)
    try:
        with anyio.fail_after(timeout_s):
            while (other := store.fetching.get(blob)) is not None:
                await other.wait()
            if store.has(blob):
                return Fetched(store.path(blob), 0, store.index(blob).size, ())
            over = store.fetching[blob] = anyio.Event()
            try:
                return await _Fetch(transport, peers, blob, store).run()
            finally:
                del store.fetching[blob]
                over.set()
    except TimeoutError:
        raise Late(f"blob {blob[:16]}… was not complete within {timeout_s:g} s: fetch again to go on") from None


class _Fetch:
    """One fetch. `_left` counts the chunks that are not on disk; those in nobody's hands are in `_todo`."""

    def __init__(self, transport: Transport, peers: Sequence[PeerRecord], blob: BlobId, store: BlobStore) -> None:
        self._transport, self._peers, self._blob, self._store = transport, peers, blob, store
        self._errors: dict[PeerId, TesseraError] = {}
        self._todo: deque[int] = deque()
        self._left = 0
        self._fetched = 0
        self._changed = anyio.Event()

    async def run(self) -> Fetched:
        index = await self._fetch_index()
        partial = await to_thread.run_sync(self._store.resume, index)
        try:
            kept = sum(map(index.chunk_size, partial.kept))
            self._todo.extend(n for n in range(len(index.chunks)) if n not in partial.kept)
            self._left = len(self._todo)
            async with anyio.create_task_group() as tasks:
                for peer in self._peers:
                    for _ in range(WINDOW):
                        tasks.start_soon(self._work, peer, index, partial)
            if self._left:
                raise self._failure()
            path = await to_thread.run_sync(partial.finish)
        finally:
            partial.close()
        return Fetched(path, self._fetched, kept, self._liars())

    async def _fetch_index(self) -> BlobIndex:
        for peer in self._peers:
            try:
                data = await self._ask(peer, {"blob": self._blob}, INDEX_LIMIT, INDEX_S)
                return await to_thread.run_sync(BlobIndex.parse, self._blob, data)
            except TesseraError as error:
                wrong = isinstance(error, Invalid) and "peer" not in error.fields  # ours, about its bytes
                self._drop(peer, self._lie(peer, error.message) if wrong else error)
        raise self._failure()

    async def _work(self, peer: PeerRecord, index: BlobIndex, partial: PartialBlob) -> None:
        tries = 0
        while peer.id not in self._errors and (number := await self._take()) is not None:
            try:
                await self._fetch_chunk(peer, number, index, partial)
                tries = 0
            except TesseraError as error:
                self._give_back(number)
                tries += 1
                if tries == TRIES or not isinstance(error, Unavailable | Late):
                    self._drop(peer, error)
                else:
                    await anyio.sleep(PAUSE_S)
            except BaseException:
                self._give_back(number)
                raise

    async def _fetch_chunk(self, peer: PeerRecord, number: int, index: BlobIndex, partial: PartialBlob) -> None:
        data = await self._ask(peer, {"blob": self._blob, "chunk": number}, CHUNK_BYTES, CHUNK_S)
        if not await to_thread.run_sync(partial.add, number, data):
            raise self._lie(peer, f"{len(data)} bytes that are not chunk {number}")
        self._fetched += len(data)
        self._left -= 1
        self._wake()

    async def _ask(self, peer: PeerRecord, request: dict[str, Any], limit: int, timeout_s: float) -> bytes:
        _, body = await call(
            self._transport, peer, BLOBS, request, timeout_s=timeout_s, reply_limit=limit + HEAD_BYTES, bulk=True
        )
        return body

    async def _take(self) -> int | None:
        """A chunk to fetch; waits while others may still give theirs back; None when all are on disk."""
        while self._left:
            if self._todo:
                return self._todo.popleft()
            await self._changed.wait()
        return None

    def _give_back(self, number: int) -> None:
        self._todo.appendleft(number)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _drop(self, peer: PeerRecord, error: TesseraError) -> None:
        if peer.id not in self._errors:
            self._errors[peer.id] = error
            log.info("blob_peer_dropped", blob=self._blob, peer_id=peer.id, code=error.code, reason=error.message)
        self._wake()

    def _lie(self, peer: PeerRecord, what: str) -> Misbehaviour:
        evidence = {"peer": peer.id, "blob": self._blob, "fault": what}
        return Misbehaviour(
            f"{peer.id[:16]}… serves wrong bytes for blob {self._blob[:16]}…: {what}", evidence=evidence
        )

    def _liars(self) -> tuple[PeerId, ...]:
        return tuple(peer for peer, error in self._errors.items() if isinstance(error, Misbehaviour))

    def _failure(self) -> TesseraError:
        blob, liars, errors = f"blob {self._blob[:16]}…", self._liars(), self._errors
        if liars:
            names = ", ".join(f"{peer[:16]}…" for peer in liars)
            return Misbehaviour(f"no peer is left for {blob}; wrong bytes came from {names}", evidence=list(liars))
        if errors and all(isinstance(error, Missing) for error in errors.values()):
            return Missing(f"none of {len(errors)} peers has {blob}")
        reasons = "; ".join(f"{peer[:16]}…: {error.message}" for peer, error in errors.items())
        return Unavailable(f"no peer is left for {blob}: {reasons[:1000] or 'none was given'}")
