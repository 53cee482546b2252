"""Connects streams to protocols, for every adapter: the hello, its answer, the caps, and the handlers' lives.

The opener's first message is canonical JSON,

    {"bulk": false, "confirm": true, "protocol": "tessera/blob/1", "version": 1}

and the first answer is `{}` or `{"error": …}`; with `confirm` it comes at once, else together with what the handler
says first. Whoever sends no hello within `HELLO_S` is cut off. A protocol has places: `max_streams` for
each peer, so that a flood hurts only whoever sends it, and `TOTAL` times that for all.

Handlers belong to the transport, not to the link: a peer cannot cancel half-done work by leaving.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.framing import Channel, FramedStream
from tessera.p2p.transport import Handler

__all__ = ["VERSION", "Switchboard", "hello"]

log = structlog.get_logger()

VERSION = 1
HELLO_LIMIT = 512  # bytes
HELLO_S = 5.0
QUEUE_S = 5.0  # how long a stream waits for a free place
END_S = 5.0  # how long a peer may take the last bytes of a stream
TOTAL = 16
_PROTOCOL = re.compile(r"[a-z0-9][a-z0-9./_-]{0,63}")


@dataclass(slots=True)
class _Places:
    """What one peer may use of one protocol; dropped when nobody uses it."""

    limiter: anyio.CapacityLimiter
    users: int = 0


@dataclass(slots=True)
class _Service:
    protocol: str
    handler: Handler
    max_streams: int
    total: anyio.CapacityLimiter
    peers: dict[PeerId, _Places] = field(default_factory=dict)

    @asynccontextmanager
    async def place(self, peer: PeerId) -> AsyncIterator[None]:
        places = self.peers.setdefault(peer, _Places(anyio.CapacityLimiter(self.max_streams)))
        places.users += 1
        borrower = object()
        try:
            with anyio.move_on_after(QUEUE_S) as scope:
                await places.limiter.acquire_on_behalf_of(borrower)
                await self.total.acquire_on_behalf_of(borrower)
            if scope.cancelled_caught:
                raise Unavailable(f"all {self.max_streams} places of {self.protocol} are taken", retry_after_s=1.0)
            yield
        finally:
            _release(self.total, borrower)
            _release(places.limiter, borrower)
            places.users -= 1
            if not places.users:
                self.peers.pop(peer, None)


class Switchboard:
    """The protocols that this node serves."""

    def __init__(self) -> None:
        self._services: dict[str, _Service] = {}

    def serve(self, protocol: str, handler: Handler, *, max_streams: int) -> None:
        _check_protocol(protocol)
        if max_streams < 1:
            raise Invalid(f"max_streams must be at least 1, not {max_streams}")
        total = anyio.CapacityLimiter(TOTAL * max_streams)
        self._services[protocol] = _Service(protocol, handler, max_streams, total)

    async def answer(self, channel: Channel, peer: PeerId) -> None:
        """The life of one stream that `peer` opened. Never raises but for cancellation."""
        stream = FramedStream(channel, peer, consented=True)
        try:
            service, greeting = await self._greet(stream)
            if greeting.bulk:
                await channel.give_way()
            async with service.place(peer):
                await _consent(stream, at_once=greeting.confirm)
                await self._handle(service, stream)
        except TesseraError as error:
            log.debug("stream_refused", peer_id=peer, code=error.code, reason=error.message)
            await _refuse(stream, error)
        finally:
            await stream.end(END_S)

    async def _greet(self, stream: FramedStream) -> tuple[_Service, _Hello]:
        try:
            with anyio.fail_after(HELLO_S):
                data = await stream.recv(HELLO_LIMIT)
        except TimeoutError:
            raise Misbehaviour(f"no hello within {HELLO_S:g} s", evidence={"peer": stream.peer}) from None
        try:
            greeting = _parse_hello(encoding.decode(data, HELLO_LIMIT))
        except Invalid as error:
            raise Misbehaviour(str(error), evidence={"peer": stream.peer, "hello": data[:64].hex()}) from error
        service = self._services.get(greeting.protocol)
        if service is None:
            raise Missing(f"this peer does not serve {greeting.protocol}")
        return service, greeting

    async def _handle(self, service: _Service, stream: FramedStream) -> None:
        try:
            await service.handler(stream)
        except TesseraError as error:
            level = logging.DEBUG if isinstance(error, Unavailable) else logging.INFO  # peers come and go
            facts = {"protocol": service.protocol, "peer_id": stream.peer, "code": error.code, "reason": error.message}
            log.log(level, "stream_failed", **facts)
            await stream.abort(error.status)
        except Exception:
            log.exception("handler_broke", protocol=service.protocol, peer_id=stream.peer)
            await stream.abort(TesseraError.status)
        except BaseException:
            await stream.abort()
            raise


@dataclass(frozen=True, slots=True)
class _Hello:
    protocol: str
    bulk: bool
    confirm: bool


def hello(protocol: str, *, bulk: bool, confirm: bool) -> bytes:
    _check_protocol(protocol)
    return encoding.encode({"bulk": bulk, "confirm": confirm, "protocol": protocol, "version": VERSION})


def _parse_hello(value: Any) -> _Hello:
    """The version first: others may look different."""
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is not int:
        raise Invalid("a hello is an object with a version")
    if version != VERSION:
        raise Refused(
            f"this peer speaks version {VERSION}, the hello version {version}: upgrade the older side",
            rule="version",
            ours=VERSION,
            theirs=version,
        )
    if value.keys() != {"bulk", "confirm", "protocol", "version"}:
        raise Invalid("a hello has the fields bulk, confirm, protocol, version")
    if type(value["bulk"]) is not bool or type(value["confirm"]) is not bool:
        raise Invalid("a hello's bulk and confirm are true or false")
    _check_protocol(value["protocol"])
    return _Hello(value["protocol"], value["bulk"], value["confirm"])


def _check_protocol(protocol: object) -> None:
    if not isinstance(protocol, str) or _PROTOCOL.fullmatch(protocol) is None:
        raise Invalid(f"a protocol is a lower-case name like tessera/blob/1, not {str(protocol)[:80]!r}")


async def _consent(stream: FramedStream, *, at_once: bool) -> None:
    if at_once:
        await stream.send(encoding.encode({}))
    else:
        stream.cork(encoding.encode({}))


async def _refuse(stream: FramedStream, error: TesseraError) -> None:
    """Say why; a peer that does not listen is not waited for."""
    public = {"code": error.code, "message": error.message[:500], "fields": _plain(error.fields)}
    with anyio.move_on_after(END_S):
        try:
            await stream.send(encoding.encode({"error": public}), last=True)
        except TesseraError:
            return


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if type(value) in (bool, int, float, str)}


def _release(limiter: anyio.CapacityLimiter, borrower: object) -> None:
    try:
        limiter.release_on_behalf_of(borrower)
    except RuntimeError:  # it never got its place
        return
