"""The chain's JSON-RPC over HTTP, as a plain ASGI application: run it with any server.

POST / answers a request or a batch; OPTIONS / answers a browser's preflight. Bodies, batches and the rate of requests
from one address are limited; the chain works in a thread, so that the event loop goes on.

Any page may ask by default, as at other nodes: there is nothing to steal. No account is unlocked, so that a page can
send only what its user's wallet has signed; no cookie or password is ever read, so that a page's word counts no more
than a stranger's; and what it can read, every member of the run can read too. A `dev` chain is another matter: there
any caller can turn time forward and blocks back, so give it `origins`, or keep it from pages.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

import anyio
import anyio.to_thread

from tessera.chain.jsonrpc import BODY_LIMIT, LIMIT_EXCEEDED, RpcFault, answer, error_text
from tessera.chain.local import LocalChain
from tessera.chain.rates import RateConfig, RateLimit

__all__ = ["rpc_app"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

THREADS = 4
BODY_TIMEOUT_S = 30.0
PREFLIGHT = [
    (b"access-control-allow-methods", b"POST, OPTIONS"),
    (b"access-control-allow-headers", b"content-type"),
    (b"access-control-max-age", b"86400"),
]
PLAIN = b"text/plain"


def rpc_app(
    chain: LocalChain,
    *,
    body_limit: int = BODY_LIMIT,
    origins: Collection[str] | None = None,
    rate: RateConfig | None = None,
) -> App:
    """An ASGI app that serves `chain` at the path where it is mounted.

    Args:
        origins: pages that may ask, such as "https://wallet.example"; None means any. Others get 403. This holds for
            browsers only: whatever is no browser can claim any origin, and needs none.
        rate: what one address may ask; an address that asks more gets error -32005, and 429 for a whole body.
    """
    limiter = anyio.CapacityLimiter(THREADS)
    limit = RateLimit(rate or RateConfig())
    allowed = None if origins is None else frozenset(origin.encode() for origin in origins)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"JSON-RPC goes over http, not {scope['type']}")
        headers = dict(scope.get("headers", ()))
        cors = _cors(headers.get(b"origin"), allowed)
        client = str((scope.get("client") or ("",))[0])
        if cors is None:
            await _reply(send, 403, b"pages of this origin may not ask here", [], PLAIN)
        elif scope["method"] == "OPTIONS":
            await _reply(send, 204, b"", cors + PREFLIGHT)
        elif scope["method"] != "POST":
            await _reply(send, 405, b"JSON-RPC: use POST", cors, PLAIN)
        elif not _is_json(headers.get(b"content-type", b"")):
            await _reply(send, 415, b"JSON-RPC: use content-type application/json", cors, PLAIN)
        elif (wait := limit.wait_s(client)) > 0:
            after = [(b"retry-after", str(int(wait) + 1).encode())]
            await _reply(send, 429, error_text(_too_fast(wait)), cors + after)
        elif (body := await _body(receive, body_limit)) is None:
            await _reply(send, 413, f"at most {body_limit} bytes".encode(), cors, PLAIN)
        else:
            call = _Counted(chain.methods.call, limit, client)
            reply = await anyio.to_thread.run_sync(answer, call, body, body_limit, limiter=limiter)
            await _reply(send, 200 if reply else 204, reply, cors)

    return app


class _Counted:
    """The calls of one body. The first was counted when the body came."""

    def __init__(self, call: Callable[[str, list[Any]], Any], limit: RateLimit, client: str) -> None:
        self._call, self._limit, self._client = call, limit, client
        self._first = True

    def __call__(self, method: str, params: list[Any]) -> Any:
        if not self._first and (wait := self._limit.wait_s(self._client)) > 0:
            raise _too_fast(wait)
        self._first = False
        return self._call(method, params)


def _too_fast(wait_s: float) -> RpcFault:
    return RpcFault(LIMIT_EXCEEDED, f"too many requests from this address: ask again in {wait_s:.2f} s")


def _cors(origin: bytes | None, allowed: frozenset[bytes] | None) -> Headers | None:
    """What lets the page read the answer; None for a page that may not ask."""
    if allowed is None:
        return [(b"access-control-allow-origin", b"*")]
    if origin is None:  # no page
        return []
    if origin not in allowed:
        return None
    return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]


def _is_json(content_type: bytes) -> bool:
    """Other types are what a page can send without a preflight: forms, and text."""
    return content_type.partition(b";")[0].strip().lower() == b"application/json"


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


async def _reply(send: Send, status: int, body: bytes, extra: Headers, kind: bytes = b"application/json") -> None:
    headers = [*extra, (b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return
