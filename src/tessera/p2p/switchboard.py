"""Connects streams to protocols, for every adapter: the hello, its answer, the caps, and the handlers' lives.

The opener's first message is canonical JSON,

    {"bulk": false, "confirm": true, "product": "tessera 0.1.0", "protocol": "tessera/blob/1", "version": 2}

and the first answer is `{}` or `{"error": …}`; with `confirm` it comes at once, else together with what the handler
says first. Another version, of the link or of a protocol, is refused naming both. Whoever sends no hello within
`HELLO_S` is cut off. A protocol has places: `max_streams` for each peer, so that a flood hurts only whoever sends it,
and `TOTAL` times that for all.

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
from tessera.core.errors import Invalid, Misbehaviour, Missing, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.framing import Channel, FramedStream
from tessera.p2p.pacer import Pacer
from tessera.p2p.transport import Handler
from tessera.p2p.versions import PRODUCT, UNNAMED, VERSION, Speech, mismatch, parse_product

__all__ = ["VERSION", "Switchboard", "hello"]

log = structlog.get_logger()

HELLO_LIMIT = 512  # bytes
HELLO_S = 5.0
QUEUE_S = 5.0  # how long a stream waits for a free place
END_S = 5.0  # how long a peer may take the last bytes of a stream
TOTAL = 16
_PROTOCOL = re.compile(r"[a-z0-9][a-z0-9./_-]{0,63}")
_FIELDS = {"bulk", "confirm", "product", "protocol", "version"}


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
    """The protocols that this node serves.

    Args:
        pacer: the node's, for what its handlers send.
    """

    def __init__(self, pacer: Pacer | None = None) -> None:
        self._services: dict[str, _Service] = {}
        self._pacer = pacer

    def serve(self, protocol: str, handler: Handler, *, max_streams: int) -> None:
        _check_protocol(protocol)
        if max_streams < 1:
            raise Invalid(f"max_streams must be at least 1, not {max_streams}")
        total = anyio.CapacityLimiter(TOTAL * max_streams)
        self._services[protocol] = _Service(protocol, handler, max_streams, total)

    async def answer(self, channel: Channel, peer: PeerId) -> None:
        """The life of one stream that `peer` opened. Never raises but for cancellation."""
        stream = FramedStream(channel, peer, consented=True, pacer=self._pacer)
        try:
            service, greeting = await self._greet(stream)
            if greeting.bulk:
                await stream.give_way()
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
        return self._service(greeting), greeting

    def _service(self, greeting: _Hello) -> _Service:
        service = self._services.get(greeting.protocol)
        if service is not None:
            return service
        kin = sorted(name for name in self._services if _same_but_version(name, greeting.protocol))
        if kin:
            raise mismatch(Speech(", ".join(kin), PRODUCT), Speech(greeting.protocol, greeting.product))
        raise Missing(f"this peer ({PRODUCT}) does not serve {greeting.protocol}")

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
    product: str
    bulk: bool
    confirm: bool


def hello(protocol: str, *, bulk: bool, confirm: bool) -> bytes:
    """The first message of a stream. Raises `Invalid` for what is no name of a protocol."""
    _check_protocol(protocol)
    facts = {"bulk": bulk, "confirm": confirm, "product": PRODUCT, "protocol": protocol, "version": VERSION}
    return encoding.encode(facts)


def _parse_hello(value: Any) -> _Hello:
    """The version first: others may look different."""
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is not int:
        raise Invalid("a hello is an object with a version")
    product = parse_product(value.get("product"))
    if version != VERSION:
        raise mismatch(Speech(VERSION, PRODUCT), Speech(version, product))
    if value.keys() != _FIELDS:
        raise Invalid(f"a hello has the fields {', '.join(sorted(_FIELDS))}")
    if type(value["bulk"]) is not bool or type(value["confirm"]) is not bool:
        raise Invalid("a hello's bulk and confirm are true or false")
    if product == UNNAMED:
        raise Invalid("a hello's product is a name and a version of up to 40 visible characters, like tessera 0.1.0")
    _check_protocol(value["protocol"])
    return _Hello(value["protocol"], product, value["bulk"], value["confirm"])


def _check_protocol(protocol: object) -> None:
    if not isinstance(protocol, str) or _PROTOCOL.fullmatch(protocol) is None:
        raise Invalid(f"a protocol is a lower-case name like tessera/blob/1, not {str(protocol)[:80]!r}")


def _same_but_version(one: str, other: str) -> bool:
    """`tessera/blob/1` and `tessera/blob/2`."""
    (name, _, version), (other_name, _, other_version) = one.rpartition("/"), other.rpartition("/")
    return name == other_name and version.isdigit() and other_version.isdigit()


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
