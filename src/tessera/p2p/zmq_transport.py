"""`Transport` on zmq's CURVE: for peers on one network or in one data centre, where nothing stands between them.

Encrypted and authenticated like iroh, over plain TCP and with less work for each byte; but it dials addresses only, so
a peer behind a router cannot be reached. Links are kept as iroh's are: one for each pair of peers, dialled by whoever
needs it first and used both ways; when both dial at once there may be two, never more. A dead link is dropped and
dialled again by the next `open`, and a newer record with other addresses is dialled at once.

Everybody may connect, unless `admit` names who may. zmq gathers a message of many parts before it shows any of them,
and sets no limit to their number: where strangers can reach the port, admit members only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
import zmq
from anyio import to_thread

from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.background import Background, background
from tessera.p2p.framing import FramedStream, open_in_time
from tessera.p2p.pacer import Pacer
from tessera.p2p.presence import PresenceBoard
from tessera.p2p.switchboard import Switchboard
from tessera.p2p.transport import MAX_ADDRS, RECORD_TTL_S, Handler, PeerRecord, Presence, Stream
from tessera.p2p.zmq_address import is_socket, parse_bind, reachable
from tessera.p2p.zmq_channel import ZmqChannel
from tessera.p2p.zmq_dealer import ZmqDealer
from tessera.p2p.zmq_door import RouteOutlet, ZmqDoor
from tessera.p2p.zmq_keys import CurveKeys
from tessera.p2p.zmq_link import ZmqLink

__all__ = ["ZmqTransport"]

log = structlog.get_logger()

SCHEME = "zmq"
DIAL_S = 5.0
MAX_LINKS = 1024  # all peers together
MAX_SOCKETS = 8192  # each link that we dial takes three
LINKS_PER_PEER = 2
FLUSH_S = 0.4
ENGINE_CLOSE_S = 0.5


@dataclass(slots=True)
class _Dial:
    """A dial under way, shared by all who wait for it."""

    over: anyio.Event = field(default_factory=anyio.Event)
    link: ZmqLink | None = None
    error: TesseraError | None = None


class ZmqTransport:
    """Made by `async with ZmqTransport.start(key) as transport`."""

    def __init__(
        self, key: PeerKey, context: zmq.Context[Any], bind: str, tasks: Background, clock: Clock, pacer: Pacer | None
    ) -> None:
        self._key, self._context, self._tasks, self._clock, self._pacer = key, context, tasks, clock, pacer
        self._curve = CurveKeys.of(key)
        self._switchboard = Switchboard(pacer)
        self._presence = PresenceBoard()
        self._links: dict[PeerId, list[ZmqLink]] = {}
        self._dials: dict[PeerId, _Dial] = {}
        self._closing = False
        self._door = ZmqDoor(context, key, self._curve, bind, self._welcome)

    @classmethod
    @asynccontextmanager
    async def start(
        cls, key: PeerKey, *, bind: str = "127.0.0.1:0", clock: Clock | None = None, pacer: Pacer | None = None
    ) -> AsyncIterator[ZmqTransport]:
        """Listen on `bind`, an IP address and a TCP port (0: any free one), until the body ends.

        Args:
            pacer: the node's, shared by its transports; None: nothing is paced.

        Raises: Invalid for an address that cannot be bound, Unavailable when something else holds the port.
        """
        context: zmq.Context[Any] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        try:
            async with background() as tasks:
                transport = _bound(cls, key, context, parse_bind(bind), tasks, clock or SystemClock(), pacer)
                tasks.start_soon(transport._door.run)
                try:
                    yield transport
                finally:
                    with anyio.CancelScope(shield=True):
                        await transport.close()
        finally:
            with anyio.move_on_after(ENGINE_CLOSE_S, shield=True) as scope:
                # a dial that was cancelled before its first step has a socket that nobody closed: this does
                await to_thread.run_sync(context.destroy, 0, abandon_on_cancel=True)
            if scope.cancelled_caught:
                log.warning("engine_still_closing", after_s=ENGINE_CLOSE_S)

    @property
    def id(self) -> PeerId:
        return self._key.id

    def record(self) -> PeerRecord:
        """Every address at which this node may be reached: loopback where it listens there, and its interfaces'."""
        addrs = tuple(f"{SCHEME}:{addr}" for addr in reachable(self._door.address)[:MAX_ADDRS])
        return PeerRecord.sign(self._key, addrs, expires=self._clock.time() + RECORD_TTL_S)

    def admit(self, peers: Collection[PeerId] | None) -> None:
        """Only these may connect from now on; None: anyone. Links that stand are left alone."""
        self._door.admit(peers)

    def serve(self, protocol: str, handler: Handler, *, max_streams: int = 64) -> None:
        self._switchboard.serve(protocol, handler, max_streams=max_streams)

    async def open(
        self, peer: PeerRecord, protocol: str, *, timeout_s: float, bulk: bool = False, confirm: bool = True
    ) -> Stream:
        """See `Transport.open`. Cost: the dial when no link stands, then one round trip with `confirm`, else none."""
        self._check_target(peer)
        return await open_in_time(
            lambda: self._open(peer, protocol, bulk, confirm), peer.id, protocol, timeout_s=timeout_s, confirm=confirm
        )

    async def watch(self, peer: PeerId) -> AsyncIterator[Presence]:
        async with aclosing(self._presence.watch(peer)) as states:
            async for state in states:
                yield state

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            links = [link for links in self._links.values() for link in links]
            with anyio.move_on_after(FLUSH_S):
                async with anyio.create_task_group() as leaving:
                    for link in links:
                        leaving.start_soon(link.leave)
            for link in links:
                link.end("closed")
        await self._tasks.close()

    # --- dialling ---------------------------------------------------------------------------------------------------

    def _check_target(self, peer: PeerRecord) -> None:
        if self._closing:
            raise Unavailable("this transport is closed")
        if peer.id == self.id:
            raise Invalid("a peer does not dial itself")
        if not _sockets(peer) and not self._links.get(peer.id):
            raise Invalid(f"the record of {peer.id[:16]}… has no {SCHEME}:host:port address, only {list(peer.addrs)}")

    async def _open(self, peer: PeerRecord, protocol: str, bulk: bool, confirm: bool) -> FramedStream:
        link = self._standing(peer)
        if link is not None:
            try:
                return await link.open(protocol, bulk=bulk, confirm=confirm)
            except Unavailable as error:  # it died while we waited for a place on it
                log.debug("link_was_dead", peer_id=peer.id, reason=error.message)
        return await (await self._dialled(peer)).open(protocol, bulk=bulk, confirm=confirm)

    def _standing(self, peer: PeerRecord) -> ZmqLink | None:
        """The newest live link, unless this record is newer than it and names other addresses: then the peer has moved,
        and the old link is closed.
        """
        alive = [link for link in self._links.get(peer.id, ()) if link.alive]
        if not alive:
            return None
        link = alive[-1]
        old = link.dialled
        moved = old is not None and old.expires < peer.expires and set(old.addrs).isdisjoint(peer.addrs)
        if moved:
            link.end("moved")
        return None if moved else link

    async def _dialled(self, peer: PeerRecord) -> ZmqLink:
        """A new link, or the one that somebody else is dialling now."""
        dial = self._dials.get(peer.id)
        if dial is None:
            dial = self._dials[peer.id] = _Dial()
            self._tasks.start_soon(self._dial, peer, dial)
        await dial.over.wait()
        if dial.link is None:
            raise dial.error or Unavailable("this transport is closed")
        return dial.link

    async def _dial(self, peer: PeerRecord, dial: _Dial) -> None:
        try:
            dealer = await self._first_to_greet(peer)
            link = ZmqLink(peer.id, dealer, self._on_stream, dialled=peer, pacer=self._pacer)
            dealer.hand_to(link.receive, link.end)
            self._adopt(link)
            dial.link = link
        except TesseraError as error:
            dial.error = error
        finally:
            self._dials.pop(peer.id, None)
            dial.over.set()

    async def _first_to_greet(self, peer: PeerRecord) -> ZmqDealer:
        """Dial all addresses at once; the first that proves to be `peer` wins, and the others are dropped."""
        if sum(map(len, self._links.values())) >= MAX_LINKS:
            raise Unavailable(f"this node has {MAX_LINKS} links already", peer=peer.id)
        dealers = [ZmqDealer(self._context, self._key, self._curve, peer.id, addr) for addr in _sockets(peer)]
        winners: list[ZmqDealer] = []

        async def attempt(dealer: ZmqDealer) -> None:
            self._tasks.start_soon(dealer.run)
            await dealer.greeted.wait()
            if dealer.error is None:
                winners.append(dealer)
                attempts.cancel_scope.cancel()

        try:
            with anyio.move_on_after(DIAL_S):
                async with anyio.create_task_group() as attempts:
                    for dealer in dealers:
                        attempts.start_soon(attempt, dealer)
            if not winners:
                raise self._no_answer(peer, dealers)
            return winners[0]
        finally:
            for dealer in dealers:
                if dealer not in winners[:1]:
                    dealer.cut()

    def _no_answer(self, peer: PeerRecord, dealers: list[ZmqDealer]) -> TesseraError:
        for dealer in dealers:
            if isinstance(dealer.error, Refused):
                dealer.error.fields["peer"] = peer.id
                return dealer.error
        waited = f"nothing within {DIAL_S:g} s"
        reasons = ", ".join(f"{dealer.address} ({dealer.error or waited})" for dealer in dealers)
        stale = " (the record has expired: ask for a new one)" if peer.expired(self._clock.time()) else ""
        return Unavailable(f"{peer.id[:16]}… does not answer at {reasons}{stale}", peer=peer.id)

    # --- links ------------------------------------------------------------------------------------------------------

    def _welcome(self, peer: PeerId, outlet: RouteOutlet) -> ZmqLink:
        link = ZmqLink(peer, outlet, self._on_stream, pacer=self._pacer)
        self._adopt(link)
        return link

    def _adopt(self, link: ZmqLink) -> None:
        if self._closing:
            link.end("closed")
            raise Unavailable("this transport is closed")
        links = self._links.setdefault(link.peer, [])
        links.append(link)
        for old in links[:-LINKS_PER_PEER]:
            old.end("replaced")
        self._presence.set(link.peer, "up")
        self._tasks.start_soon(self._keep, link)
        log.debug("link_up", peer_id=link.peer, dialled=link.dialled is not None)

    async def _keep(self, link: ZmqLink) -> None:
        try:
            reason = await link.run()
            log.debug("link_down", peer_id=link.peer, reason=reason)
        finally:
            links = self._links.get(link.peer, [])
            if link in links:
                links.remove(link)
            if not links:
                self._links.pop(link.peer, None)
                self._presence.set(link.peer, "down")

    def _on_stream(self, channel: ZmqChannel, peer: PeerId) -> None:
        self._tasks.start_soon(self._switchboard.answer, channel, peer)


def _bound(
    cls: type[ZmqTransport],
    key: PeerKey,
    context: zmq.Context[Any],
    bind: str,
    tasks: Background,
    clock: Clock,
    pacer: Pacer | None,
) -> ZmqTransport:
    try:
        return cls(key, context, bind, tasks, clock, pacer)
    except zmq.ZMQError as error:
        reason = f"cannot listen on {bind!r}: {error}"
        if error.errno in (zmq.EADDRINUSE, zmq.EADDRNOTAVAIL):
            raise Unavailable(reason) from error
        raise Invalid(reason) from error


def _sockets(peer: PeerRecord) -> list[str]:
    """The addresses of a record that can be dialled; one that is malformed does not spoil the others."""
    return [rest for rest in peer.rests(SCHEME) if is_socket(rest)]
