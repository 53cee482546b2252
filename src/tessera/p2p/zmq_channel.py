"""One stream of a zmq link: ordered bytes each way, with flow control and an end that is said.

A sender has at most `WINDOW` bytes under way that the peer's reader has not taken; the peer says what it took
(`CREDIT`). So whatever a peer does, what waits here for a reader is at most `WINDOW`, and what waits for the peer is
bounded likewise. Both halves end once: the peer's by END or RESET, ours by `finish` or `reset`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio
import anyio.lowlevel

from tessera.core.errors import Misbehaviour, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.framing import READ_AHEAD
from tessera.p2p.zmq_wire import FRAME, Kind, number, pack, pack_number

__all__ = ["BULK_WINDOW", "WINDOW", "Carrier", "ZmqChannel"]

WINDOW = 512 * 1024  # bytes of one stream under way
BULK_WINDOW = 256 * 1024  # what a bulk stream uses of it, since others queue behind
CREDIT_STEP = WINDOW // 4


class Carrier(Protocol):
    """A link, seen from its streams."""

    peer: PeerId
    acknowledged_bytes: int

    def is_ours(self, stream: int) -> bool:
        """Whether we opened it."""
        ...

    def post(self, message: bytes) -> None:
        """Send, now or as soon as the engine takes it. Never waits and never raises; a lost link ends itself."""
        ...

    @property
    def crowded(self) -> bool:
        """Whether messages wait for the engine."""
        ...

    async def thinned(self) -> None:
        """Wait until they do not, or the link is over."""
        ...


class ZmqChannel:
    """A `Channel`.

    Args:
        on_done: called once, when both halves are over.
    """

    def __init__(self, link: Carrier, number_: int, on_done: Callable[[], None]) -> None:
        self._link, self._number, self._on_done = link, number_, on_done
        self._halves = 2
        # what the peer sends
        self._buffer = bytearray()
        self._taken = self._credited = 0
        self._in_over = self._stopped = False
        self._in_error: Unavailable | None = None
        self._in_changed = anyio.Event()
        # what we send
        self._window = WINDOW
        self._sent = self._acked = self._counted = 0
        self._out_over = False
        self._out_error: Unavailable | None = None
        self._out_changed = anyio.Event()

    # --- for FramedStream -------------------------------------------------------------------------------------------

    async def read(self, want: int) -> bytes:
        await anyio.lowlevel.checkpoint()
        while not self._buffer:
            if self._in_error is not None:
                raise _again(self._in_error)
            if self._in_over:
                return b""
            await self._in_changed.wait()
        size = min(len(self._buffer), max(want, READ_AHEAD))
        data = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        self._taken += size
        if not self._in_over and self._taken - self._credited >= CREDIT_STEP:
            self._credited = self._taken
            self._link.post(pack_number(Kind.CREDIT, self._number, self._taken))
        return data

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        await anyio.lowlevel.checkpoint()
        done = 0
        while done < view.nbytes:
            size = min(view.nbytes - done, FRAME, self._room())
            if self._out_error is not None:
                raise _again(self._out_error)
            if size <= 0:
                await self._out_changed.wait()
            elif self._link.crowded:
                await self._link.thinned()
            else:
                self._sent += size
                self._link.post(pack(Kind.DATA, self._number, view[done : done + size]))
                done += size

    async def finish(self) -> None:
        if self._out_error is not None:
            raise _again(self._out_error)
        if not self._out_over:
            self._link.post(pack(Kind.END, self._number))
            self._count(self._sent)  # a peer gives no credit after the end
            self._end_out(None)

    async def give_way(self) -> None:
        self._window = BULK_WINDOW

    async def reset(self, code: int) -> None:
        if not self._out_over:
            self._drop(code, f"the stream was reset with code {code}")

    def release(self) -> None:
        """The end comes by itself, and takes nobody's place until then."""

    async def stop(self, code: int) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._buffer.clear()
        self._in_error = self._gone(f"the stream was stopped with code {code}")
        self._in_changed.set()
        if not self._in_over and self._sent_or_theirs():
            self._link.post(pack_number(Kind.STOP, self._number, code))
        elif not self._in_over:
            self._end_in()  # the peer never heard of this stream

    # --- for the link -----------------------------------------------------------------------------------------------

    def hear(self, kind: Kind, payload: memoryview) -> None:
        """Raises `Misbehaviour` for what breaks the rules of flow control."""
        if kind is Kind.DATA:
            self._hear_data(payload)
        elif kind is Kind.END:
            self._end_in()
        elif kind is Kind.CREDIT:
            self._hear_credit(number(payload))
        elif kind is Kind.RESET:
            self._buffer.clear()
            self._in_error = self._in_error or self._gone(f"the peer reset it with code {number(payload)}")
            self._end_in()
        elif not self._out_over:
            self._drop(number(payload), "the peer no longer listens")

    def lose(self, reason: str) -> None:
        """The link is over. What has arrived whole may still be read."""
        if not self._in_over:
            self._buffer.clear()
            self._in_error = self._in_error or self._gone(reason)
            self._end_in()
        self._out_error = self._out_error or self._gone(reason)
        self._end_out(self._out_error)

    def _hear_data(self, payload: memoryview) -> None:
        if self._in_over or not payload.nbytes:
            raise Misbehaviour("data after the end of a stream, or none")
        if self._stopped:
            return
        if self._taken + len(self._buffer) + payload.nbytes - self._credited > WINDOW:
            raise Misbehaviour(f"more than {WINDOW} bytes of one stream under way")
        self._buffer += payload
        self._in_changed.set()
        self._in_changed = anyio.Event()

    def _hear_credit(self, taken: int) -> None:
        if not self._acked <= taken <= self._sent:
            raise Misbehaviour(f"credit for {taken} bytes of {self._sent} that were sent, after {self._acked}")
        self._acked = taken
        self._count(taken)
        self._out_changed.set()
        self._out_changed = anyio.Event()

    # --- ends -------------------------------------------------------------------------------------------------------

    def _count(self, taken: int) -> None:
        """For the pacer. The end of a stream counts early, by `WINDOW` bytes at most."""
        self._link.acknowledged_bytes += max(0, taken - self._counted)
        self._counted = max(self._counted, taken)

    def _room(self) -> int:
        return self._window - (self._sent - self._acked)

    def _sent_or_theirs(self) -> bool:
        return self._sent > 0 or not self._link.is_ours(self._number)

    def _drop(self, code: int, reason: str) -> None:
        self._out_error = self._out_error or self._gone(reason)
        if self._sent_or_theirs():
            self._link.post(pack_number(Kind.RESET, self._number, code))
        self._end_out(self._out_error)

    def _end_in(self) -> None:
        if not self._in_over:
            self._in_over = True
            self._half_done()
        self._in_changed.set()

    def _end_out(self, error: Unavailable | None) -> None:
        self._out_error = self._out_error or error
        if not self._out_over:
            self._out_over = True
            self._half_done()
        self._out_changed.set()

    def _half_done(self) -> None:
        self._halves -= 1
        if not self._halves:
            self._on_done()

    def _gone(self, reason: str) -> Unavailable:
        peer = self._link.peer
        return Unavailable(f"the stream to {peer[:16]}… is gone: {reason}", peer=peer, reason=reason)


def _again(error: Unavailable) -> Unavailable:
    return Unavailable(error.message, **error.fields)
