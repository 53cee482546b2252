"""`tessera/blob/2`: how a blob's bytes are asked for and sent. One stream for each request.

    request  {"blob": id}                             the index
             {"blob": id, "chunk": n, "offset": o}    chunk n from its byte o on
    answer   {"size": s} or {"error": …}, then pieces: s bytes in messages of 4 to 64 KiB, the last of them any size

Pieces are what makes an interruption cheap: what arrived of a chunk is kept, and asked for no more. A server holds a
few pieces of each answer in memory, whatever is asked and however slowly it is read; specs/blobs.md has the vectors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import structlog
from anyio import to_thread

from tessera.core import encoding
from tessera.core.errors import Invalid, Late, Misbehaviour, TesseraError, Unavailable, from_dict
from tessera.core.ids import BlobId, PeerId, parse_blob_id
from tessera.p2p.blob_source import Readable
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.calls import ERROR_LIMIT, error_head
from tessera.p2p.transport import PeerRecord, Stream, Transport

__all__ = ["BLOBS", "Answer", "asking", "misbehaves", "piece_bytes", "serve_blobs"]

log = structlog.get_logger()

T = TypeVar("T")

BLOBS = "tessera/blob/2"
REQUEST_LIMIT = 256  # bytes
PIECE_BYTES = 64 * 1024  # the most of one message
SMALLEST_PIECE = 4 * 1024  # but for the last one: smaller ones would cost us more than the sender
PARTS = 1024  # a piece is no more than this part of a blob: 20 interruptions of 3 streams then lose 3 % of it
READ_BYTES = 4 * PIECE_BYTES  # from disk at once, for each answer
MAX_STREAMS = 16  # answers at once to one peer; 256 to all, which is 64 MiB of memory
CHECKING = 4  # chunks read and hashed at once, 1 MiB each
REQUEST_S = 10.0
TAKE_S = 60.0  # a reader may take this long for `READ_BYTES`
ANSWER_S = 600.0  # and this long for all of it: 1 MiB at 14 kb/s
OPEN_S = 20.0
HEAD_S = 30.0  # the peer may have to read and check first
QUIET_S = 30.0  # for one piece: 64 KiB at 17 kb/s


def piece_bytes(size: int) -> int:
    """How long the pieces of a blob of `size` bytes are: a power of two.

    >>> [piece_bytes(mib << 20) for mib in (1, 16, 100, 1000)]
    [4096, 16384, 65536, 65536]
    """
    piece = SMALLEST_PIECE
    while piece < PIECE_BYTES and 2 * piece * PARTS <= size:
        piece *= 2
    return piece


# --- serving --------------------------------------------------------------------------------------------------------


def serve_blobs(transport: Transport, store: BlobStore) -> None:
    """Offer what is in `store`, and behind it, to every peer."""
    checking = anyio.Semaphore(CHECKING)

    async def answer(stream: Stream) -> None:
        try:
            with anyio.fail_after(ANSWER_S):
                try:
                    source, offset, piece = await _find(stream, store, checking)
                except TesseraError as error:
                    log.debug("blob_not_served", peer_id=stream.peer, code=error.code, reason=error.message)
                    await stream.send(error_head(error), last=True)
                    return
                await _send(stream, source, offset, piece)
        except TimeoutError:
            raise Late(f"{stream.peer[:16]}… did not take what it asked for in time", peer=stream.peer) from None

    transport.serve(BLOBS, answer, max_streams=MAX_STREAMS)


async def _find(stream: Stream, store: BlobStore, checking: anyio.Semaphore) -> tuple[Readable, int, int]:
    """What is asked for: the bytes, where to begin, and how long the pieces are."""
    with anyio.fail_after(REQUEST_S):
        blob, number, offset = _parse_request(await stream.recv(REQUEST_LIMIT))
    async with checking:
        if number is None:
            return await to_thread.run_sync(store.open_index, blob), 0, PIECE_BYTES
        size = (await to_thread.run_sync(store.index, blob)).size
        chunk = await to_thread.run_sync(store.open_chunk, blob, number)
    if offset < chunk.size:
        return chunk, offset, piece_bytes(size)
    chunk.close()
    raise Invalid(f"chunk {number} has {chunk.size} bytes, none at offset {offset}")


async def _send(stream: Stream, source: Readable, offset: int, piece: int) -> None:
    try:
        await stream.send(encoding.encode({"size": source.size - offset}))
        for start in range(offset, source.size, READ_BYTES):
            want = min(READ_BYTES, source.size - start)
            block = await to_thread.run_sync(source.read, start, want)
            if len(block) != want:
                raise Unavailable("the bytes on disk have become fewer")
            with anyio.fail_after(TAKE_S):
                for at in range(0, want, piece):
                    last = start + at + piece >= source.size
                    await stream.send(memoryview(block)[at : at + piece], last=last)
    finally:
        source.close()


def _parse_request(data: bytes) -> tuple[BlobId, int | None, int]:
    value = encoding.decode(data, REQUEST_LIMIT)
    if isinstance(value, dict) and value.keys() == {"blob"}:
        return parse_blob_id(value["blob"]), None, 0
    if not isinstance(value, dict) or value.keys() != {"blob", "chunk", "offset"}:
        raise Invalid("a request for a blob has the field blob, and for a chunk, chunk and offset")
    number, offset = value["chunk"], value["offset"]
    if type(number) is not int or type(offset) is not int or number < 0 or offset < 0:
        raise Invalid("a chunk's number and the offset in it are whole numbers from 0 on")
    return parse_blob_id(value["blob"]), number, offset


# --- asking ---------------------------------------------------------------------------------------------------------


class Answer:
    """What a peer sends, piece by piece. `size` is what it announced, and is no more than was asked for."""

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream, self.size, self._got = stream, size, 0

    async def piece(self) -> bytes:
        """The next piece; b"" when all have come.

        Raises: Unavailable when the peer is gone; Late when it is silent for `QUIET_S`; Misbehaviour for a piece that
        is too short or too long, and for an answer that ends too early or too late.
        """
        left = self.size - self._got
        data = await _soon(self._stream, self._stream.recv(min(PIECE_BYTES, max(left, 1))), QUIET_S)
        if len(data) < min(SMALLEST_PIECE, left) or (data and not left):
            what = f"a piece of {len(data)} bytes when {left} of {self.size} were to come"
            raise misbehaves(self._stream.peer, what)
        self._got += len(data)
        return data


@asynccontextmanager
async def asking(
    transport: Transport, peer: PeerRecord, request: dict[str, Any], size: range, count: Callable[[int], None]
) -> AsyncIterator[Answer]:
    """Ask `peer`, and read its answer in the body.

    Args:
        size: what the answer may be long.
        count: told at the end how many bytes came over the wire.

    Raises: what `Transport.open` raises; what the peer answered, with the field `peer`; Late; Misbehaviour.
    """
    stream = await transport.open(peer, BLOBS, timeout_s=OPEN_S, bulk=True, confirm=False)
    try:
        await _soon(stream, stream.send(encoding.encode(request), last=True), OPEN_S)
        head = await _soon(stream, stream.recv(ERROR_LIMIT), HEAD_S)
        yield Answer(stream, _parse_head(peer.id, head, size))
    finally:
        count(stream.received_bytes)
        await stream.abort()  # nothing to abort when all went well


def misbehaves(peer: PeerId, what: str, **evidence: Any) -> Misbehaviour:
    return Misbehaviour(f"{peer[:16]}…: {what}", evidence={"peer": peer, "fault": what, **evidence})


def _parse_head(peer: PeerId, data: bytes, size: range) -> int:
    try:
        head = encoding.decode(data, ERROR_LIMIT)
    except Invalid as error:
        raise misbehaves(peer, f"an answer that cannot be read: {error}", head=data[:64].hex()) from error
    if isinstance(head, dict) and head.keys() == {"error"}:
        raise _their_error(peer, head["error"])
    if not isinstance(head, dict) or head.keys() != {"size"} or type(head["size"]) is not int:
        raise misbehaves(peer, "an answer begins with its size or an error", head=data[:64].hex())
    if head["size"] not in size:
        what = f"an answer of {head['size']} bytes, {size.start} to {size.stop - 1} expected"
        raise misbehaves(peer, what, head=data[:64].hex())
    return head["size"]


def _their_error(peer: PeerId, value: object) -> TesseraError:
    """What a peer says went wrong on its side. That somebody misbehaved is its word, and proves nothing to us."""
    error = from_dict(value)
    if isinstance(error, Misbehaviour):
        error = Unavailable(f"{peer[:16]}… cannot serve it: {error.message}")
    error.fields["peer"] = peer
    return error


async def _soon(stream: Stream, action: Awaitable[T], seconds: float) -> T:
    try:
        with anyio.fail_after(seconds):
            return await action
    except TimeoutError:
        raise Late(f"{stream.peer[:16]}… was silent for {seconds:g} s", peer=stream.peer) from None
