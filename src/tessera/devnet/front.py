"""The front door: the page from the first second on, and the gateway behind `/v1` once there is a model to ask."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tessera.core.errors import Unavailable

__all__ = ["Front"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

GATEWAY_PATHS = ("/v1", "/healthz", "/metrics")


class Front:
    """An ASGI app of two: `page`, and `gateway` as soon as it is set."""

    def __init__(self, page: Asgi) -> None:
        self._page = page
        self.gateway: Asgi | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not path.startswith(GATEWAY_PATHS):
            await self._page(scope, receive, send)
        elif self.gateway is not None:
            await self.gateway(scope, receive, send)
        else:
            await _not_yet(send)


async def _not_yet(send: Send) -> None:
    error = Unavailable("the model is still in training: watch the page, then ask again", retry_after_s=30)
    envelope = {"error": {"message": error.message, "type": "server_error", "param": None, "code": error.code}}
    body = json.dumps(envelope).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"30")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
