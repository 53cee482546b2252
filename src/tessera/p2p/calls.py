"""Request and reply: one stream, a canonical JSON object each way, and a raw body beside it when there is one.

    caller:  request object [body]          the last message says so
    server:  {"reply": object} [body]   or  {"error": {"code", "fields", "message"}}

A `TesseraError` of the handler keeps its class on the way back, so the caller knows what to do. Anything else is a bug
of the server: it is logged there and answered without details. A call costs one round trip once a link stands.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import structlog

from tessera.core import encoding
from tessera.core.errors import Invalid, Late, Misbehaviour, TesseraError, Unavailable, from_dict
from tessera.core.ids import PeerId
from tessera.p2p.transport import PeerRecord, Stream, Transport

__all__ = ["CallHandler", "call", "serve_calls"]

log = structlog.get_logger()

T = TypeVar("T")

CallHandler = Callable[[PeerId, dict[str, Any], bytes], Awaitable[tuple[dict[str, Any], bytes]]]

REQUEST_S = 60.0  # a caller may take this long to send its request
REPLY_S = 60.0  # and this long to take the reply
REASON_S = 1.0  # how long a caller who was cut off waits for the reason
ERROR_LIMIT = 16 * 1024  # bytes of an error; a larger one travels without its fields


async def call(
    transport: Transport,
    peer: PeerRecord,
    protocol: str,
    request: dict[str, Any],
    body: bytes = b"",
    *,
    timeout_s: float,
    reply_limit: int,
    bulk: bool = False,
) -> tuple[dict[str, Any], bytes]:
    """Ask `peer`, and return its reply.

    Args:
        timeout_s: for all of it, the dial included.
        reply_limit: most bytes of the reply, object and body together.
        bulk: let other traffic on the link go first.

    Raises: what the handler raised, with the field `peer`; what `Transport.open` raises; Late; Unavailable when the
    peer is gone (it may or may not have acted); Misbehaviour for a reply that is too large or cannot be read.
    """
    head = encoding.encode(request)
    try:
        with anyio.fail_after(timeout_s):
            stream = await transport.open(peer, protocol, timeout_s=timeout_s, bulk=bulk, confirm=False)
            try:
                return await _exchange(stream, head, body, max(reply_limit, ERROR_LIMIT), reply_limit)
            finally:
                await stream.abort()  # nothing to abort when all went well
    except TimeoutError:
        raise Late(f"{peer.id[:16]}… did not answer {protocol} within {timeout_s:g} s", peer=peer.id) from None


def serve_calls(
    transport: Transport, protocol: str, handler: CallHandler, *, request_limit: int = 1 << 20, max_streams: int = 64
) -> None:
    """Answer calls to `protocol` with `handler(peer, request, body) -> (reply, body)`.

    Args:
        request_limit: most bytes of a request, object and body together; a larger one is answered with `Invalid`.
        max_streams: calls at once from one peer; see `Transport.serve`.
    """

    async def serve_one(stream: Stream) -> None:
        try:
            request, body = await _read_request(stream, request_limit)
            reply, reply_body = await handler(stream.peer, request, body)
            head = encoding.encode({"reply": reply})
        except TesseraError as error:
            log.debug("call_refused", protocol=protocol, peer_id=stream.peer, code=error.code, reason=error.message)
            head, reply_body = _error_head(error), b""
        except Exception:
            log.exception("call_handler_broke", protocol=protocol, peer_id=stream.peer)
            head, reply_body = _error_head(TesseraError("the peer failed to answer: its log says why")), b""
        await _within(REPLY_S, _send(stream, head, reply_body), "take the reply", stream.peer)

    transport.serve(protocol, serve_one, max_streams=max_streams)


async def _exchange(
    stream: Stream, head: bytes, body: bytes, head_limit: int, reply_limit: int
) -> tuple[dict[str, Any], bytes]:
    try:
        await _send(stream, head, body)
    except Unavailable:
        with anyio.move_on_after(REASON_S):  # a server that has seen enough stops listening, and says why
            return await _read_reply(stream, head_limit, reply_limit)
        raise
    return await _read_reply(stream, head_limit, reply_limit)


async def _send(stream: Stream, head: bytes, body: bytes) -> None:
    await stream.send(head, last=not body)
    if body:
        await stream.send(body, last=True)


async def _read_reply(stream: Stream, head_limit: int, reply_limit: int) -> tuple[dict[str, Any], bytes]:
    head = await stream.recv(head_limit)
    answer = _object(stream.peer, head, head_limit, "reply")
    if answer.keys() == {"error"}:
        error = from_dict(answer["error"])
        error.fields["peer"] = stream.peer
        raise error
    if answer.keys() != {"reply"} or type(answer["reply"]) is not dict:
        raise _misbehaves(stream.peer, "a reply holds an object or an error", head)
    if len(head) > reply_limit:
        raise _misbehaves(stream.peer, f"a reply of {len(head)} bytes, at most {reply_limit} expected", head)
    return answer["reply"], await stream.recv(reply_limit - len(head))


async def _read_request(stream: Stream, limit: int) -> tuple[dict[str, Any], bytes]:
    async def read() -> tuple[dict[str, Any], bytes]:
        head = await stream.recv(limit)
        return _object(stream.peer, head, limit, "request"), await stream.recv(limit - len(head))

    try:
        return await _within(REQUEST_S, read(), "send its request", stream.peer)
    except Misbehaviour as error:  # for the caller, this is what was wrong with its request
        raise Invalid(f"the request is refused: {error.message}") from error


async def _within(seconds: float, action: Awaitable[T], what: str, peer: PeerId) -> T:
    try:
        with anyio.fail_after(seconds):
            return await action
    except TimeoutError:
        raise Late(f"{peer[:16]}… did not {what} within {seconds:g} s", peer=peer) from None


def _object(peer: PeerId, data: bytes, limit: int, what: str) -> dict[str, Any]:
    try:
        value = encoding.decode(data, limit)
    except Invalid as error:
        raise _misbehaves(peer, f"a {what} that cannot be read: {error}", data) from error
    if type(value) is not dict:
        raise _misbehaves(peer, f"a {what} is an object, not {type(value).__name__}", data)
    return value


def _misbehaves(peer: PeerId, what: str, data: bytes) -> Misbehaviour:
    return Misbehaviour(f"{peer[:16]}…: {what}", evidence={"peer": peer, "fault": what, "head": data[:64].hex()})


def _error_head(error: TesseraError) -> bytes:
    """An error for the wire; one whose fields cannot travel goes without them."""
    try:
        head = encoding.encode({"error": error.to_dict()})
        if len(head) <= ERROR_LIMIT:
            return head
    except Invalid:
        log.debug("error_fields_dropped", code=error.code)
    return encoding.encode({"error": {"code": error.code, "fields": {}, "message": _clean(error.message)}})


def _clean(message: str) -> str:
    return message[:2000].encode(errors="replace").decode()
