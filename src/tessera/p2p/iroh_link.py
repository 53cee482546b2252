"""One QUIC connection to a peer, and its streams.

A link proves itself alive by what arrives on it. Once a second we send a datagram that QUIC must acknowledge; after
3 s without any packet the link is closed and everything that waits on it raises Unavailable (QUIC's own timeout
is 30 s). The acknowledgement comes from the engine's threads, so a peer whose Python is busy is not taken for dead; and
a pause of our own counts as one look, not as the peer's silence.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import iroh.iroh_ffi as iroh
import structlog

import tessera.p2p.iroh_fast  # noqa: F401 - must come before anything is sent
from tessera.core.errors import Unavailable
from tessera.core.ids import PeerId, parse_peer_id
from tessera.p2p.framing import PIECE, READ_AHEAD, FramedStream
from tessera.p2p.iroh_meter import IrohMeter
from tessera.p2p.pacer import Pacer
from tessera.p2p.switchboard import hello

__all__ = ["IrohChannel", "IrohLink", "iroh_reason"]

log = structlog.get_logger()

BEAT_S = 1.0
LOOK_S = 0.5
SILENT_LOOKS = 6  # × LOOK_S = 3 s
BULK_PRIORITY = -10
REMEMBERED = 32  # finished streams whose last bytes may be on their way; one that was stopped keeps its place till then


def iroh_reason(error: BaseException) -> str:
    """An `IrohError` prints empty; this is what it says, without the engine's build paths."""
    if not isinstance(error, iroh.IrohError):
        return str(error)
    return str(error.message()).split(" (/")[0][:200]


class IrohChannel:
    """A `Channel` on one QUIC stream. A read goes on in a task of its own, so that cancelling it loses no bytes.

    Args:
        finished: told of our sending half once it is complete.
        reads: the link's reads under way; the link cancels what is left when it ends.
    """

    def __init__(
        self, stream: Any, peer: PeerId, finished: Callable[[Any], None], reads: set[asyncio.Task[bytes]]
    ) -> None:
        self._send, self._recv = stream.send(), stream.recv()
        self._peer, self._finished, self._reads = peer, finished, reads
        self._reading: asyncio.Task[bytes] | None = None
        self._writing: anyio.CancelScope | None = None
        self._stopped = self._reset = False

    async def read(self, want: int) -> bytes:
        if self._stopped:
            raise self._gone("the stream was stopped")
        if self._reading is None:
            self._reading = self._start_read(want)
        task = self._reading
        await asyncio.wait((task,))
        self._reading = None
        if task.cancelled():
            raise self._gone("the stream was stopped, or its link ended")
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, iroh.IrohError):
            reason = iroh_reason(error)
            if reason.startswith("FinishedEarly"):
                return b""
            raise self._gone(reason) from error
        raise error

    def _start_read(self, want: int) -> asyncio.Task[bytes]:
        large = want > READ_AHEAD  # exactly that many then: the engine fills it without coming back to Python
        read = self._recv.read_exact(min(want, PIECE)) if large else self._recv.read(READ_AHEAD)
        task = asyncio.create_task(read)
        self._reads.add(task)
        task.add_done_callback(self._read_done)
        return task

    def _read_done(self, task: asyncio.Task[bytes]) -> None:
        self._reads.discard(task)
        if not task.cancelled():
            task.exception()  # seen: a stream that nobody reads any more may fail in silence

    async def write(self, data: bytes) -> None:
        await self._guarded(lambda: self._send.write_all(data))

    async def finish(self) -> None:
        await self._guarded(self._send.finish)
        self._finished(self._send)

    async def give_way(self) -> None:
        await self._quietly(lambda: self._send.set_priority(BULK_PRIORITY))

    async def reset(self, code: int) -> None:
        if self._reset:
            return
        self._reset = True
        if self._writing is not None:
            self._writing.cancel()  # it holds the engine's lock on the stream
        await self._quietly(lambda: self._send.reset(code))

    def release(self) -> None:
        """Dropping a receiving half before its end has come asks the peer to stop. When that arrives between the peer's
        last write and its finish, the peer's half stays open, and the link has one place for a stream less. So take
        the end in, beside everything else.
        """
        if not self._stopped and self._reading is None:
            self._start_read(1)

    async def stop(self, code: int) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._reading is not None:
            self._reading.cancel()  # it holds the engine's lock on the stream
            await asyncio.wait((self._reading,))
        await self._quietly(lambda: self._recv.stop(code))

    async def _guarded(self, action: Callable[[], Awaitable[Any]]) -> None:
        if self._reset:
            raise self._gone("the stream was reset")
        try:
            with anyio.CancelScope() as self._writing:
                await action()
        except iroh.IrohError as error:
            raise self._gone(iroh_reason(error)) from error
        finally:
            scope, self._writing = self._writing, None
        if scope.cancelled_caught:
            raise self._gone("the stream was aborted")

    async def _quietly(self, action: Callable[[], Awaitable[Any]]) -> None:
        try:
            await action()
        except iroh.IrohError as error:  # it is over already, which is what we want
            log.debug("stream_was_over", peer_id=self._peer, reason=iroh_reason(error))

    def _gone(self, reason: str) -> Unavailable:
        return Unavailable(f"the stream to {self._peer[:16]}… is gone: {reason}", peer=self._peer, reason=reason)


