"""Messages over an engine's byte stream: four bytes of header, then the message.

    header = last << 31 | length          big-endian; length < 2^31, and > 0 unless last

The engine says only that bytes have ended; `last` says that they were meant to end there. So a stream that is cut, or
whose sender was dropped, cannot pass for a finished one.

Invariants: the buffer never holds more than one message of the reader's limit and `READ_AHEAD`, and grows with what
arrived, not with what was announced; a message is taken out of it whole or not at all, so `recv` may be cancelled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio

from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, TesseraError, Unavailable, from_dict
from tessera.core.ids import PeerId
from tessera.p2p.pacer import Pacer
from tessera.p2p.transport import MAX_MESSAGE
from tessera.p2p.versions import seen_from_here

__all__ = ["HEADER_BYTES", "READ_AHEAD", "Channel", "FramedStream", "frame_header", "open_in_time"]

HEADER_BYTES = 4
LAST = 1 << 31
READ_AHEAD = 16 * 1024  # bytes that a channel may return beyond what was asked for
PIECE = 256 * 1024  # bytes handed to the engine at once: one copy of 256 KiB holds up the event loop for 0.1 ms
CONSENT_LIMIT = 8 * 1024  # bytes of the answer to a hello
REASON_S = 1.0  # how long a failed send waits for the peer's reason


class Channel(Protocol):
    """What an engine provides for one stream. Failures of link or peer are `Unavailable`."""

    async def read(self, want: int) -> bytes:
        """From 1 to max(want, READ_AHEAD) bytes; b"" at the end. Cancelling it loses nothing."""
        ...

    async def write(self, data: bytes) -> None:
        """All of it; waits while the peer is slow."""
        ...

    async def finish(self) -> None:
        """No more bytes follow; what was written still arrives."""
        ...

    async def give_way(self) -> None:
        """Let other streams of the same link go first, for what we send. Never raises."""
        ...

    async def reset(self, code: int) -> None:
        """Drop our sending half, also while a write waits. Never raises."""
        ...

    def release(self) -> None:
        """The last message is read: take in the end that follows it, without waiting."""
        ...

    async def stop(self, code: int) -> None:
        """Ask the peer to stop sending; a read that waits raises Unavailable. Never raises."""
        ...


def frame_header(length: int, *, last: bool) -> bytes:
    return (length | (LAST if last else 0)).to_bytes(HEADER_BYTES, "big")


class FramedStream:
    """`Stream` on a `Channel`.

    Args:
        consented: False on the opener's side, where the peer's answer to the hello comes before its first message.
        pacer: the node's; None: nothing is paced.
        bulk: gives way to other streams of this node.
    """

    def __init__(
        self, channel: Channel, peer: PeerId, *, consented: bool, pacer: Pacer | None = None, bulk: bool = False
    ) -> None:
        self._channel, self._peer = channel, peer
        self._consented, self._pacer, self._bulk = consented, pacer, bulk
        self._refusal: TesseraError | None = None
        self._buffer = bytearray()
        self._corked = b""  # goes out with the next message: one packet instead of two
        self._sending, self._receiving = anyio.Lock(fast_acquire=True), anyio.Lock(fast_acquire=True)
        self._sent = self._received = 0
        self._said_last = self._heard_last = False
        self._send_broken = self._aborted = False

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def sent_bytes(self) -> int:
        return self._sent

    @property
    def received_bytes(self) -> int:
        return self._received

    # --- sending ----------------------------------------------------------------------------------------------------

    def cork(self, message: bytes) -> None:
        """Hold a short message back until the next one, or until we wait for the peer's consent."""
        self._corked += frame_header(len(message), last=False) + message

    async def give_way(self) -> None:
        """From now on this is bulk: other streams go first. Never raises."""
        self._bulk = True
        await self._channel.give_way()

    async def send(self, data: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        """See `Stream.send`. Sends from several tasks wait for each other, so that messages stay whole."""
        if not last and not len(data):
            raise Invalid("an empty message would read as the end of the stream: send at least one byte")
        view = memoryview(data).cast("B")
        if view.nbytes > MAX_MESSAGE:
            raise Invalid(f"a message of {view.nbytes} bytes, at most {MAX_MESSAGE}: send it in parts")
        try:
            async with self._sending:
                await self._send_locked(view, last)
        except Unavailable:
            await self._raise_refusal()
            raise

    async def _send_locked(self, view: memoryview, last: bool) -> None:
        if self._said_last:
            raise Conflict("the last message of this stream is sent")
        if self._send_broken:
            raise Unavailable(f"the stream to {self._peer[:16]}… is broken: open another")
        try:
            await self._write(view, last)
            self._said_last = last
        except BaseException:
            self._send_broken = True
            with anyio.CancelScope(shield=True):
                await self._channel.reset(0)
            raise

    async def _write(self, view: memoryview, last: bool) -> None:
        done = self._piece_bytes()
        first = b"".join((self._corked, frame_header(view.nbytes, last=last), view[:done]))
        self._corked = b""
        await self._write_piece(first)
        while done < view.nbytes:
            size = self._piece_bytes()
            await self._write_piece(bytes(view[done : done + size]))
            done += size
        if last:
            await self._channel.finish()

    async def _uncork(self) -> None:
        async with self._sending:
            corked, self._corked = self._corked, b""
            if corked and not self._send_broken:
                await self._write_piece(corked)

    def _piece_bytes(self) -> int:
        return PIECE if self._pacer is None else self._pacer.piece_bytes(PIECE, bulk=self._bulk)

    async def _write_piece(self, piece: bytes) -> None:
        if self._pacer is None:
            await self._channel.write(piece)
        else:
            async with self._pacer.sending(len(piece), self._peer, bulk=self._bulk):
                await self._channel.write(piece)
        self._sent += len(piece)

    async def _raise_refusal(self) -> None:
        """A peer that refuses stops listening first; its reason is then on the way to us."""
        if self._consented or self._aborted:
            return
        with anyio.move_on_after(REASON_S):
            try:
                await self.consent()
            except Unavailable:
                if self._refusal is not None:
                    raise
                return  # no reason came: the send's own failure stands

    # --- receiving --------------------------------------------------------------------------------------------------

    async def recv(self, limit: int) -> bytes:
        """See `Stream.recv`."""
        if not self._consented:
            await self.consent()
        async with self._receiving:
            return await self._next(limit)

    async def consent(self) -> None:
        """Wait for the peer's answer to our hello; raises what it answered when that is no."""
        await self._uncork()
        async with self._receiving:
            if self._refusal is not None:
                raise self._refusal
            if self._consented:
                return
            answer = self._parse(await self._next(CONSENT_LIMIT))
            if answer.keys() == {"error"}:
                self._refusal = seen_from_here(from_dict(answer["error"]))
                self._refusal.fields["peer"] = self._peer
                raise self._refusal
            if answer:
                raise self._misbehaves("an answer to a hello is {} or an error", answer=str(answer)[:200])
            self._consented = True

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            answer = encoding.decode(data, CONSENT_LIMIT)
        except Invalid as error:
            raise self._misbehaves(f"the answer to a hello cannot be read: {error}", head=data[:64].hex()) from error
        if not isinstance(answer, dict):
            raise self._misbehaves("the answer to a hello is no object", head=data[:64].hex())
        return answer

    async def _next(self, limit: int) -> bytes:
        if self._aborted:
            raise Unavailable(f"the stream to {self._peer[:16]}… was aborted")
        if self._heard_last:
            return b""
        if not await self._fill(HEADER_BYTES):
            if self._buffer:
                raise self._misbehaves("the stream ends inside a header", got=bytes(self._buffer).hex())
            raise Unavailable(f"{self._peer[:16]}… cut the stream before its last message")
        header = int.from_bytes(self._buffer[:HEADER_BYTES], "big")
        length, last = header & (LAST - 1), bool(header & LAST)
        if length > limit:
            await self._channel.stop(0)
            raise self._misbehaves(f"a message of {length} bytes, at most {limit} expected", length=length, limit=limit)
        if length == 0 and not last:
            raise self._misbehaves("an empty message that is not the last")
        if not await self._fill(HEADER_BYTES + length):
            got = len(self._buffer) - HEADER_BYTES
            raise self._misbehaves(f"the stream ends after {got} of a message's {length} bytes", got=got, length=length)
        message = bytes(memoryview(self._buffer)[HEADER_BYTES : HEADER_BYTES + length])
        del self._buffer[: HEADER_BYTES + length]
        if last:
            self._heard_last = True
            self._channel.release()
        return message

    async def _fill(self, count: int) -> bool:
        """Have `count` bytes in the buffer; False when the stream ends before."""
        while len(self._buffer) < count:
            data = await self._channel.read(count - len(self._buffer))
            if not data:
                return False
            self._received += len(data)
            self._buffer += data
        return True

    def _misbehaves(self, what: str, **evidence: Any) -> Misbehaviour:
        return Misbehaviour(f"{self._peer[:16]}…: {what}", evidence={"peer": self._peer, "fault": what, **evidence})

    # --- the end ----------------------------------------------------------------------------------------------------

    async def abort(self, code: int = 0) -> None:
        """See `Stream.abort`."""
        if self._aborted or (self._said_last and self._heard_last):
            return
        self._aborted = self._send_broken = True
        self._buffer.clear()
        with anyio.CancelScope(shield=True):
            await self._channel.reset(code)
            await self._channel.stop(code)

    async def end(self, timeout_s: float) -> None:
        """End in good order, or abort when the peer does not take it in time."""
        try:
            with anyio.fail_after(timeout_s):
                if not self._said_last and not self._send_broken:
                    await self.send(b"", last=True)
                if not self._heard_last:
                    await self._channel.stop(0)
        except (TimeoutError, TesseraError):
            await self.abort()


async def open_in_time(
    make: Callable[[], Awaitable[FramedStream]], peer: PeerId, protocol: str, *, timeout_s: float, confirm: bool
) -> FramedStream:
    """What `Transport.open` promises, around what each engine does: the stream of `make`, with the peer's consent if
    that is wanted. A stream that does not get so far, whatever happens, is dropped.

    Raises: Late; whatever `make` raises, or the peer's refusal.
    """
    stream: FramedStream | None = None
    try:
        with anyio.fail_after(timeout_s):
            stream = await make()
            if confirm:
                await stream.consent()
    except BaseException as error:
        if stream is not None:
            await stream.abort()
        if isinstance(error, TimeoutError):
            raise Late(f"{peer[:16]}… did not open {protocol} within {timeout_s:g} s") from None
        raise
    return stream
