"""One client of a relay: from the first byte to the last.

A connection goes through four phases: it asks (HTTP), it proves its key, it is live (datagrams to its key go here), or
it rests, because the same key was proven again later: then it neither sends nor receives, and takes over when the newer
one ends. There is no task for each client; everything happens in the event loop's callbacks. What arrives is
read into one buffer that all connections share, and what is sent in one turn of the loop leaves in one write.

Memory for each connection is bounded: at most one incomplete frame on the way in, `queue_bytes` twice over on the way
out. A client that reads slowly loses datagrams, as it would on a congested link; QUIC sends them again. A client that
sends more than its rate is not read for a while, so that it feels its own back-pressure.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from websockets.speedups import apply_mask  # compiled: without it a relay would be a hundred times slower

from tessera.core.errors import Invalid, TesseraError
from tessera.p2p.relay.bucket import TokenBucket
from tessera.p2p.relay.door import Door
from tessera.p2p.relay.frames import (
    CHALLENGE_BYTES,
    MAX_FRAME,
    PEER_BYTES,
    Kind,
    Status,
    challenge_frame,
    denial_frame,
    status_frame,
    verify_proof,
    ws_header,
)

__all__ = ["Connection", "Hub", "Limits"]

log = structlog.get_logger()

READ_BYTES = 256 * 1024
WRITE_PIECE = 64 * 1024  # written at once by a client whose rate is limited
UNSENT_BYTES = (
    128 * 1024
)  # the kernel keeps no more than this beside what is in flight, so that small frames do not wait
UNREAD_S, MIN_UNREAD_BYTES = 0.1, 64 * 1024  # of a client whose rate is limited, in the kernel
CONTROL_LIMIT = 64 * 1024  # bytes of frames that are never dropped, waiting for one client
PROOF_LIMIT = 256  # bytes of a frame before the key is proven
PING_AFTER_S = 15.0
SILENT_S = 30.0
REMEMBERED = 256  # keys that hear of it when this one goes
BINARY, CLOSE, PING, PONG = 0x82, 0x88, 0x89, 0x8A
DELIVERED = {Kind.SEND: Kind.DELIVER, Kind.SEND_BATCH: Kind.DELIVER_BATCH}
SHORTEST: dict[int, int] = {Kind.SEND: 1 + PEER_BYTES + 1 + 1, Kind.SEND_BATCH: 1 + PEER_BYTES + 3 + 1}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one relay gives."""

    rate: float  # bytes/s for each client, each direction
    queue_bytes: int  # of datagrams waiting for one client
    proof_timeout_s: float  # from connecting to having proven a key