class IrohLink:
    """An established connection. `run` keeps it alive and hands on what the peer opens, until it is over.

    Args:
        dialled: by us, else by the peer.
        sockets, expires: the direct addresses of the record that was dialled, and when it ends.
        pacer: the node's; it hears what the peer acknowledged.
    """

    def __init__(
        self,
        connection: Any,
        *,
        dialled: bool = False,
        sockets: tuple[str, ...] = (),
        expires: int = 0,
        pacer: Pacer | None = None,
    ) -> None:
        self._connection, self._pacer = connection, pacer
        self.peer = parse_peer_id(str(connection.remote_id()))
        self.dialled, self.sockets, self.expires = dialled, sockets, expires
        self.alive = True
        self._finished: deque[Any] = deque(maxlen=REMEMBERED)
        self._reads: set[asyncio.Task[bytes]] = set()

    async def open(self, protocol: str, *, bulk: bool, confirm: bool) -> FramedStream:
        """A stream whose hello goes out first. Waits while the peer allows no more streams on this link."""
        greeting = hello(protocol, bulk=bulk, confirm=confirm)
        try:
            bi = await self._connection.open_bi()
        except iroh.IrohError as error:
            raise Unavailable(f"the link to {self.peer[:16]}… is gone: {iroh_reason(error)}", peer=self.peer) from error
        channel = IrohChannel(bi, self.peer, self._finished.append, self._reads)
        stream = FramedStream(channel, self.peer, consented=False, pacer=self._pacer)
        if bulk:
            await stream.give_way()
        stream.cork(greeting)
        return stream

    async def run(self, on_stream: Callable[[IrohChannel, PeerId], None]) -> str:
        """Returns why the link ended."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._beat)
                if self._pacer is not None:
                    tasks.start_soon(self._measure, self._pacer)
                reason = await self._accept(on_stream)
                tasks.cancel_scope.cancel()
            return reason
        finally:
            self.close("over")
            for task in list(self._reads):
                task.cancel()

    async def flush(self) -> None:
        """Wait until the peer has the last bytes of every finished stream; a link that dies ends the wait."""
        while self.alive and self._finished:
            send = self._finished.popleft()
            try:
                await send.stopped()
            except iroh.IrohError:
                return

    def close(self, reason: str) -> None:
        if self.alive:
            self.alive = False
            self._connection.close(0, reason.encode()[:100])

    async def _measure(self, pacer: Pacer) -> None:
        meter = IrohMeter(self._connection)
        end = pacer.add_meter(self.peer, meter)
        try:
            await meter.run()
        finally:
            end()

    async def _accept(self, on_stream: Callable[[IrohChannel, PeerId], None]) -> str:
        while True:
            try:
                bi = await self._connection.accept_bi()
            except iroh.IrohError as error:
                return iroh_reason(error)
            on_stream(IrohChannel(bi, self.peer, self._finished.append, self._reads), self.peer)

    async def _beat(self) -> None:
        heard, silent, next_beat = -1, 0, 0.0
        while silent < SILENT_LOOKS:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + BEAT_S
                self._send_beat()
            await anyio.sleep(LOOK_S)
            before, heard = heard, self._connection.stats().udp_rx_datagrams
            silent = silent + 1 if heard == before else 0
        log.info("peer_silent", peer_id=self.peer, seconds=SILENT_LOOKS * LOOK_S)
        self.close("silent")

    def _send_beat(self) -> None:
        try:
            self._connection.send_datagram(b"\0")
        except iroh.IrohError as error:  # the accept loop hears of a closed link
            log.debug("beat_not_sent", peer_id=self.peer, reason=iroh_reason(error))
