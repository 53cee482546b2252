"""The dialling end of a zmq connection: one socket, one address, one key that must answer there.

The engine's CURVE handshake fails unless whoever answers holds the key that follows from the peer's id. Its own pings
(`HEARTBEAT_*`) come from its thread, so a peer whose Python is busy still answers them, and one that is silent for
`SILENT_S` is cut off; the socket's monitor tells us at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import zmq

from tessera.core import encoding
from tessera.core.errors import Invalid, TesseraError, Unavailable, from_dict
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.versions import seen_from_here
from tessera.p2p.zmq_keys import CurveKeys, curve_key, greeting, parse_greeting
from tessera.p2p.zmq_port import Parts, ZmqMonitor, ZmqPort
from tessera.p2p.zmq_wire import MAX_FRAME, Kind, pack, unpack

__all__ = ["HANDSHAKE_S", "ZmqDealer", "configure"]

HANDSHAKE_S = 5.0
PING_S = 1.0
SILENT_S = 2.0  # after a ping that is not answered: 3 s after the last sign of life
QUEUE_IN = 4096  # messages that the engine holds for us; honest peers stay below it by their windows
QUEUE_OUT = 512  # messages that it holds for the peer; more wait with us
CURVE_BYTES = 64  # that the encryption may add to a message; it adds 33
LINGER_S = 0.3
REFUSAL_LIMIT = 8 * 1024  # bytes
SEND_BUFFER = 1 << 20  # bytes in the kernel: a ping waits behind them

_ENDS = {
    zmq.EVENT_DISCONNECTED: "the connection ended",
    zmq.EVENT_CLOSED: "nothing listens there",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it does not admit our key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: it has another key, or is no peer of ours",
}


def configure(socket: zmq.Socket[bytes], keys: CurveKeys, address: str) -> None:
    """What both ends of a connection have in common."""
    socket.setsockopt(zmq.IPV6, int(address.startswith("[")))
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(PING_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENT_S * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME + CURVE_BYTES)
    socket.setsockopt(zmq.SNDHWM, QUEUE_OUT)
    socket.setsockopt(zmq.RCVHWM, QUEUE_IN)
    socket.setsockopt(zmq.SNDBUF, SEND_BUFFER)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.LINGER, int(LINGER_S * 1000))  # now: a connection that fails is ended by the engine itself


class ZmqDealer:
    """An `Outlet` to `peer` at `address` ("203.0.113.7:4433"). `run` makes it live; `greeted` is set when it has
    succeeded or failed, with `error` in the second case.
    """

    def __init__(self, context: zmq.Context[Any], key: PeerKey, keys: CurveKeys, peer: PeerId, address: str) -> None:
        self.peer, self.address = peer, address
        self.greeted = anyio.Event()
        self.error: TesseraError | None = None
        self._key = key
        self._over = anyio.Event()
        self._proven = curve_key(peer)
        self._on_message: Callable[[bytes], None] | None = None
        self._on_end: Callable[[str], None] | None = None
        socket = context.socket(zmq.DEALER)
        configure(socket, keys, address)
        socket.curve_serverkey = self._proven
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket = socket
        self._monitor = ZmqMonitor(socket, sum(_ENDS), self._told)
        self._port = ZmqPort(socket, self._receive)

    def hand_to(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        """From now on, the messages go to a link."""
        self._on_message, self._on_end = on_message, on_end
        if self._over.is_set():
            on_end("the connection ended")

    def send(self, message: bytes) -> bool:
        return self._port.send([message])

    def cut(self) -> None:
        self._over.set()

    async def run(self) -> None:
        """Until `cut`, or until the connection ends."""
        try:
            self._socket.connect(f"tcp://{self.address}")
            self._port.send([pack(Kind.GREETING, payload=greeting(self._key, self.peer))])
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._monitor.port.run)
                tasks.start_soon(self._port.run)
                await self._over.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._monitor.close()
            self._port.close()
            self._fail(Unavailable("the connection ended"))

    def _receive(self, parts: Parts) -> None:
        message = parts[0].bytes
        if len(parts) > 1:
            self._end("the peer sends messages of several parts")
        elif self._on_message is not None:
            self._on_message(message)
        elif not self.greeted.is_set():
            self._greet(message)

    def _greet(self, message: bytes) -> None:
        try:
            kind, _, payload = unpack(message)
            if kind is Kind.REFUSAL:
                self._fail(_refusal(bytes(payload)))
            elif kind is Kind.GREETING:
                if parse_greeting(bytes(payload), us=self._key.id, proven=self._proven) != self.peer:
                    raise Unavailable("another peer answers there")
                self.greeted.set()
            else:
                raise Unavailable(f"it answers with a {kind.name.lower()} instead of a greeting")
        except TesseraError as error:
            self._fail(error)

    def _told(self, event: zmq.Event, value: int) -> None:
        if event in _ENDS:
            while self._port.pump():  # what came before the end
                pass
            self._end(_ENDS[event])

    def _end(self, reason: str) -> None:
        self._fail(Unavailable(reason))
        self._over.set()
        if self._on_end is not None:
            self._on_end(reason)

    def _fail(self, error: TesseraError) -> None:
        if not self.greeted.is_set():
            self.error = error
            self.greeted.set()
            self._over.set()


def _refusal(data: bytes) -> TesseraError:
    try:
        value = encoding.decode(data, REFUSAL_LIMIT)
    except Invalid as error:
        return Unavailable(f"it refuses in words that cannot be read: {error}")
    return seen_from_here(from_dict(value.get("error") if isinstance(value, dict) else None))
