"""The listening end: one socket for all who dial us, and who may stay.

The engine has no call that ends one connection of a listening socket, and none that tells which connection a message
came on other than its descriptor. So the door keeps a book of descriptors, fed by the socket's monitor: who connected
when, and which link they became. Whoever has sent no good greeting within `GREET_S`, sends anything but link messages,
or comes when the house is full, is cut off by its descriptor.

Each message carries the key that proved its connection, as our own ZAP handler wrote it; a message under the wrong key
never reaches a link.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import anyio
import structlog
import zmq

from tessera.core import encoding
from tessera.core.errors import Misbehaviour, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.zmq_dealer import HANDSHAKE_S, configure
from tessera.p2p.zmq_keys import CurveKeys, curve_key, greeting, parse_greeting
from tessera.p2p.zmq_link import ZmqLink
from tessera.p2p.zmq_port import Parts, ZmqMonitor, ZmqPort, kick, peer_name
from tessera.p2p.zmq_wire import Kind, pack, unpack

__all__ = ["MAX_CONNECTIONS", "ZmqDoor"]

log = structlog.get_logger()

MAX_CONNECTIONS = 1024
GREET_S = HANDSHAKE_S + 1.0  # from the connection to the greeting
SWEEP_S = 0.5
REFUSED_S = 1.0  # a refused caller has this long to read why
ZAP = "inproc://zeromq.zap.01"
DRAIN = 128  # batches read before a connection counts as over

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


@dataclass(slots=True)
class _Visitor:
    """A connection, by its descriptor."""

    name: Any
    leave_at: float  # monotonic; when it is cut off unless it became a link
    route: bytes | None = None


class ZmqDoor:
    """Listens on `bind`. Raises `zmq.ZMQError` when it cannot.

    Args:
        on_greeting: gets the peer and the way to it, and makes a link of it.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        key: PeerKey,
        keys: CurveKeys,
        bind: str,
        on_greeting: Callable[[PeerId, RouteOutlet], ZmqLink],
    ) -> None:
        self._key, self._on_greeting = key, on_greeting
        self._visitors: dict[int, _Visitor] = {}
        self._links: dict[bytes, tuple[ZmqLink, str]] = {}  # by route, with the key that proves it
        self._admitted: frozenset[bytes] | None = None
        self._zap = ZmqPort(_bound(context.socket(zmq.REP), ZAP), self._judge)
        socket = context.socket(zmq.ROUTER)
        configure(socket, keys, bind)
        socket.curve_server = True
        socket.zap_domain = b"tessera"
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor = ZmqMonitor(socket, _EVENTS, self._told)
        self._port = ZmqPort(socket, self._receive)
        try:
            socket.bind(f"tcp://{bind}")
        except zmq.ZMQError:
            self.close()
            raise
        self.address = socket.get_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")

    def admit(self, peers: Collection[PeerId] | None) -> None:
        """Only these may connect from now on; None: anyone."""
        self._admitted = None if peers is None else frozenset(map(curve_key, peers))

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with anyio.create_task_group() as tasks:
                for port in (self._zap, self._monitor.port, self._port):
                    tasks.start_soon(port.run)
                while True:
                    await anyio.sleep(SWEEP_S)
                    self._sweep()
        finally:
            self.close()

    def close(self) -> None:
        self._monitor.close()
        self._port.close()
        self._zap.close()

    # --- for the links ----------------------------------------------------------------------------------------------

    def send(self, route: bytes, message: bytes) -> bool:
        return self._port.send([route, message])

    def dismiss(self, route: bytes, descriptor: int) -> None:
        """The link of this route is over."""
        self._links.pop(route, None)
        self._cut(descriptor)

    # --- who comes and goes -----------------------------------------------------------------------------------------

    def _judge(self, parts: Parts) -> None:
        """ZAP: who holds a key may come in, and each of its messages will carry that key."""
        fields = [part.bytes for part in parts]
        sound = len(fields) == 7 and fields[0] == b"1.0" and fields[5] == b"CURVE" and len(fields[6]) == 32
        admitted = sound and (self._admitted is None or fields[6] in self._admitted)
        code, text = (b"200", b"OK") if admitted else (b"400", b"not admitted")
        user = fields[6].hex().encode() if admitted else b""
        self._zap.send([b"1.0", fields[1] if len(fields) > 1 else b"", code, text, user, b""])

    def _told(self, event: zmq.Event, descriptor: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            visitor = _Visitor(peer_name(descriptor), time.monotonic() + GREET_S)
            self._visitors[descriptor] = visitor
            if len(self._visitors) > MAX_CONNECTIONS:
                log.info("connection_refused", reason="full", connections=MAX_CONNECTIONS)
                self._cut(descriptor)
            return
        gone = self._visitors.pop(descriptor, None)
        if gone is not None and gone.route in self._links:
            for _ in range(DRAIN):  # what came before the end
                if not self._port.pump():
                    break
            link, _ = self._links.pop(gone.route, (None, ""))
            if link is not None:
                link.end("the connection ended")

    def _sweep(self) -> None:
        now = time.monotonic()
        for descriptor, visitor in list(self._visitors.items()):
            if visitor.route not in self._links and now >= visitor.leave_at:
                self._cut(descriptor)

    def _cut(self, descriptor: int) -> None:
        visitor = self._visitors.pop(descriptor, None)
        if visitor is not None:
            kick(descriptor, visitor.name)

    # --- messages ---------------------------------------------------------------------------------------------------

    def _receive(self, parts: Parts) -> None:
        route, last = parts[0].bytes, parts[-1]
        proven = str(last.get("User-Id"))
        link, expected = self._links.get(route, (None, ""))
        if len(parts) != 2 or (link is not None and proven != expected):
            log.warning("connection_misbehaved", parts=len(parts))
            self._cut(int(last.get(zmq.SRCFD)))
        elif link is not None:
            link.receive(last.bytes)
        else:
            self._greet(route, last.bytes, proven, int(last.get(zmq.SRCFD)))

    def _greet(self, route: bytes, message: bytes, proven: str, descriptor: int) -> None:
        self._monitor.port.pump()  # the book must know this connection, and not an older one of the same descriptor
        visitor = self._visitors.get(descriptor)
        if visitor is None:
            return  # it is gone, or cut off
        if visitor.route is not None:  # it was refused, or its link is over
            self._cut(descriptor)
            return
        visitor.route = route
        try:
            peer = self._parse(message, proven)
            outlet = RouteOutlet(self, route, descriptor)
            link = self._on_greeting(peer, outlet)
        except TesseraError as error:
            log.debug("greeting_refused", code=error.code, reason=error.message)
            self._refuse(route, visitor, error)
            return
        self._links[route] = link, proven
        link.post(pack(Kind.GREETING, payload=greeting(self._key, peer)))

    def _parse(self, message: bytes, proven: str) -> PeerId:
        kind, _, payload = unpack(message)
        if kind is not Kind.GREETING:
            raise Misbehaviour(f"a link begins with a greeting, not with a {kind.name.lower()}")
        peer = parse_greeting(bytes(payload), us=self._key.id, proven=bytes.fromhex(proven))
        if peer == self._key.id:
            raise Misbehaviour("a peer does not dial itself")
        return peer

    def _refuse(self, route: bytes, visitor: _Visitor, error: TesseraError) -> None:
        fields = {name: value for name, value in error.fields.items() if type(value) in (bool, int, float, str)}
        public = {"code": error.code, "fields": fields, "message": error.message[:500]}
        visitor.leave_at = time.monotonic() + REFUSED_S
        try:
            self.send(route, pack(Kind.REFUSAL, payload=encoding.encode({"error": public})))
        except Unavailable as gone:
            log.debug("caller_was_gone", reason=gone.message)


@dataclass(frozen=True, slots=True)
class RouteOutlet:
    """An `Outlet` to one of those who dialled us."""

    door: ZmqDoor
    route: bytes
    descriptor: int

    def send(self, message: bytes) -> bool:
        return self.door.send(self.route, message)

    def cut(self) -> None:
        self.door.dismiss(self.route, self.descriptor)


def _bound(socket: zmq.Socket[bytes], address: str) -> zmq.Socket[bytes]:
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    return socket
