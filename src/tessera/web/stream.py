"""Server-sent events: sections of the page that changed, and the points that the chart lacks.

Invariants: a reader gets everything once when it connects, then only what changed; a slow one skips to the newest and
one that stops reading is dropped; at most `MAX_READERS` at a time.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager

import anyio
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tessera.core.errors import Unavailable
from tessera.devnet.snapshot import Feed, LossPoint, Snapshot, thinned
from tessera.web.render import Renderer

__all__ = ["ChartDelta", "Readers", "Updates"]

log = structlog.get_logger()

MAX_READERS = 64
INTERVAL_S = 0.25  # a reader gets at most four updates a second
PING_S = 15.0  # silence that proxies and browsers bear
SEND_S = 20.0  # a reader that takes longer for one update has left
CHART_POINTS = 1_024
RETRY_MS = 2_000


class Readers:
    """Counts who is connected."""

    def __init__(self, limit: int = MAX_READERS) -> None:
        self._limit = limit
        self.count = 0

    def check(self) -> None:
        """Raises: Unavailable when all places are taken."""
        if self.count >= self._limit:
            raise Unavailable(f"all {self._limit} live connections are taken: reload later", retry_after_s=30)

    @contextmanager
    def place(self) -> Iterator[None]:
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class ChartDelta:
    """What one reader's chart lacks: points from the first one that differs from what it has."""

    def __init__(self) -> None:
        self._sent: Sequence[LossPoint] = ()
        self._across: tuple[object, ...] | None = None

    def update(self, snapshot: Snapshot) -> str | None:
        """JSON for the chart; None when it has everything."""
        points = thinned(snapshot.losses, CHART_POINTS)
        across = (snapshot.unigram_loss, snapshot.bigram_loss, snapshot.steps)
        start = _common(self._sent, points)
        if across == self._across and start == len(points) == len(self._sent):
            return None
        self._sent, self._across = points, across
        fresh = [[point.step, point.train, point.val] for point in points[start:]]
        return json.dumps(
            {"from": start, "points": fresh, "unigram": across[0], "bigram": across[1], "steps": across[2]},
            separators=(",", ":"),
        )


class Updates(Response):
    """The stream for one reader, who holds a place among `readers` while it lasts. Raises: Unavailable when full."""

    def __init__(self, feed: Feed, renderer: Renderer, readers: Readers, headers: Mapping[str, str]) -> None:
        readers.check()
        super().__init__(status_code=200, headers=dict(headers), media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"
        self._feed, self._renderer, self._readers = feed, renderer, readers
        self._turn = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._readers.place():
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._leave_with, receive, tasks.cancel_scope)
                tasks.start_soon(self._ping, send, tasks.cancel_scope)
                await self._pump(send, tasks.cancel_scope)
                await self._send(send, b"", tasks.cancel_scope, more=False)
                tasks.cancel_scope.cancel()

    async def _pump(self, send: Send, scope: anyio.CancelScope) -> None:
        async with aclosing(_updates(self._feed, self._renderer)) as updates:
            async for chunk in updates:
                await self._send(send, chunk, scope)

    async def _ping(self, send: Send, scope: anyio.CancelScope) -> None:
        while True:
            await anyio.sleep(PING_S)
            await self._send(send, b": still here\n\n", scope)

    async def _send(self, send: Send, chunk: bytes, scope: anyio.CancelScope, *, more: bool = True) -> None:
        with anyio.move_on_after(SEND_S) as deadline:
            async with self._turn:
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        if deadline.cancelled_caught:
            log.info("page_reader_dropped", seconds=SEND_S)
            scope.cancel()

    async def _leave_with(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


async def _updates(feed: Feed, renderer: Renderer) -> AsyncGenerator[bytes, None]:
    sent: dict[str, str] = {}
    chart = ChartDelta()
    yield f"retry: {RETRY_MS}\n\n".encode()
    async with aclosing(feed.changes()) as changes:
        async for snapshot in changes:
            fragments = renderer.fragments(snapshot)
            chunk = b"".join(_event(name, html) for name, html in fragments.items() if sent.get(name) != html)
            sent = dict(fragments)
            if (points := chart.update(snapshot)) is not None:
                chunk += _event("chart", points)
            if chunk:
                yield chunk
            await anyio.sleep(INTERVAL_S)


def _event(name: str, data: str) -> bytes:
    """One event. A line end of any kind within `data` starts a new data line: nothing in it can end the event."""
    lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join([f"event: {name}\n", *(f"data: {line}\n" for line in lines), "\n"]).encode()


def _common(before: Sequence[LossPoint], now: Sequence[LossPoint]) -> int:
    """How many points at the start are the same."""
    if len(before) <= len(now) and tuple(now[: len(before)]) == tuple(before):
        return len(before)
    pairs = zip(before, now, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(now)))
