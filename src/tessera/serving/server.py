"""An HTTP server that strangers may talk to: uvicorn with bounds on what it waits for and what it holds.

uvicorn alone waits for ever for a request's head. Here a connection that has not sent a whole head in time is closed,
whether it sends nothing, or a byte now and then. The size of a head and the number of connections are bounded too; the
body's size and time are the app's to bound, since it answers them in the envelope.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ServerLimits", "server_config"]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one connection may take, and how many there may be."""

    head_bytes: int = 32 << 10  # request line and headers together
    head_timeout_s: float = 10.0  # for a whole head, from the connection or the answer before
    keep_alive_s: float = 30.0  # between two requests
    max_connections: int = 2_000  # more get a plain 503


def server_config(app: Any, limits: ServerLimits | None = None, **settings: Any) -> uvicorn.Config:
    """A uvicorn config for `app`; `settings` are uvicorn's own, and win."""
    limits = limits or ServerLimits()
    protocol = type("Bounded", (_HeadDeadline,), {"head_timeout_s": limits.head_timeout_s})
    bounds: dict[str, Any] = {
        "http": protocol,
        "h11_max_incomplete_event_size": limits.head_bytes,
        "timeout_keep_alive": max(1, round(limits.keep_alive_s)),
        "limit_concurrency": limits.max_connections,
        "server_header": False,
        "access_log": False,  # it would hold every caller's address
        "lifespan": "off",
    }
    return uvicorn.Config(app, **(bounds | settings))


class _HeadDeadline(H11Protocol):
    """Closes a connection whose next request's head is not there in time."""

    head_timeout_s: float
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The timer runs from the first byte that we wait for until the head is whole; more bytes do not renew it."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._hang_up)

    def _stop(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _hang_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()