class Hub(Protocol):
    """What a connection needs of its relay."""

    limits: Limits
    buffer: bytearray

    def door(self, connection: Connection) -> Door: ...
    def arrived(self, connection: Connection) -> None: ...
    def proven(self, connection: Connection, peer: bytes) -> str: ...
    def forward(self, source: Connection, payload: bytes) -> None: ...
    def left(self, connection: Connection) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """Made by the relay's listening socket."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        now = self.since = self._heard_at = self._loop.time()
        self._door: Door | None = None
        self._challenge = os.urandom(CHALLENGE_BYTES)
        self.peer = b""  # the key, once proven
        self.host = ""
        self.version = 0
        self.live = False
        self.sent_to: dict[bytes, None] = {}
        self.received_bytes = self.sent_bytes = self.dropped_bytes = 0
        self.reason = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._tail = b""
        self._rx, self._tx = TokenBucket(hub.limits.rate, now), TokenBucket(hub.limits.rate, now)
        self._told_limited = self._pinged = False
        self._out: deque[bytes | memoryview] = deque()
        self._out_bytes = 0
        self._full = False  # the socket takes no more at present
        self._flushing: asyncio.Handle | None = None
        self._resuming: asyncio.TimerHandle | None = None
        self._from: dict[int, bytes] = {}  # what goes before a datagram of ours

    # --- the event loop's side --------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport
        transport.set_write_buffer_limits(high=WRITE_PIECE)
        _tune(transport.get_extra_info("socket"), self._hub.limits.rate)
        peername = transport.get_extra_info("peername")
        self.host = str(peername[0]) if peername else ""
        self.address = f"{peername[0]}:{peername[1]}" if peername else ""
        self._door = self._hub.door(self)
        self._deadline = self._loop.call_later(self._hub.limits.proof_timeout_s, self.drop, "no_proof_in_time")
        self._hub.arrived(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """The shared buffer, behind what was left of an incomplete frame; nothing else runs until `buffer_updated`."""
        kept = len(self._tail)
        self._hub.buffer[:kept] = self._tail
        return memoryview(self._hub.buffer)[kept:]

    def buffer_updated(self, nbytes: int) -> None:
        size = len(self._tail) + nbytes
        self._tail = b""
        self._heard_at = self._loop.time()
        wait_s = self._rx.spend(nbytes, self._heard_at)
        with memoryview(self._hub.buffer)[:size] as data:
            try:
                taken = self._ask(data) if self._door is not None else 0
                if self._door is None:
                    taken += self._frames(data[taken:])
                self._tail = bytes(data[taken:])
            except TesseraError as error:
                self.refuse(error.message)
        if wait_s > 0 and not self._transport.is_closing():
            self._slow_down(wait_s)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._flush_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reason = self.reason or (type(exc).__name__ if exc else "closed_by_client")
        for handle in (self._deadline, self._flushing, self._resuming):
            if handle is not None:
                handle.cancel()
        self._out.clear()
        self._hub.left(self)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _ask(self, data: memoryview) -> int:
        """The HTTP phase. A client says nothing more before it has our challenge: all of it belongs to the request."""
        if self._door is None:
            return 0
        entry = self._door.feed(bytes(data))
        if entry is not None:
            self._transport.write(entry.reply)
            if not entry.open:
                self.drop(entry.reason or "answered", gently=True)
            else:
                self._door, self.version = None, entry.version
                self._control(challenge_frame(self._challenge))
        return len(data)

    def _frames(self, data: memoryview) -> int:
        """Take in every whole frame; returns how many bytes they had. Cost: 2 µs and one copy for each frame."""
        at, end = 0, len(data)
        while end - at >= 6 and not self._transport.is_closing():
            first, length = data[at], data[at + 1] & 0x7F
            if not data[at + 1] & 0x80:
                raise Invalid("a client's frames are masked")
            head = 6
            if length == 126:
                head = 8
                length = data[at + 2] << 8 | data[at + 3]
            elif length == 127:
                if end - at < 14:
                    break
                head = 14
                length = int.from_bytes(data[at + 2 : at + 10], "big")
            if length > (MAX_FRAME if self.peer else PROOF_LIMIT):
                raise Invalid(f"a frame of {length} bytes; at most {MAX_FRAME} are taken")
            start = at + head
            if end - start < length:
                break
            self._message(first, apply_mask(data[start : start + length], bytes(data[start - 4 : start])))
            at = start + length
        return at

    def _message(self, first: int, payload: bytes) -> None:
        if first == BINARY and payload:
            self.hear(payload)
        elif first == CLOSE:
            self.drop("closed_by_client", gently=True)
        elif first == PING and len(payload) <= 125:
            self._queue(bytes((PONG, len(payload))) + payload, droppable=True)
        elif first != PONG:
            raise Invalid(f"expected one whole binary message, not a frame that begins with {first:#04x}")

    def hear(self, payload: bytes) -> None:
        """One frame of the relay's protocol."""
        kind = payload[0]
        if not self.peer:
            self._prove(payload)
        elif kind in (Kind.SEND, Kind.SEND_BATCH):
            if len(payload) < SHORTEST[kind]:
                raise Invalid(f"a datagram of {len(payload)} bytes has no address or no content")
            self.received_bytes += len(payload)
            if self.live:
                self._hub.forward(self, payload)
        elif kind == Kind.PING and len(payload) == 9:
            self._queue(ws_header(9) + bytes((Kind.PONG,)) + payload[1:], droppable=True)
        elif kind == Kind.PONG and len(payload) == 9:
            self._pinged = False
        else:
            raise Invalid(f"a client does not send {len(payload)} bytes of kind {kind}")

    def _prove(self, payload: bytes) -> None:
        peer = verify_proof(payload, self._challenge)
        if problem := self._hub.proven(self, peer):
            raise Invalid(problem)
        self.peer = peer
        self._from = {kind: bytes((delivered,)) + peer for kind, delivered in DELIVERED.items()}
        if self._deadline is not None:
            self._deadline.cancel()

    def _slow_down(self, wait_s: float) -> None:
        self._transport.pause_reading()
        self._resuming = self._loop.call_later(wait_s, self._read_on)
        if self.peer and not self._told_limited:
            self._told_limited = True
            self.tell(Status.LIMITED)

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # --- writing ----------------------------------------------------------------------------------------------------

    def datagram(self, payload: bytes) -> tuple[bytes, memoryview]:
        """What a receiver gets for a frame of this client: header, kind and its key; then ECN byte and content."""
        return ws_header(len(payload)) + self._from[payload[0]], memoryview(payload)[1 + PEER_BYTES :]

    def deliver(self, head: bytes, body: bytes | memoryview) -> None:
        """Queue one frame of datagrams, or drop it when this client does not keep up."""
        size = len(head) + len(body)
        if self._out_bytes + size > self._hub.limits.queue_bytes:
            self.dropped_bytes += size
            return
        self._out.append(head)
        self._out.append(body)
        self._out_bytes += size
        if self._flushing is None and not self._full:
            self._flushing = self._loop.call_soon(self._flush)

    def tell(self, status: Status) -> None:
        self._control(status_frame(status, self.version))

    def confirm(self) -> None:
        self._control(bytes((Kind.CONFIRMED,)))

    def gone(self, peer: bytes) -> None:
        """Another key, which had sent datagrams here, is not connected any more."""
        self._queue(ws_header(1 + PEER_BYTES) + bytes((Kind.GONE,)) + peer, droppable=True)

    def look(self, now: float) -> None:
        """Called every few seconds: ask a silent client whether it is there, and drop one that never answers."""
        silence = now - self._heard_at
        if silence > SILENT_S:
            self.drop("silent")
        elif silence > PING_AFTER_S and not self._pinged:
            self._pinged = True
            self._control(bytes((Kind.PING,)) + os.urandom(8))

    def refuse(self, reason: str) -> None:
        """End for something that this client did."""
        log.debug("relay_client_refused", host=self.host, peer_id=self.peer.hex(), reason=reason)
        if self._door is None and not self.peer:
            self._control(denial_frame(reason))
            self._flush()
        self.drop("refused", gently=True)

    def farewell(self, frame: bytes) -> None:
        """The relay itself goes away (RFC 6455: 1001)."""
        self._control(frame)
        self._queue(bytes((CLOSE, 2)) + (1001).to_bytes(2, "big"))
        while self._out and not self._full:
            self._flush()
        self.drop("relay_closed", gently=True)

    def drop(self, reason: str, *, gently: bool = False) -> None:
        """End the connection; `gently` lets what is written already go out first, for as long as a ping may take."""
        self.reason = self.reason or reason
        if gently and not self._transport.is_closing():
            self._transport.close()
            self._deadline = self._loop.call_later(self._hub.limits.proof_timeout_s, self._transport.abort)
        elif not gently:
            self._transport.abort()

    def _control(self, payload: bytes) -> None:
        self._queue(ws_header(len(payload)) + payload)

    def _queue(self, frame: bytes, *, droppable: bool = False) -> None:
        """A frame beside the datagrams; one that is not droppable ends a client who lets too many of them pile up."""
        over = self._out_bytes + len(frame) - self._hub.limits.queue_bytes
        if over > 0 and droppable:
            return
        if over > CONTROL_LIMIT:
            self.drop("reads_nothing")
            return
        self._out.append(frame)
        self._out_bytes += len(frame)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None and not self._full and self._out:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Everything that waits, in one write; in pieces of a moment's worth when the rate is limited."""
        self._flushing = None
        if self._transport.is_closing():
            self._out.clear()
        if self._full or not self._out:
            return
        data = self._take()
        self.sent_bytes += len(data)
        wait_s = self._tx.spend(len(data), self._loop.time())
        self._transport.write(data)
        if wait_s > 0 or self._out:  # whatever comes next waits its turn
            self._flushing = self._loop.call_later(wait_s, self._flush)

    def _take(self) -> bytes:
        if self._tx.rate == math.inf:
            data = b"".join(self._out)
            self._out.clear()
        else:
            pieces: list[bytes | memoryview] = []
            size = 0
            while self._out and size < WRITE_PIECE:
                pieces.append(self._out.popleft())
                size += len(pieces[-1])
            data = b"".join(pieces)
        self._out_bytes -= len(data)
        return data


def _tune(sock: socket.socket | None, rate: float) -> None:
    """Keep the kernel's queues short, both ways: what waits there delays every small frame behind it."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if sock is None:
        return
    with contextlib.suppress(OSError):  # an optimisation; some systems do not know it
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, UNSENT_BYTES)
        if rate < math.inf:  # a client that is over its rate waits in its own queue, not in ours
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, max(MIN_UNREAD_BYTES, int(rate * UNREAD_S)))
