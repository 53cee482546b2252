"""Ask a relay whether it would let us in, as its clients do, without any engine."""

from __future__ import annotations

import logging
import ssl
import time
from dataclasses import dataclass

import anyio
import anyio.abc
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from tessera.core.errors import Invalid, Late, Refused, TesseraError, Unavailable
from tessera.core.signing import PeerKey
from tessera.p2p.relay.frames import CHALLENGE_BYTES, MAX_FRAME, SUBPROTOCOLS, Kind, prove
from tessera.p2p.relay.url import RelayUrl

__all__ = ["RelayProbe", "Visitor", "probe_relay"]

_SILENT = logging.Logger("relay-probe", logging.CRITICAL)
READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class RelayProbe:
    """What a relay answered. `round_trip_s` is of one ping through the open connection."""

    url: str
    round_trip_s: float
    connect_s: float
    version: int


class Visitor:
    """A client of a relay, with a key of its own: WebSocket messages in, WebSocket messages out.

    Made by `Visitor.enter`; the caller bounds every wait and calls `leave`.
    """

    def __init__(self, stream: anyio.abc.ByteStream, protocol: ClientProtocol) -> None:
        self._stream, self._protocol = stream, protocol
        self._arrived: list[bytes] = []
        self.version = 0

    @classmethod
    async def enter(cls, relay: RelayUrl, key: PeerKey) -> Visitor:
        """Connect, upgrade, prove the key. Raises: Refused with the rule `relay_token` or `relay`, Unavailable."""
        stream = await _connect(relay)
        headers = Headers({"Authorization": f"Bearer {relay.token}"}) if relay.token else Headers()
        protocol = ClientProtocol(
            parse_uri(f"ws{relay.url.removeprefix('http')}/relay"),
            subprotocols=[Subprotocol(name) for name in SUBPROTOCOLS], max_size=MAX_FRAME, logger=_SILENT,
        )  # fmt: skip
        visitor = cls(stream, protocol)
        try:
            await visitor._upgrade(headers)
            await visitor._prove(key)
        except BaseException:
            await visitor.leave()
            raise
        return visitor

    async def say(self, payload: bytes) -> None:
        self._protocol.send_binary(payload)
        await self._send()

    async def hear(self) -> bytes:
        """The next message of the relay. Raises: Unavailable when it hangs up."""
        while not self._arrived:
            await self._receive()
        return self._arrived.pop(0)

    async def leave(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)

    async def _upgrade(self, headers: Headers) -> None:
        request = self._protocol.connect()
        request.headers.update(headers)
        self._protocol.send_request(request)
        await self._send()
        while self._protocol.state.name == "CONNECTING" and self._protocol.handshake_exc is None:
            await self._receive()
        error = self._protocol.handshake_exc
        if isinstance(error, InvalidStatus) and error.response.status_code == 401:
            raise Refused("the relay asks for a token, and this one is not it", rule="relay_token")
        if error is not None:
            raise Unavailable(f"this is no relay, or it is full: {error}"[:300])
        self.version = 2 if self._protocol.subprotocol == SUBPROTOCOLS[0] else 1

    async def _prove(self, key: PeerKey) -> None:
        challenge = await self.hear()
        if len(challenge) != 1 + CHALLENGE_BYTES or challenge[0] != Kind.CHALLENGE:
            raise Unavailable(f"this relay speaks another protocol: its first frame begins with {challenge[:4].hex()}")
        await self.say(prove(key.seed, challenge[1:]))
        answer = await self.hear()
        if answer[:1] != bytes((Kind.CONFIRMED,)):
            raise Refused(f"the relay refuses: {answer[2:].decode('utf-8', 'replace')[:120]}", rule="relay")

    async def _send(self) -> None:
        try:
            for data in self._protocol.data_to_send():
                if data:
                    await self._stream.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise Unavailable("the relay hung up") from error

    async def _receive(self) -> None:
        try:
            self._protocol.receive_data(await self._stream.receive(READ_BYTES))
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise Unavailable("the relay hung up") from error
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.BINARY and event.data:
                self._arrived.append(bytes(event.data))
        await self._send()


async def probe_relay(url: str, token: str = "", timeout_s: float = 5.0) -> RelayProbe:
    """Enter as a client would, with a throw-away key, and time one ping.

    Raises: Invalid for a malformed URL or token, Refused for a wrong token, Unavailable when nobody answers there or it
    is no relay, Late.
    """
    relay = RelayUrl(url, token)
    began = time.monotonic()
    try:
        with anyio.fail_after(timeout_s):
            visitor = await Visitor.enter(relay, PeerKey.generate())
            try:
                entered = time.monotonic()
                await visitor.say(bytes((Kind.PING,)) + b"probing.")
                while (await visitor.hear())[0] != Kind.PONG:
                    continue
                now = time.monotonic()
                return RelayProbe(relay.url, now - entered, entered - began, visitor.version)
            finally:
                await visitor.leave()
    except TimeoutError:
        raise Late(f"the relay at {relay.url} does not answer within {timeout_s:g} s") from None
    except TesseraError as error:
        error.fields["relay"] = relay.url
        raise


async def _connect(relay: RelayUrl) -> anyio.abc.ByteStream:
    try:
        if relay.encrypted:
            return await anyio.connect_tcp(relay.host, relay.port, tls=True, tls_standard_compatible=False)
        return await anyio.connect_tcp(relay.host, relay.port)
    except ssl.SSLError as error:
        raise Unavailable(f"no TLS with {relay.url}: {error}") from error
    except UnicodeError as error:
        raise Invalid(f"{relay.host!r} is no host name") from error
    except OSError as error:
        raise Unavailable(f"nobody answers at {relay.url}: {error}") from error
