"""`Transport` on iroh: QUIC between ed25519 keys, encrypted and authenticated end to end, no name service.

A peer's key is its iroh endpoint id. All protocols share one ALPN; each stream's hello names its protocol
(`switchboard`). There is one link for each pair of peers, dialled by whoever needs it first and used both ways; when
both dial at once there may be two, never more. A dead link is dropped and dialled again by the next `open`, and a
newer record with other addresses is dialled at once, since the peer has probably moved.

Relays are those that the owner names, never others: a record that names another one is not followed there, or any peer
could have us connect to hosts of its choice. A record says at which relays a peer listens; tokens are in no record.
Two peers that meet at a relay try direct paths beside it and move to the best one that works.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

import anyio
import iroh.iroh_ffi as iroh
import structlog

from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.background import Background, background
from tessera.p2p.framing import FramedStream, open_in_time
from tessera.p2p.iroh_link import IrohChannel, IrohLink, iroh_reason
from tessera.p2p.pacer import Pacer
from tessera.p2p.presence import PresenceBoard
from tessera.p2p.relay.engine import Bindings, connected_home, keep_home, online, relay_mode, same_relay
from tessera.p2p.relay.probe import probe_relay
from tessera.p2p.relay.sight import keep_sighted
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.switchboard import Switchboard
from tessera.p2p.transport import MAX_ADDRS, RECORD_TTL_S, Handler, PeerRecord, Presence, Stream

__all__ = ["IrohTransport", "RelayStatus"]

log = structlog.get_logger()

ALPN = b"tessera/1"
SCHEME = "iroh"
RELAY_SCHEME = "relay"
DIAL_S = 5.0
HANDSHAKE_S = 5.0  # a peer that dials us gets this long
MAX_LINKS = 1024  # all peers together, those that still shake hands included
BUSY = 64  # handshakes at once, from which on a peer has to prove its address first
LINKS_PER_PEER = 2
FLUSH_S = 0.4
ENGINE_CLOSE_S = 0.4


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """One of the owner's relays, now. `round_trip_s` is infinite and `problem` says why when it does not answer."""

    url: str
    home: bool  # this node listens there, and is connected
    round_trip_s: float
    problem: str = ""


@dataclass(slots=True)
class _Dial:
    """A dial under way, shared by all who wait for it."""

    over: anyio.Event = field(default_factory=anyio.Event)
    link: IrohLink | None = None
    error: TesseraError | None = None


