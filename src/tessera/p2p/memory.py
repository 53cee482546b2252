"""`Transport` inside one process: for tests and simulations, with delay, rate, loss and faults.

The streams, the hello, the caps and the errors are the very code that runs on a real engine; only the bytes travel
differently. Under `run_virtual` a week of traffic costs what its events cost: a link that is idle costs nothing, since
its silence is noticed when a fault is made, not by polling.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import anyio

from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.background import Background, background
from tessera.p2p.framing import FramedStream, open_in_time
from tessera.p2p.memory_link import MemoryLink
from tessera.p2p.memory_wire import MemoryChannel, Uplink, Wire
from tessera.p2p.pacer import Pacer
from tessera.p2p.presence import PresenceBoard
from tessera.p2p.switchboard import Switchboard, hello
from tessera.p2p.transport import RECORD_TTL_S, Handler, PeerRecord, Presence, Stream
from tessera.p2p.virtual import VirtualClock, run_virtual

__all__ = ["MemoryNetwork", "MemoryTransport", "VirtualClock", "run_virtual"]

SCHEME = "memory"
DIAL_S = 5.0
FLUSH_S = 0.4


class MemoryNetwork:
    """Where memory transports meet.

    Args:
        rng: decides losses and corruption; seed it.
        delay_s: one way, between any two peers, until `shape` says otherwise.
        rate_bytes_per_s: of each direction between two peers; None is unlimited.
        loss: chance that a packet arrives late.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        delay_s: float = 0.0,
        rate_bytes_per_s: float | None = None,
        loss: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self._rng = rng
        self._defaults = (delay_s, rate_bytes_per_s, loss)
        self._wires: dict[tuple[PeerId, PeerId], Wire] = {}
        self._uplinks: dict[PeerId, Uplink] = {}
        self._slow: dict[PeerId, float | None] = {}
        self._listeners: dict[str, MemoryTransport] = {}
        self._ports = 0

    @asynccontextmanager
    async def start(self, key: PeerKey, *, pacer: Pacer | None = None) -> AsyncIterator[MemoryTransport]:
        """A transport at a new address, until the body ends. With `pacer`, what it sends keeps to that."""
        async with background() as tasks:
            self._ports += 1
            transport = MemoryTransport(self, key, f"node:{self._ports}", tasks, pacer)
            self._listeners[transport.address] = transport
            try:
                yield transport
            finally:
                with anyio.CancelScope(shield=True):
                    await transport.close()

    # --- faults -----------------------------------------------------------------------------------------------------

    def shape(
        self, a: PeerId, b: PeerId, *, delay_s: float = 0.0, rate_bytes_per_s: float | None = None, loss: float = 0.0
    ) -> None:
        """Other figures for the wires between two peers, from now on."""
        for wire in (self.wire(a, b), self.wire(b, a)):
            wire.delay_s, wire.rate_bytes_per_s, wire.loss = delay_s, rate_bytes_per_s, loss

    def uplink(self, peer: PeerId, rate_bytes_per_s: float | None) -> None:
        """From now on all that `peer` sends, to whomever, shares this rate; None is unlimited."""
        self._uplinks.setdefault(peer, Uplink()).rate_bytes_per_s = rate_bytes_per_s

    def partition(self, a: PeerId, b: PeerId) -> None:
        """Nothing arrives between them, until `heal`. After 3 s they take each other for gone."""
        for wire in (self.wire(a, b), self.wire(b, a)):
            wire.cut = True
        self._doubt(a, b)

    def heal(self, a: PeerId, b: PeerId) -> None:
        for wire in (self.wire(a, b), self.wire(b, a)):
            wire.cut = False
            wire.wake()

    def kill(self, peer: PeerId) -> None:
        """The peer's process dies without a word; the others notice after 3 s."""
        for address, transport in list(self._listeners.items()):
            if transport.id == peer:
                del self._listeners[address]
                transport.die()

    def corrupt(self, a: PeerId, b: PeerId, chance: float) -> None:
        """From now on `a` sends rubbish to `b`: each packet has a byte changed with this chance."""
        self.wire(a, b).corrupt = chance

    def slow(self, peer: PeerId, rate_bytes_per_s: float | None) -> None:
        """From now on `peer` reads each stream no faster than this."""
        self._slow[peer] = rate_bytes_per_s
        for (_, to), wire in self._wires.items():
            if to == peer:
                wire.read_bytes_per_s = rate_bytes_per_s

    # --- for the transports -----------------------------------------------------------------------------------------

    def wire(self, a: PeerId, b: PeerId) -> Wire:
        """The wire from `a` to `b`."""
        wire = self._wires.get((a, b))
        if wire is None:
            delay_s, rate, loss = self._defaults
            uplink = self._uplinks.setdefault(a, Uplink())
            wire = Wire(self._rng, uplink, delay_s, rate, loss, read_bytes_per_s=self._slow.get(b))
            self._wires[a, b] = wire
        return wire

    def find(self, caller: PeerId, peer: PeerRecord) -> MemoryTransport | None:
        """Who answers as `peer` at one of its addresses, if `caller` can reach it."""
        for address in peer.rests(SCHEME):
            transport = self._listeners.get(address)
            if transport is not None and transport.id == peer.id and self.reachable(caller, peer.id):
                return transport
        return None

    def reachable(self, a: PeerId, b: PeerId) -> bool:
        return not (self.wire(a, b).cut or self.wire(b, a).cut)

    def forget(self, transport: MemoryTransport) -> None:
        self._listeners.pop(transport.address, None)

    def _doubt(self, a: PeerId, b: PeerId) -> None:
        for transport in list(self._listeners.values()):
            if transport.id in (a, b):
                transport.doubt(b if transport.id == a else a)


