"""Request bodies in, event streams out, and the client that goes away in between.

Invariants: a body is never held beyond its limit; work for a client that left is cancelled; what a stream holds is
freed however the stream ends, also when the client only stops reading.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import TypeVar

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tessera.serving.envelope import SlowBody, TooLarge

__all__ = ["ClientGone", "EventStream", "read_body", "unless_gone"]

CLOSE_TIMEOUT_S = 5.0
T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


async def read_body(request: Request, *, limit: int, timeout_s: float) -> bytes:
    """The whole body. Raises: TooLarge over `limit` bytes, SlowBody after `timeout_s`, ClientGone."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise TooLarge(f"a body of {announced[:20]} bytes, at most {limit} expected")
    body = bytearray()
    try:
        with anyio.fail_after(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise TooLarge(f"a body of more than {limit} bytes")
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """`work()`, cancelled when the client leaves. The body must be read already. Raises: ClientGone."""
    result: list[T] = []
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_when_gone, receive, group.cancel_scope)
            result.append(await work())
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:  # the group wraps what `work` raised; callers want the error itself
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None
        raise
    if not result:
        raise ClientGone
    return result[0]


class EventStream(Response):
    """An ASGI response of server-sent events.

    Args:
        events: the chunks; closed in any case.
        held: what to free afterwards, in any case.
        timeout_s: the longest the stream may take, a slow reader included.
        undelivered: told when the client left before a single event went out.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: AsyncExitStack,
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        undelivered: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(status_code=200)
        self._undelivered = undelivered
        self._delivered = 0  # events that the server took
        self._events = events
        self._held = held
        self._timeout_s = timeout_s
        fixed = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        self.raw_headers = [(k.lower().encode(), v.encode()) for k, v in (fixed | dict(headers)).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._timeout_s):
                await unless_gone(receive, lambda: self._send(send))
        except (ClientGone, OSError):
            return
        finally:
            if not self._delivered and self._undelivered is not None:
                self._undelivered()
            with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await self._held.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events):
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._delivered += 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