class IrohTransport:
    """Made by `async with IrohTransport.start(key) as transport`."""

    def __init__(
        self, key: PeerKey, endpoint: iroh.Endpoint, tasks: Background, clock: Clock, pacer: Pacer | None = None,
        relays: tuple[RelayUrl, ...] = (), direct: bool = True,
    ) -> None:  # fmt: skip
        self._key, self._endpoint, self._tasks, self._clock = key, endpoint, tasks, clock
        self._relays, self._direct = relays, direct
        self._switchboard, self._pacer = Switchboard(pacer), pacer
        self._presence = PresenceBoard()
        self._links: dict[PeerId, list[IrohLink]] = {}
        self._dials: dict[PeerId, _Dial] = {}
        self._welcoming = 0
        self._closing = False

    @classmethod
    @asynccontextmanager
    async def start(
        cls, key: PeerKey, *, bind: str = "127.0.0.1:0", clock: Clock | None = None, pacer: Pacer | None = None,
        relays: Sequence[RelayUrl] = (), direct: bool = True,
    ) -> AsyncIterator[IrohTransport]:  # fmt: skip
        """Listen on `bind`, an IP address and a UDP port (0: any free one), and at the nearest of `relays`, until the
        body ends. A relay that is down does not hold up the start: see `online` and `relay_status`.

        Args:
            pacer: the node's, shared by its transports; None: nothing is paced.
            direct: without, no address but the relays' is published or told to peers, and only peers on this machine
                find another way; `bind` then does not count.

        Raises: Invalid for an address that cannot be bound or relays that make no sense, Unavailable when something
        else holds the port.
        """
        if not direct and not relays:
            raise Invalid("a node without direct addresses needs a relay to be reached at")
        endpoint = await _bind(key, bind if direct else "127.0.0.1:0", relays)
        try:
            async with background() as tasks:
                transport = cls(key, endpoint, tasks, clock or SystemClock(), pacer, tuple(relays), direct)
                tasks.start_soon(transport._welcome_all)
                if relays:
                    tasks.start_soon(keep_home, endpoint, relays)
                for relay in relays if direct and not _on_loopback(bind) else ():
                    tasks.start_soon(keep_sighted, endpoint, relay)
                try:
                    yield transport
                finally:
                    with anyio.CancelScope(shield=True):
                        await transport.close()
        finally:
            with anyio.move_on_after(ENGINE_CLOSE_S, shield=True):
                await endpoint.close()

    @property
    def id(self) -> PeerId:
        return self._key.id

    def record(self) -> PeerRecord:
        """Every address at which this node may be reached: loopback where it listens there, its interfaces', relays."""
        home = connected_home(self._endpoint) if self._relays else ""
        relays = sorted((relay.url for relay in self._relays), key=lambda url: url != home)
        direct = _reachable(self._endpoint) if self._direct else []
        addrs = [f"{SCHEME}:{addr}" for addr in direct[: MAX_ADDRS - len(relays)]]
        addrs += [f"{RELAY_SCHEME}:{url}" for url in relays]
        return PeerRecord.sign(self._key, tuple(addrs), expires=self._clock.time() + RECORD_TTL_S)

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

    async def online(self, timeout_s: float) -> bool:
        """Whether this node listens at one of its relays, waiting for that up to `timeout_s`."""
        return await online(self._endpoint, timeout_s) if self._relays else False

    async def relay_status(self, timeout_s: float = 3.0) -> list[RelayStatus]:
        """How each relay does, in the order in which they were given. Cost: one short connection to each, together."""
        found: dict[str, RelayStatus] = {}
        home = connected_home(self._endpoint) if self._relays else ""

        async def look(relay: RelayUrl) -> None:
            try:
                probe = await probe_relay(relay.url, relay.token, timeout_s)
                found[relay.url] = RelayStatus(relay.url, relay.url == home, probe.round_trip_s)
            except TesseraError as error:
                found[relay.url] = RelayStatus(relay.url, relay.url == home, math.inf, error.message)

        async with anyio.create_task_group() as looking:
            for relay in self._relays:
                looking.start_soon(look, relay)
        return [found[relay.url] for relay in self._relays]

    async def watch(self, peer: PeerId) -> AsyncIterator[Presence]:
        async with aclosing(self._presence.watch(peer)) as states:
            async for state in states:
                yield state

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            links = [link for links in self._links.values() for link in links]
            with anyio.move_on_after(FLUSH_S):
                async with anyio.create_task_group() as flushing:
                    for link in links:
                        flushing.start_soon(link.flush)
            for link in links:
                link.close("closed")
        await self._tasks.close()

    # --- dialling ---------------------------------------------------------------------------------------------------

    def _check_target(self, peer: PeerRecord) -> None:
        if self._closing:
            raise Unavailable("this transport is closed")
        if peer.id == self.id:
            raise Invalid("a peer does not dial itself")
        if not self._links.get(peer.id) and not _sockets(peer) and not self._meeting_points(peer):
            named = peer.rests(RELAY_SCHEME)
            fix = f": it can be met at {', '.join(named)}, which is not among our relays" if named else ""
            raise Invalid(
                f"the record of {peer.id[:16]}… has no {SCHEME}:host:port address to dial, only {list(peer.addrs)}{fix}"
            )

    def _meeting_points(self, peer: PeerRecord) -> list[str]:
        """The relays that both of us use."""
        shared = [same_relay(rest, self._relays) for rest in peer.rests(RELAY_SCHEME)]
        return [relay.url for relay in shared if relay is not None]

    async def _open(self, peer: PeerRecord, protocol: str, bulk: bool, confirm: bool) -> FramedStream:
        link = self._standing(peer)
        if link is not None:
            try:
                return await link.open(protocol, bulk=bulk, confirm=confirm)
            except Unavailable as error:  # it died before we noticed
                link.close("broken")
                log.debug("link_was_dead", peer_id=peer.id, reason=error.message)
        return await (await self._dialled(peer)).open(protocol, bulk=bulk, confirm=confirm)

    def _standing(self, peer: PeerRecord) -> IrohLink | None:
        """The newest live link, unless this record is newer than it and names other addresses: then the peer has moved,
        and the old link is closed, since the engine sends a new handshake down the old path while that one stands.
        """
        alive = [link for link in self._links.get(peer.id, ()) if link.alive]
        if not alive:
            return None
        link = alive[-1]
        before, now = set(link.sockets), set(_sockets(peer))  # a relay stays the same when a peer moves
        moved = link.expires < peer.expires and bool(before and now) and before.isdisjoint(now)
        if moved:
            link.close("moved")
        return None if moved else link

    async def _dialled(self, peer: PeerRecord) -> IrohLink:
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
            with anyio.fail_after(DIAL_S):
                connection = await self._connect(peer)
            sockets = tuple(_sockets(peer))
            dial.link = IrohLink(connection, dialled=True, sockets=sockets, expires=peer.expires, pacer=self._pacer)
            self._adopt(dial.link)
        except TimeoutError:
            dial.error = self._no_answer(peer, f"nothing within {DIAL_S:g} s")
        except iroh.IrohError as error:
            dial.error = self._no_answer(peer, iroh_reason(error))
        except TesseraError as error:
            dial.error = error
        finally:
            self._dials.pop(peer.id, None)
            dial.over.set()

    async def _connect(self, peer: PeerRecord) -> iroh.Connection:
        """All direct addresses, and each shared relay, at once; the first that answers. Raises the last `IrohError`."""
        points: list[str | None] = [*self._meeting_points(peer)] or [None]
        name, sockets = iroh.EndpointId.from_string(peer.id), _sockets(peer)
        made: list[iroh.Connection] = []
        errors: list[iroh.IrohError] = []

        async def attempt(point: str | None) -> None:
            try:
                made.append(await self._endpoint.connect(iroh.EndpointAddr(name, point, sockets), ALPN))
                dialling.cancel_scope.cancel()
            except iroh.IrohError as error:
                errors.append(error)

        async with anyio.create_task_group() as dialling:
            for point in points:
                dialling.start_soon(attempt, point)
        if not made:
            raise errors[-1]
        for spare in made[1:]:
            spare.close(0, b"replaced")
        return made[0]

    def _no_answer(self, peer: PeerRecord, reason: str) -> Unavailable:
        addrs = ", ".join(peer.addrs)
        stale = " (the record has expired: ask for a new one)" if peer.expired(self._clock.time()) else ""
        return Unavailable(f"{peer.id[:16]}… does not answer at {addrs}: {reason}{stale}", peer=peer.id)

    # --- links ------------------------------------------------------------------------------------------------------

    async def _welcome_all(self) -> None:
        while (incoming := await self._endpoint.accept_next()) is not None:
            if self._welcoming + sum(map(len, self._links.values())) >= MAX_LINKS:
                await incoming.refuse()
                continue
            if self._welcoming >= BUSY and not await incoming.remote_addr_validated():
                await incoming.retry()  # costs an honest peer one round trip, and whoever forges addresses everything
                continue
            self._welcoming += 1
            self._tasks.start_soon(self._welcome, incoming)

    async def _welcome(self, incoming: iroh.Incoming) -> None:
        try:
            with anyio.fail_after(HANDSHAKE_S):
                connection = await (await incoming.accept()).connect()
            self._adopt(IrohLink(connection, pacer=self._pacer))
        except (iroh.IrohError, TimeoutError, TesseraError) as error:
            log.debug("handshake_failed", reason=iroh_reason(error))
        finally:
            self._welcoming -= 1

    def _adopt(self, link: IrohLink) -> None:
        if self._closing:
            link.close("closed")
            raise Unavailable("this transport is closed")
        links = self._links.setdefault(link.peer, [])
        links.append(link)
        for old in links[:-LINKS_PER_PEER]:
            old.close("replaced")
        self._presence.set(link.peer, "up")
        self._tasks.start_soon(self._keep, link)
        log.debug("link_up", peer_id=link.peer, dialled=link.dialled)

    async def _keep(self, link: IrohLink) -> None:
        try:
            reason = await link.run(self._on_stream)
            log.debug("link_down", peer_id=link.peer, reason=reason)
        finally:
            links = self._links.get(link.peer, [])
            if link in links:
                links.remove(link)
            if not links:
                self._links.pop(link.peer, None)
                self._presence.set(link.peer, "down")

    def _on_stream(self, channel: IrohChannel, peer: PeerId) -> None:
        self._tasks.start_soon(self._switchboard.answer, channel, peer)


