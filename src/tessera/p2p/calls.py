"""Request and reply: one stream, and one message each way that holds a canonical JSON object and a raw body.

    message = length of the object, 4 bytes big-endian ‖ object ‖ body
    caller:  request object, body
    server:  {"reply": object}, body   or   {"error": {"code", "fields", "message"}}

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

__all__ = ["ERROR_LIMIT", "CallHandler", "call", "error_head", "serve_calls"]

log = structlog.get_logger()

T = TypeVar("T")

CallHandler = Callable[[PeerId, dict[str, Any], bytes], Awaitable[tuple[dict[str, Any], bytes]]]

REQUEST_S = 60.0  # a caller may take this long to send its request
REPLY_S = 60.0  # and this long to take the reply
LENGTH_BYTES = 4
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
    message = _join(encoding.encode(request), body)
    try:
        with anyio.fail_after(timeout_s):
            stream = await transport.open(peer, protocol, timeout_s=timeout_s, bulk=bulk, confirm=False)
            try:
                return await _exchange(stream, message, reply_limit)
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
            head, reply_body = error_head(error), b""
        except Exception:
            log.exception("call_handler_broke", protocol=protocol, peer_id=stream.peer)
            head, reply_body = error_head(TesseraError("the peer failed to answer: its log says why")), b""
        await _within(REPLY_S, stream.send(_join(head, reply_body), last=True), "take the reply", stream.peer)

    transport.serve(protocol, serve_one, max_streams=max_streams)


async def _exchange(stream: Stream, message: bytes, reply_limit: int) -> tuple[dict[str, Any], bytes]:
    try:
        await stream.send(message, last=True)
    except Unavailable:
        with anyio.move_on_after(REASON_S):  # a server that has seen enough stops listening, and says why
            return await _read_reply(stream, reply_limit)
        raise
    return await _read_reply(stream, reply_limit)


async def _read_reply(stream: Stream, limit: int) -> tuple[dict[str, Any], bytes]:
    message = await stream.recv(LENGTH_BYTES + max(limit, ERROR_LIMIT))
    answer, body = _split(stream.peer, message, "reply")
    if answer.keys() == {"error"}:
        error = from_dict(answer["error"])
        error.fields["peer"] = stream.peer
        raise error
    if answer.keys() != {"reply"} or type(answer["reply"]) is not dict:
        raise _misbehaves(stream.peer, "a reply holds an object or an error", message)
    if len(message) > LENGTH_BYTES + limit:
        raise _misbehaves(stream.peer, f"a reply of {len(message)} bytes, at most {limit} expected", message)
    return answer["reply"], body


async def _read_request(stream: Stream, limit: int) -> tuple[dict[str, Any], bytes]:
    try:
        receive = stream.recv(LENGTH_BYTES + limit)
        return _split(stream.peer, await _within(REQUEST_S, receive, "send its request", stream.peer), "request")
    except Misbehaviour as error:  # for the caller, this is what was wrong with its request
        raise Invalid(f"the request is refused: {error.message}") from error


async def _within(seconds: float, action: Awaitable[T], what: str, peer: PeerId) -> T:
    try:
        with anyio.fail_after(seconds):
            return await action
    except TimeoutError:
        raise Late(f"{peer[:16]}… did not {what} within {seconds:g} s", peer=peer) from None


def _join(head: bytes, body: bytes) -> bytes:
    return b"".join((len(head).to_bytes(LENGTH_BYTES, "big"), head, body))


def _split(peer: PeerId, message: bytes, what: str) -> tuple[dict[str, Any], bytes]:
    end = LENGTH_BYTES + int.from_bytes(message[:LENGTH_BYTES], "big")
    if len(message) < LENGTH_BYTES or end > len(message):
        raise _misbehaves(peer, f"a {what} whose object is longer than itself", message)
    try:
        value = encoding.decode(message[LENGTH_BYTES:end], end)
    except Invalid as error:
        raise _misbehaves(peer, f"a {what} that cannot be read: {error}", message) from error
    if type(value) is not dict:
        raise _misbehaves(peer, f"a {what} is an object, not {type(value).__name__}", message)
    return value, message[end:]


def _misbehaves(peer: PeerId, what: str, data: bytes) -> Misbehaviour:
    return Misbehaviour(f"{peer[:16]}…: {what}", evidence={"peer": peer, "fault": what, "head": data[:64].hex()})


def error_head(error: TesseraError) -> bytes:
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
