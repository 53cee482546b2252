"""The HTTP side of a relay: one request on each connection, which either becomes a WebSocket or gets a short answer.

Parsing and the upgrade are the `websockets` library's; which requests are let in is decided here. Tokens are compared
in constant time, all of them, whichever fits.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from tessera.core.errors import Invalid
from tessera.p2p.relay.frames import SUBPROTOCOLS

__all__ = ["Door", "Entry", "Tokens"]

REQUEST_LIMIT = 16 * 1024  # bytes, headers and all
_CHALLENGE = re.compile(r"[A-Za-z0-9._-]{1,63}")
_SILENT = logging.Logger("relay", logging.CRITICAL)  # what strangers send is no news; we log what we decide


class Tokens:
    """The tokens that open a relay; none at all means that it is open to everybody."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def admit(self, header: str) -> bool:
        """Whether an `Authorization` header carries one of them."""
        offered = header.removeprefix("Bearer ").encode("utf-8", "surrogateescape")
        fits = [hmac.compare_digest(offered, token) for token in self._tokens]  # no short cut
        return any(fits) or not fits


@dataclass(frozen=True, slots=True)
class Entry:
    """What to send back, whether the connection is a WebSocket from then on, and of which version of the protocol."""

    reply: bytes
    open: bool = False
    version: int = 0
    reason: str = ""


class Door:
    """Reads one request. `feed` until it gives an `Entry`.

    Args:
        facts: what `/tessera` tells about this relay.
        room: why nobody can be let in at present, or "".
    """

    def __init__(self, tokens: Tokens, facts: Callable[[], dict[str, Any]], room: Callable[[], str]) -> None:
        self._tokens, self._facts, self._room = tokens, facts, room
        self._protocol = ServerProtocol(
            subprotocols=[Subprotocol(name) for name in SUBPROTOCOLS], max_size=None, logger=_SILENT
        )
        self._read = 0

    def feed(self, data: bytes) -> Entry | None:
        """None while the request is not complete. Raises: Invalid for what is no HTTP request, or an endless one."""
        self._read += len(data)
        if self._read > REQUEST_LIMIT:
            raise Invalid(f"a request of more than {REQUEST_LIMIT} bytes")
        self._protocol.receive_data(data)
        events = self._protocol.events_received()
        if self._protocol.handshake_exc is not None:
            raise Invalid(f"no HTTP request: {self._protocol.handshake_exc}"[:200])
        return self._answer(cast(Request, events[0])) if events else None

    def _answer(self, request: Request) -> Entry:
        path = request.path.partition("?")[0]
        if path == "/relay":
            return self._enter(request)
        if path == "/ping":
            return self._say(HTTPStatus.OK, "")
        if path == "/generate_204":
            return self._no_content(request)
        if path == "/tessera":
            return self._say(HTTPStatus.OK, json.dumps(self._facts()), "application/json")
        return self._say(HTTPStatus.NOT_FOUND, "This is a relay: /relay, /ping, /generate_204, /tessera\n")

    def _enter(self, request: Request) -> Entry:
        if not self._tokens.admit(request.headers.get("Authorization", "")):
            return self._say(HTTPStatus.UNAUTHORIZED, "This relay asks for a token.\n", reason="wrong_token")
        if full := self._room():
            return self._say(HTTPStatus.SERVICE_UNAVAILABLE, f"{full}\n", reason="full")
        response = self._protocol.accept(request)
        self._protocol.send_response(response)
        reply = b"".join(self._protocol.data_to_send())
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            return Entry(reply, reason="no_upgrade")
        chosen = self._protocol.subprotocol
        return Entry(reply, open=True, version=2 if chosen == SUBPROTOCOLS[0] else 1)

    def _no_content(self, request: Request) -> Entry:
        challenge = request.headers.get("X-Iroh-Challenge", "")
        extra = {"X-Iroh-Response": f"response {challenge}"} if _CHALLENGE.fullmatch(challenge) else {}
        return self._say(HTTPStatus.NO_CONTENT, "", extra=extra)

    def _say(
        self, status: HTTPStatus, text: str, kind: str = "text/plain", *, reason: str = "",
        extra: dict[str, str] | None = None,
    ) -> Entry:  # fmt: skip
        body = text.encode()
        headers = Headers({"Connection": "close", "Access-Control-Allow-Origin": "*", **(extra or {})})
        if status is not HTTPStatus.NO_CONTENT:
            headers["Content-Length"] = str(len(body))
            headers["Content-Type"] = kind
        return Entry(Response(status.value, status.phrase, headers, body).serialize(), reason=reason)
