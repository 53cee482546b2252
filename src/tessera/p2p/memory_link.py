"""What stands between two memory transports, until one of them ends it or falls silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio

from tessera.core.errors import Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.memory_wire import MemoryChannel, Pipe, Wire

__all__ = ["End", "MemoryLink", "Wires"]

LOOK_S = 0.5
SILENT_LOOKS = 6  # × LOOK_S = 3 s
STREAMS_PER_END = 100  # that one side may have open, as in QUIC
FLUSH_POLL_S = 0.01


class End(Protocol):
    """A transport, seen from its link."""

    @property
    def id(self) -> PeerId: ...
    @property
    def alive(self) -> bool: ...
    def adopt(self, peer: PeerId, link: MemoryLink) -> None: ...
    def dismiss(self, peer: PeerId, link: MemoryLink) -> None: ...
    def welcome(self, channel: MemoryChannel, peer: PeerId) -> None: ...
    def doubt(self, peer: PeerId) -> None: ...


class Wires(Protocol):
    """The network, seen from a link."""

    def wire(self, a: PeerId, b: PeerId) -> Wire: ...
    def reachable(self, a: PeerId, b: PeerId) -> bool: ...


class MemoryLink:
    """Made by whoever dials; both ends adopt it at once."""

    def __init__(self, network: Wires, dialler: End, other: End) -> None:
        self._network = network
        self.ends = (dialler, other)
        self._sent: dict[PeerId, set[Pipe]] = {end.id: set() for end in self.ends}  # by who writes
        self._places = {end.id: anyio.CapacityLimiter(STREAMS_PER_END) for end in self.ends}
        self._over = False
        dialler.adopt(other.id, self)
        other.adopt(dialler.id, self)

    async def channel(self, opener: End) -> MemoryChannel:
        """A new stream. Waits while `opener` has too many open."""
        place, other, limiter = object(), self._other(opener), self._places[opener.id]
        try:
            limiter.acquire_on_behalf_of_nowait(place)
        except anyio.WouldBlock:
            await limiter.acquire_on_behalf_of(place)
        if self._over:
            limiter.release_on_behalf_of(place)
            raise Unavailable(f"the link to {other.id[:16]}… is gone", peer=other.id)
        open_pipes = 2

        def one_done() -> None:
            nonlocal open_pipes
            open_pipes -= 1
            if not open_pipes:
                limiter.release_on_behalf_of(place)

        out, back = self._pipe(opener, other, one_done), self._pipe(other, opener, one_done)
        other.welcome(MemoryChannel(back, out, lambda: other.alive), opener.id)
        return MemoryChannel(out, back, lambda: opener.alive)

    async def flush(self, end: End) -> None:
        """Wait until what `end` has finished is read."""
        while any(not pipe.delivered for pipe in self._sent[end.id]):
            await anyio.sleep(FLUSH_POLL_S)

    def end(self, reason: str, *, spare_finished: bool = False) -> None:
        """Both ends lose it now; streams that are finished but not read yet may be spared."""
        if self._over:
            return
        self._over = True
        for pipes in self._sent.values():
            for pipe in list(pipes):
                pipe.fail(reason, spare_finished=spare_finished)
        a, b = self.ends
        a.dismiss(b.id, self)
        b.dismiss(a.id, self)

    def lose(self, dead: End) -> None:
        """`dead` is no more. The other end is not told, it has to notice."""
        other = self._other(dead)
        for pipe in list(self._sent[dead.id]):
            pipe.abandon_writer("this process is dead")
        for pipe in list(self._sent[other.id]):
            pipe.abandon_reader("this process is dead")
        other.doubt(dead.id)

    async def await_sign(self, end: End) -> None:
        """`end` hears nothing: the link ends unless that changes within 3 s."""
        other = self._other(end)
        for _ in range(SILENT_LOOKS):
            await anyio.sleep(LOOK_S)
            if self._over or (other.alive and self._network.reachable(end.id, other.id)):
                return
        self.end(f"{other.id[:16]}… is silent")

    def _other(self, end: End) -> End:
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def _pipe(self, writer: End, reader: End, on_done: Callable[[], None]) -> Pipe:
        pipes = self._sent[writer.id]
        wire = self._network.wire(writer.id, reader.id)

        def done() -> None:
            pipes.discard(pipe)
            on_done()

        pipe = Pipe(wire, done)
        pipes.add(pipe)
        return pipe
