"""A relay: who is connected, and where a datagram goes.

It knows the public keys of those who are connected, who sends to whom, how much and when. It does not know what: QUIC
encrypts between the two peers, by keys that only they have. It stores nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import anyio
import structlog

from tessera.core.errors import Invalid, TesseraError, Unavailable
from tessera.p2p.relay.connection import READ_BYTES, REMEMBERED, Connection, Limits
from tessera.p2p.relay.door import Door, Tokens
from tessera.p2p.relay.frames import MAX_FRAME, PEER_BYTES, Status, restarting_frame
from tessera.p2p.relay.sight import serve_sight
from tessera.p2p.relay.url import check_token

__all__ = ["Relay", "RelayConfig"]

log = structlog.get_logger()

LOOK_S = 5.0
CLOSE_S = 1.0
RETURN_MS = 2000  # clients of a relay that restarts come back spread over this long
LOOPBACK = ("127.", "::1", "::ffff:127.")


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """How a relay runs; the defaults suit a small rented host."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = 0  # TCP; 0 = any free one
    tokens: tuple[str, ...] = ()  # any one of them opens the relay; none = open to everybody
    rate: float = math.inf  # bytes/s for each peer, each direction
    max_clients: int = 1024
    max_per_host: int = 64  # clients from one IP address; those from loopback (a proxy) do not count
    max_waiting: int = 256  # connections that have not proven a key; beyond it the oldest goes
    queue_bytes: int = 512 * 1024  # datagrams waiting for one peer
    proof_timeout_s: float = 5.0
    sight: bool = True  # tell nodes, on UDP at the same port, from which address their packets come
    certificate: str = ""  # path of a PEM chain: serve https itself
    private_key: str = ""  # path of its PEM key

    def __post_init__(self) -> None:
        for token in self.tokens:
            check_token(token)
        if min(self.max_clients, self.max_per_host, self.max_waiting) < 1 or self.queue_bytes < 2 * MAX_FRAME:
            raise Invalid(f"a relay takes at least one client, and queues at least {2 * MAX_FRAME} bytes for it")
        if bool(self.certificate) != bool(self.private_key):
            raise Invalid("https needs both a certificate and its private key")