async def _bind(key: PeerKey, bind: str, relays: Sequence[RelayUrl]) -> iroh.Endpoint:
    options = iroh.EndpointOptions(
        preset=Bindings(_both_families(bind)), relay_mode=relay_mode(relays), alpns=[ALPN], secret_key=key.seed
    )
    try:
        return await iroh.Endpoint.bind(options)
    except iroh.IrohError as error:
        raise Unavailable(f"cannot listen on {bind!r}: {iroh_reason(error)}") from error


def _both_families(bind: str) -> list[str]:
    """What the owner asked for, and for the other IP family the same scope: all interfaces, else loopback alone."""
    if not _is_socket(bind, lowest_port=0):
        raise Invalid(f"cannot listen on {bind!r}: an address looks like 0.0.0.0:4433")
    if _wild(bind):
        return [bind]
    return [bind, "127.0.0.1:0" if bind.startswith("[") else "[::1]:0"]


def _reachable(endpoint: iroh.Endpoint) -> list[str]:
    """The bound addresses, with those of all interfaces in the place of 0.0.0.0 and [::]."""
    bound = [str(addr) for addr in endpoint.bound_sockets()]
    named = [addr for addr in bound if not _wild(addr)]
    loopback = [f"127.0.0.1:{addr.rpartition(':')[2]}" for addr in bound if addr.startswith("0.0.0.0:")]
    interfaces = [str(addr) for addr in endpoint.addr().direct_addresses()]
    return list(dict.fromkeys([*loopback, *named, *interfaces]))


def _sockets(peer: PeerRecord) -> list[str]:
    """The addresses of a record that the engine can dial; one that is malformed does not spoil the others."""
    return [rest for rest in peer.rests(SCHEME) if _is_socket(rest)]


def _is_socket(text: str, lowest_port: int = 1) -> bool:
    host, _, port = text.rpartition(":")
    try:
        version = ip_address(host.removeprefix("[").removesuffix("]")).version
    except ValueError:
        return False
    number = int(port) if len(port) <= 5 and port.isascii() and port.isdigit() else -1
    sound = str(number) == port and lowest_port <= number < 65_536 and "%" not in host  # what the engine reads alike
    return sound and host.startswith("[") == (version == 6)


def _on_loopback(addr: str) -> bool:
    return addr.startswith(("127.", "[::1]"))


def _wild(addr: str) -> bool:
    return addr.startswith(("0.0.0.0:", "[::]:"))
