"""One zmq connection to a peer, and the streams on it.

A zmq connection is a queue of messages; this makes of it what QUIC offers: many ordered byte streams, places for so
many, and a goodbye that waits for what was said before. The same rules hold for both ends, whichever dialled. A peer
that breaks them loses the link.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import anyio
import structlog

from tessera.core.errors import Misbehaviour, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.framing import FramedStream
from tessera.p2p.pacer import Pacer
from tessera.p2p.switchboard import hello
from tessera.p2p.transport import PeerRecord
from tessera.p2p.zmq_channel import ZmqChannel
from tessera.p2p.zmq_wire import Kind, pack, unpack

__all__ = ["STREAMS_PER_END", "Outlet", "ZmqLink"]

log = structlog.get_logger()

STREAMS_PER_END = 100  # that one side may have open, as in QUIC
OUTBOX = 4096  # messages that wait for the engine's full queue
RETRY_S = 0.01
STUCK_S = 10.0  # a peer that takes nothing at all for so long is cut off
BEAT_S = 0.5


class Outlet(Protocol):
    """A connection, for whoever sends on it."""

    def send(self, message: bytes) -> bool:
        """False when its queue is full. Raises `Unavailable` when it is gone."""
        ...

    def cut(self) -> None:
        """End it now. Never raises."""
        ...


class ZmqLink:
    """An established connection. `run` watches it until it is over.

    Args:
        on_stream: gets each stream that the peer opens.
        dialled: the record that led there; None for a link that the peer opened.
        pacer: the node's.
    """

    def __init__(
        self,
        peer: PeerId,
        outlet: Outlet,
        on_stream: Callable[[ZmqChannel, PeerId], None],
        *,
        dialled: PeerRecord | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self.peer, self.dialled = peer, dialled
        self.acknowledged_bytes = 0
        self._outlet, self._on_stream, self._pacer = outlet, on_stream, pacer
        self._ours, self._theirs = (1, 0) if dialled is not None else (0, 1)  # the last bit of stream numbers
        self._next, self._heard = 2 + self._ours, 0
        self._channels: dict[int, ZmqChannel] = {}
        self._their_streams = 0
        self._places = anyio.CapacityLimiter(STREAMS_PER_END)
        self._outbox: deque[bytes] = deque()
        self._thick, self._thin = anyio.Event(), anyio.Event()  # the outbox fills, the outbox is empty again
        self._reason: str | None = None
        self._over, self._bye = anyio.Event(), anyio.Event()
        self._said_bye = False

    @property
    def alive(self) -> bool:
        return self._reason is None

    def is_ours(self, stream: int) -> bool:
        return stream & 1 == self._ours

    # --- streams ----------------------------------------------------------------------------------------------------

    async def open(self, protocol: str, *, bulk: bool, confirm: bool) -> FramedStream:
        """A stream whose hello goes out first. Waits while we have too many open on this link."""
        greeting = hello(protocol, bulk=bulk, confirm=confirm)
        place = object()
        await self._places.acquire_on_behalf_of(place)
        if not self.alive:
            self._places.release_on_behalf_of(place)
            raise Unavailable(f"the link to {self.peer[:16]}… is gone: {self._reason}", peer=self.peer)
        stream, self._next = self._next, self._next + 2

        def done() -> None:
            self._channels.pop(stream, None)
            self._places.release_on_behalf_of(place)

        channel = self._channels[stream] = ZmqChannel(self, stream, done)
        framed = FramedStream(channel, self.peer, consented=False, pacer=self._pacer)
        if bulk:
            await framed.give_way()
        framed.cork(greeting)
        return framed

    def receive(self, message: bytes) -> None:
        """One message of the peer. Never raises; what breaks the rules ends the link."""
        if not self.alive:
            return
        try:
            kind, stream, payload = unpack(message)
            if stream:
                self._receive_on(stream, kind, payload)
            else:
                self._receive_word(kind)
        except Misbehaviour as error:
            log.warning("peer_misbehaved", peer_id=self.peer, fault=error.message)
            self.end(f"misbehaviour: {error.message}")

    def _receive_on(self, stream: int, kind: Kind, payload: memoryview) -> None:
        channel = self._channels.get(stream)
        if channel is None:
            if self.is_ours(stream) and stream < self._next:
                return  # late news of a stream that is over
            if stream <= self._heard:
                return
            channel = self._welcome(stream, kind)
        channel.hear(kind, payload)

    def _welcome(self, stream: int, kind: Kind) -> ZmqChannel:
        if self.is_ours(stream) or kind is not Kind.DATA:
            raise Misbehaviour(f"a {kind.name.lower()} on stream {stream}, which nobody opened")
        if self._their_streams >= STREAMS_PER_END:
            raise Misbehaviour(f"more than {STREAMS_PER_END} streams at once")
        self._heard = stream
        self._their_streams += 1

        def done() -> None:
            self._channels.pop(stream, None)
            self._their_streams -= 1

        channel = self._channels[stream] = ZmqChannel(self, stream, done)
        self._on_stream(channel, self.peer)
        return channel

    def _receive_word(self, kind: Kind) -> None:
        if kind is Kind.BYE:
            self._say_bye()
            self._bye.set()
            self.end("the peer said goodbye")
        elif kind is not Kind.BEAT:
            raise Misbehaviour(f"a {kind.name.lower()} on a link that stands")

    # --- sending ----------------------------------------------------------------------------------------------------

    def post(self, message: bytes) -> None:
        """Send, now or as soon as the engine takes it. Never waits and never raises; a lost link ends itself."""
        if not self.alive:
            return
        if not self._outbox and self._try(message):
            return
        self._outbox.append(message)
        self._thick.set()
        if len(self._outbox) > OUTBOX:
            self.end("the peer does not take what we send")

    @property
    def crowded(self) -> bool:
        return bool(self._outbox)

    async def thinned(self) -> None:
        await self._thin.wait()

    def _try(self, message: bytes) -> bool:
        try:
            return self._outlet.send(message)
        except Unavailable as error:
            self.end(error.message)
            return True

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> str:
        """Returns why the link ended."""
        end_meter = (
            self._pacer.add_meter(self.peer, lambda: self.acknowledged_bytes) if self._pacer is not None else None
        )
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._beat)
                tasks.start_soon(self._offer)
                await self._over.wait()
                tasks.cancel_scope.cancel()
            return self._reason or "over"
        finally:
            if end_meter is not None:
                end_meter()
            self.end("over")

    async def leave(self) -> None:
        """Say goodbye, and wait until the peer has heard all that was said before. Whoever calls sets the deadline."""
        if self.alive:
            self._say_bye()
            await self._bye.wait()

    def end(self, reason: str) -> None:
        """Both directions end now; what has arrived whole may still be read."""
        if self._reason is not None:
            return
        self._reason = reason
        for channel in list(self._channels.values()):
            channel.lose(reason)
        self._outbox.clear()
        self._thin.set()
        self._bye.set()
        self._over.set()
        self._outlet.cut()

    def _say_bye(self) -> None:
        if not self._said_bye:
            self._said_bye = True
            self.post(pack(Kind.BYE))

    async def _beat(self) -> None:
        """Shows that the connection is there at all: sending on one that is gone fails."""
        while self.alive:
            if not self._outbox:
                self.post(pack(Kind.BEAT))
            await anyio.sleep(BEAT_S)

    async def _offer(self) -> None:
        """Offers the engine again what its full queue has not taken."""
        while self.alive:
            await self._thick.wait()
            stuck_at = anyio.current_time() + STUCK_S
            while self._outbox and self.alive:
                if not self._try(self._outbox[0]):
                    if anyio.current_time() >= stuck_at:
                        self.end("the peer does not take what we send")
                    await anyio.sleep(RETRY_S)
                elif self._outbox:  # the link may have ended just now
                    self._outbox.popleft()
                    stuck_at = anyio.current_time() + STUCK_S
            self._thick = anyio.Event()
            self._thin.set()
            self._thin = anyio.Event()