class Relay:
    """Made by `async with Relay.start(config) as relay`."""

    connection: ClassVar[type[Connection]] = Connection

    def __init__(self, config: RelayConfig) -> None:
        self.config = config
        self.limits = Limits(config.rate, config.queue_bytes, config.proof_timeout_s)
        self.buffer = bytearray(READ_BYTES)
        self.facts: dict[str, Any] = {"protocol": "tessera-relay/1", "token": bool(config.tokens)}
        self.port = 0
        self._tokens = Tokens(config.tokens)
        self._waiting: dict[Connection, None] = {}  # in the order in which they came
        self._live: dict[bytes, Connection] = {}
        self._resting: dict[bytes, Connection] = {}
        self._hosts: Counter[str] = Counter()
        self._next_look: asyncio.TimerHandle | None = None

    @classmethod
    @asynccontextmanager
    async def start(cls, config: RelayConfig) -> AsyncIterator[Relay]:
        """Forward until the body ends; then tell every client, and go within a second.

        Raises: Invalid for a host or certificate that makes no sense, Unavailable when the port is taken.
        """
        relay = cls(config)
        server = await relay._listen()
        relay._look()
        try:
            async with AsyncExitStack() as stack:
                if config.sight:
                    await relay._open_eyes(stack)
                yield relay
        finally:
            with anyio.CancelScope(shield=True):
                await relay._close(server)

    @property
    def url(self) -> str:
        """As seen from this machine."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"{'https' if self.config.certificate else 'http'}://{host}:{self.port}"

    @property
    def clients(self) -> list[str]:
        """The peer ids that can be reached through this relay now."""
        return [peer.hex() for peer in self._live]

    # --- what a connection asks of us -------------------------------------------------------------------------------

    def door(self, connection: Connection) -> Door:
        return Door(self._tokens, lambda: {**self.facts, "seen": connection.address}, lambda: self._room(connection))

    def arrived(self, connection: Connection) -> None:
        """When strangers crowd the entrance, the one who has stood there longest goes: newcomers get their chance."""
        self._waiting[connection] = None
        if len(self._waiting) > self.config.max_waiting:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.drop("crowded_out")

    def proven(self, connection: Connection, peer: bytes) -> str:
        """The key is shown to be the client's. Returns why it may not stay, or ""."""
        full = "" if peer in self._live else self._room(connection)
        if full:
            return full
        self._waiting.pop(connection, None)
        self._hosts[connection.host] += 1
        older = self._live.get(peer)
        if older is not None:
            self._rest(peer, older)
        self._live[peer] = connection
        connection.live = True
        connection.confirm()
        log.info("relay_client_up", peer_id=peer.hex(), host=connection.host, clients=len(self._live))
        return ""

    def forward(self, source: Connection, payload: bytes) -> None:
        """Hand the datagrams to whom they are addressed. Nobody by that key here: they are lost, as on any network."""
        peer = payload[1 : 1 + PEER_BYTES]
        target = self._live.get(peer)
        if target is None:
            return
        if len(source.sent_to) < REMEMBERED:
            source.sent_to[peer] = None
        target.deliver(*source.datagram(payload))

    def left(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)
        if not connection.peer:
            return
        self._hosts[connection.host] -= 1
        if not self._hosts[connection.host]:
            del self._hosts[connection.host]
        log.info(
            "relay_client_down", peer_id=connection.peer.hex(), reason=connection.reason,
            received_bytes=connection.received_bytes, sent_bytes=connection.sent_bytes,
            dropped_bytes=connection.dropped_bytes,
            seconds=round(asyncio.get_running_loop().time() - connection.since, 1),
        )  # fmt: skip
        if self._resting.get(connection.peer) is connection:
            del self._resting[connection.peer]
        if self._live.get(connection.peer) is connection:
            self._succeed(connection)

    # --- one key, one live connection -------------------------------------------------------------------------------

    def _rest(self, peer: bytes, older: Connection) -> None:
        """The newest wins. The older one stays, silent, so that two machines with one key do not throw each other
        out for ever; a third one ends it.
        """
        oldest = self._resting.pop(peer, None)
        if oldest is not None:
            oldest.drop("replaced", gently=True)
        older.live = False
        older.tell(Status.REPLACED)
        self._resting[peer] = older

    def _succeed(self, connection: Connection) -> None:
        heir = self._resting.pop(connection.peer, None)
        if heir is not None:
            heir.live = True
            heir.tell(Status.HEALTHY)
            self._live[connection.peer] = heir
            return
        del self._live[connection.peer]
        for peer in connection.sent_to:
            if target := self._live.get(peer):
                target.gone(connection.peer)

    def _room(self, connection: Connection) -> str:
        if len(self._live) >= self.config.max_clients:
            return f"this relay is full ({self.config.max_clients} peers)"
        behind_proxy = connection.host.startswith(LOOPBACK)
        if not behind_proxy and self._hosts[connection.host] >= self.config.max_per_host:
            return f"too many peers from {connection.host} (at most {self.config.max_per_host})"
        return ""

    # --- life -------------------------------------------------------------------------------------------------------

    async def _listen(self) -> asyncio.Server:
        loop, config = asyncio.get_running_loop(), self.config
        try:
            server = await loop.create_server(
                lambda: self.connection(self), config.host, config.port, ssl=self._tls(), backlog=256,
                ssl_handshake_timeout=config.proof_timeout_s if config.certificate else None,
            )  # fmt: skip
        except OSError as error:
            reason = error.strerror or str(error)
            raise Unavailable(f"the relay cannot listen on {config.host}:{config.port}: {reason}") from error
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _open_eyes(self, stack: AsyncExitStack) -> None:
        try:
            self.facts |= await stack.enter_async_context(serve_sight(self.config.host, self.port))
        except TesseraError as error:  # the relay works without; its users then find fewer direct paths
            log.warning("relay_without_sight", reason=error.message)

    def _tls(self) -> ssl.SSLContext | None:
        if not self.config.certificate:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.config.certificate, self.config.private_key)
        except OSError as error:  # ssl.SSLError is one
            raise Invalid(f"cannot use {self.config.certificate} with {self.config.private_key}: {error}") from error
        return context

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in (*self._live.values(), *self._resting.values()):
            connection.look(loop.time())
        self._next_look = loop.call_later(LOOK_S, self._look)

    async def _close(self, server: asyncio.Server) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        server.close()
        for connection in (*self._live.values(), *self._resting.values()):
            connection.farewell(restarting_frame(random.randrange(RETURN_MS), 2 * RETURN_MS))
        for connection in list(self._waiting):
            connection.drop("relay_closed")
        with anyio.move_on_after(CLOSE_S):
            while self._live or self._resting or self._waiting:
                await anyio.sleep(0.01)
        for connection in (*self._live.values(), *self._resting.values(), *self._waiting):
            connection.drop("relay_closed")
        await anyio.lowlevel.checkpoint()