class MemoryTransport:
    """Made by `async with network.start(key) as transport`."""

    def __init__(
        self, network: MemoryNetwork, key: PeerKey, address: str, tasks: Background, pacer: Pacer | None = None
    ) -> None:
        self.address = address
        self._network, self._key, self._tasks, self._pacer = network, key, tasks, pacer
        self._switchboard = Switchboard(pacer)
        self._presence = PresenceBoard()
        self._links: dict[PeerId, MemoryLink] = {}
        self._dialling: dict[PeerId, anyio.Event] = {}
        self._meters: dict[PeerId, Callable[[], None]] = {}  # what ends them
        self._open = True

    @property
    def id(self) -> PeerId:
        return self._key.id

    @property
    def alive(self) -> bool:
        return self._open

    def record(self) -> PeerRecord:
        until = self._network.clock.time() + RECORD_TTL_S
        return PeerRecord.sign(self._key, (f"{SCHEME}:{self.address}",), expires=until)

    def serve(self, protocol: str, handler: Handler, *, max_streams: int = 64) -> None:
        self._switchboard.serve(protocol, handler, max_streams=max_streams)

    async def open(
        self, peer: PeerRecord, protocol: str, *, timeout_s: float, bulk: bool = False, confirm: bool = True
    ) -> Stream:
        self._check_target(peer)
        greeting = hello(protocol, bulk=bulk, confirm=confirm)

        async def new_stream() -> FramedStream:
            link = await self._link_to(peer)
            channel = await link.channel(self)
            stream = FramedStream(channel, peer.id, consented=False, pacer=self._pacer, bulk=bulk)
            stream.cork(greeting)
            return stream

        return await open_in_time(new_stream, peer.id, protocol, timeout_s=timeout_s, confirm=confirm)

    async def watch(self, peer: PeerId) -> AsyncIterator[Presence]:
        async with aclosing(self._presence.watch(peer)) as states:
            async for state in states:
                yield state

    async def close(self) -> None:
        if self._open:
            self._open = False
            self._network.forget(self)
            links = list(self._links.values())
            with anyio.move_on_after(FLUSH_S):
                for link in links:
                    await link.flush(self)
            for link in links:
                link.end(f"{self.id[:16]}… closed the link", spare_finished=True)
            for end_meter in self._meters.values():
                end_meter()
        await self._tasks.close()

    # --- for the network --------------------------------------------------------------------------------------------

    def die(self) -> None:
        """End without telling anybody."""
        self._open = False
        links, self._links = self._links, {}
        for link in links.values():
            link.lose(self)
        self._tasks.cancel()

    def doubt(self, peer: PeerId) -> None:
        """Nothing comes from `peer` any more: give it 3 s."""
        link = self._links.get(peer)
        if link is not None:
            self._tasks.start_soon(link.await_sign, self)

    def adopt(self, peer: PeerId, link: MemoryLink) -> None:
        old = self._links.get(peer)
        self._links[peer] = link
        if old is not None:
            old.end("the peer came back on another link")
        self._presence.set(peer, "up")
        if self._pacer is not None and peer not in self._meters:
            wire = self._network.wire(self.id, peer)
            self._meters[peer] = self._pacer.add_meter(peer, lambda: wire.delivered_bytes)

    def dismiss(self, peer: PeerId, link: MemoryLink) -> None:
        if self._links.get(peer) is link:
            del self._links[peer]
            self._presence.set(peer, "down")

    def welcome(self, channel: MemoryChannel, peer: PeerId) -> None:
        self._tasks.start_soon(self._answer, channel, peer)

    async def _answer(self, channel: MemoryChannel, peer: PeerId) -> None:
        await channel.readable()  # a stream exists for its receiver once its first bytes have arrived
        await self._switchboard.answer(channel, peer)

    # --- dialling ---------------------------------------------------------------------------------------------------

    def _check_target(self, peer: PeerRecord) -> None:
        if not self._open:
            raise Unavailable("this transport is closed")
        if peer.id == self.id:
            raise Invalid("a peer does not dial itself")
        if not peer.rests(SCHEME) and peer.id not in self._links:
            raise Invalid(f"the record of {peer.id[:16]}… has no {SCHEME}: address, only {list(peer.addrs)}")

    async def _link_to(self, peer: PeerRecord) -> MemoryLink:
        while (other := self._dialling.get(peer.id)) is not None:
            await other.wait()
        link = self._links.get(peer.id)
        moved = link is not None and (there := self._network.find(self.id, peer)) is not None and there not in link.ends
        if link is not None and not moved:
            return link
        over = self._dialling[peer.id] = anyio.Event()
        try:
            return await self._dial(peer)
        finally:
            del self._dialling[peer.id]
            over.set()

    async def _dial(self, peer: PeerRecord) -> MemoryLink:
        wire = self._network.wire(self.id, peer.id)
        with anyio.move_on_after(DIAL_S):
            await anyio.sleep(2 * wire.delay_s)
            other = self._network.find(self.id, peer)
            if other is not None:
                link = self._links.get(peer.id)  # it may have dialled us in the meantime
                return link if link is not None and other in link.ends else MemoryLink(self._network, self, other)
            await anyio.sleep_forever()
        raise Unavailable(f"{peer.id[:16]}… does not answer at {', '.join(peer.addrs)}", peer=peer.id)
