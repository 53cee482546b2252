"""The chain's JSON-RPC over HTTP, as a plain ASGI application: run it with any server.

POST / answers a request or a batch; OPTIONS / tells browsers that any page may ask (there is nothing to steal: no
account is unlocked). Bodies are limited; the chain works in a thread, so that the event loop goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
import anyio.to_thread

from tessera.chain.jsonrpc import BODY_LIMIT
from tessera.chain.local import LocalChain

__all__ = ["rpc_app"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

THREADS = 4
BODY_TIMEOUT_S = 30.0
CORS = [
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"POST, OPTIONS"),
    (b"access-control-allow-headers", b"content-type"),
    (b"access-control-max-age", b"86400"),
]


def rpc_app(chain: LocalChain, *, body_limit: int = BODY_LIMIT) -> App:
    """An ASGI app that serves `chain` at the path where it is mounted."""
    limiter = anyio.CapacityLimiter(THREADS)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http":
            raise ValueError(f"JSON-RPC goes over http, not {scope['type']}")
        elif scope["method"] == "OPTIONS":
            await _reply(send, 204, b"")
        elif scope["method"] != "POST":
            await _reply(send, 405, b"JSON-RPC: use POST", b"text/plain")
        else:
            body = await _body(receive, body_limit)
            if body is None:
                await _reply(send, 413, f"at most {body_limit} bytes".encode(), b"text/plain")
                return
            reply = await anyio.to_thread.run_sync(chain.handle, body, body_limit, limiter=limiter)
            await _reply(send, 200 if reply else 204, reply)

    return app


async def _body(receive: Receive, limit: int) -> bytes | None:
    """None when it is too long, or does not come to its end."""
    body = bytearray()
    with anyio.move_on_after(BODY_TIMEOUT_S):
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            body += event.get("body", b"")
            if len(body) > limit:
                return None
            if not event.get("more_body", False):
                return bytes(body)
    return None


async def _reply(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers = [*CORS, (b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return
