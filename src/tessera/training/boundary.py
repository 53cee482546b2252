"""A worker's links over its two boundaries: to whoever of the stage below takes its codes, from whoever sends it codes.

The upper worker opens a link when he first has something for the lower one, and keeps it; both directions use it.
Frames wait for their link in a queue with a bound, so that computing never waits for a slow neighbour. A link that
breaks is told once, and whatever waited in it is gone: the lead has it sent again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NoReturn

import anyio
import anyio.abc
import structlog

from tessera.core import encoding
from tessera.core.errors import Conflict, Late, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId, RunId
from tessera.p2p.transport import PeerRecord, Stream, Transport
from tessera.training.both_ways import both_ways
from tessera.training.frames import Frame, Kind
from tessera.training.mailbox import Mailbox
from tessera.training.protocols import CALL_S, PIPELINE, SMALL

__all__ = ["Boundary"]

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Link:
    peer: PeerId
    below: bool  # the peer is of the stage after ours
    outbox: Mailbox[bytes]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    stream: Stream | None = None


class Boundary:
    """All links of one worker.

    Args:
        record: of a worker of the stage below, to dial; None for one who has no seat there.
        above: whether a peer has a seat in the stage before ours.
        deliver: told of every frame; must be quick. Raises `Misbehaviour` for one that no honest peer sends.
        broken: told when a link is gone, and why.
        queue: frames that may wait for one link.
        frame_limit: bytes of a frame.
        wait_s: how long a neighbour may take for one frame.
    """

    def __init__(
        self,
        transport: Transport,
        run_id: RunId,
        *,
        record: Callable[[PeerId], PeerRecord | None],
        above: Callable[[PeerId], bool],
        deliver: Callable[[PeerId, Frame], None],
        broken: Callable[[PeerId, TesseraError], Awaitable[None]],
        queue: int,
        frame_limit: int,
        wait_s: float,
    ) -> None:
        self._transport, self._run_id = transport, run_id
        self._record, self._above, self._deliver, self._broken = record, above, deliver, broken
        self._queue, self._limit, self._wait_s = queue, frame_limit, wait_s
        self._links: dict[tuple[bool, PeerId], _Link] = {}
        self._past_bytes = 0
        self.frames_below = 0  # that carry a microbatch or a window, both ways

    @property
    def bytes_below(self) -> int:
        """Bytes that crossed the boundary below, both ways, all headers and receipts included."""
        present = (link.stream for (below, _), link in self._links.items() if below)
        return self._past_bytes + sum(s.sent_bytes + s.received_bytes for s in present if s is not None)

    async def run(self) -> None:
        """Serve and dial until cancelled."""
        async with anyio.create_task_group() as self._tasks:
            self._transport.serve(PIPELINE, self._accept)
            await anyio.sleep_forever()

    def send_down(self, peer: PeerId, frame: Frame) -> None:
        """Queue a frame for a worker of the stage below; its link is opened when there is none. Never raises."""
        link = self._links.get((True, peer))
        if link is None:
            link = self._links[True, peer] = _Link(peer, True, Mailbox(self._queue))
            self._tasks.start_soon(self._dial, link)
        self._put(link, frame)

    def send_up(self, peer: PeerId, frame: Frame) -> None:
        """Queue a frame for a worker of the stage above. Without a link it is dropped: he will ask again."""
        link = self._links.get((False, peer))
        if link is not None:
            self._put(link, frame)

    def drop(self, peer: PeerId) -> None:
        """Cut all links to `peer`."""
        for below in (True, False):
            link = self._links.get((below, peer))
            if link is not None:
                link.scope.cancel()

    # --- one link ---------------------------------------------------------------------------------------------------

    def _put(self, link: _Link, frame: Frame) -> None:
        if not link.outbox.put(frame.to_bytes()):
            log.warning("neighbour_too_slow", peer_id=link.peer, frames=self._queue)
            link.scope.cancel()

    async def _dial(self, link: _Link) -> None:
        async def opened() -> Stream:
            record = self._record(link.peer)
            if record is None:
                raise Unavailable(f"{link.peer[:16]}… has no seat in the stage below")
            stream = await self._transport.open(record, PIPELINE, timeout_s=CALL_S)
            link.stream = stream
            await stream.send(encoding.encode({"run_id": self._run_id}))
            return stream

        await self._live(link, opened)

    async def _accept(self, stream: Stream) -> None:
        """The link from a worker of the stage above. A new one takes an old one's place: he may have come back."""
        if not self._above(stream.peer):
            raise Refused("only workers of the stage above may open this link", rule="neighbour")
        with anyio.move_on_after(CALL_S) as scope:
            hello = encoding.decode(await stream.recv(SMALL), SMALL)
        if scope.cancelled_caught:
            raise Late(f"the stage above did not name its run within {CALL_S:.0f} s")
        if hello != {"run_id": self._run_id}:
            raise Conflict("this worker is in another run")
        before = self._links.pop((False, stream.peer), None)
        if before is not None:
            before.scope.cancel()
        link = self._links[False, stream.peer] = _Link(stream.peer, False, Mailbox(self._queue), stream=stream)

        async def here() -> Stream:
            return stream

        await self._live(link, here)

    async def _live(self, link: _Link, opened: Callable[[], Awaitable[Stream]]) -> None:
        failure: TesseraError = Unavailable(f"the link to {link.peer[:16]}… was cut")
        try:
            with link.scope:
                failure = await self._pump(link, opened)
        finally:
            if self._links.get((link.below, link.peer)) is link:
                del self._links[link.below, link.peer]
            if link.stream is not None:
                if link.below:
                    self._past_bytes += link.stream.sent_bytes + link.stream.received_bytes
                with anyio.CancelScope(shield=True):
                    await link.stream.abort()
        await self._broken(link.peer, failure)

    async def _pump(self, link: _Link, opened: Callable[[], Awaitable[Stream]]) -> TesseraError:
        """Move frames until the link fails; why it did."""
        try:
            stream = await opened()
        except TesseraError as error:
            return error
        return await both_ways(lambda: self._read(link, stream), lambda: self._write(link, stream))

    async def _read(self, link: _Link, stream: Stream) -> NoReturn:
        while data := await stream.recv(self._limit):
            frame = Frame.parse(data)
            if (frame.kind in (Kind.FORWARD, Kind.EVALUATE)) is link.below and frame.kind is not Kind.RECEIPT:
                raise Misbehaviour(f"{link.peer[:16]}… sent a {frame.kind.name} against the stream")
            if link.below and frame.kind is Kind.GRADIENT:
                self.frames_below += 1
            self._deliver(link.peer, frame)
        raise Unavailable(f"{link.peer[:16]}… closed the link")

    async def _write(self, link: _Link, stream: Stream) -> NoReturn:
        while True:
            data = await link.outbox.get()
            with anyio.move_on_after(self._wait_s) as scope:
                await stream.send(data)
            if scope.cancelled_caught:
                raise Late(f"{link.peer[:16]}… did not take a frame for {self._wait_s:.0f} s")
            if link.below and data[:1] != Kind.RECEIPT.value:
                self.frames_below += 1
