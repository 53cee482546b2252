"""The page on a FastAPI app: HTML, JSON, live updates, and a small page behind each number.

Everything here only reads. Invariants: no script or style runs that does not come from our own files; nothing is
loaded from another host; text from peers is text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from tessera.core.errors import TesseraError
from tessera.devnet.snapshot import Feed
from tessera.web.proofs import Kind, Lookup, bounded, checked_id, proof
from tessera.web.render import STATIC, Renderer
from tessera.web.stream import Readers, Updates

__all__ = ["SECURITY_HEADERS", "OwnFiles", "html_answer", "mount"]

log = structlog.get_logger()

SECURITY_HEADERS: Mapping[str, str] = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_TITLES: dict[Kind, str] = {"tx": "Transaction", "account": "Account", "epoch": "Epoch", "peer": "Peer"}


def mount(app: FastAPI, feed: Feed, lookup: Lookup | None = None) -> None:
    """Add the page to `app`.

    `GET /` the page · `/api/state` the newest snapshot as JSON · `/api/events` its changes · `/tx/{hash}`,
    `/account/{address}`, `/epoch/{number}` and `/peer/{id}` what proves a number · `/static/…` our files.

    Args:
        feed: what to show.
        lookup: what the chain says about an id; see `proofs.Lookup`. None: only what the snapshot knows is shown.
    """
    site = _Site(feed, lookup)
    router = APIRouter(include_in_schema=False)
    for path, answer in (("/", site.page), ("/api/state", site.state)):
        router.add_api_route(path, answer, methods=["GET", "HEAD"], response_class=Response, response_model=None)
    router.add_api_route("/api/events", site.events, methods=["GET"], response_model=None)
    for kind in _TITLES:
        detail = _with_name(partial(site.detail, kind))
        router.add_api_route(f"/{kind}/{{name}}", detail, methods=["GET", "HEAD"], response_model=None)
    app.include_router(router)
    app.mount("/static", OwnFiles(directory=STATIC), name="static")


class _Site:
    def __init__(self, feed: Feed, lookup: Lookup | None) -> None:
        self._feed = feed
        self._lookup = None if lookup is None else bounded(lookup)
        self._renderer = Renderer()
        self._readers = Readers()

    async def page(self) -> Response:
        return html_answer(self._renderer.page(self._feed.snapshot()))

    async def state(self) -> Response:
        return JSONResponse(self._feed.snapshot().to_dict(), headers={**SECURITY_HEADERS, "cache-control": "no-store"})

    async def events(self) -> Response:
        try:
            return Updates(self._feed, self._renderer, self._readers, SECURITY_HEADERS)
        except TesseraError as error:
            return JSONResponse(
                {"error": error.to_dict()}, error.status, headers={**SECURITY_HEADERS, "retry-after": "30"}
            )

    async def detail(self, kind: Kind, name: str) -> Response:
        title = _TITLES[kind]
        try:
            name = checked_id(kind, name)
            groups = await proof(self._feed.snapshot(), self._lookup, kind, name)
        except TesseraError as error:
            log.info("page_refused", kind=kind, code=error.code)
            return html_answer(self._renderer.detail(title=title, lead=error.message, groups=()), error.status)
        return html_answer(self._renderer.detail(title=title, lead=name, groups=groups))


class OwnFiles(StaticFiles):
    """Our files; their URL changes with their content, so browsers keep them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        for name, value in SECURITY_HEADERS.items():
            response.headers[name] = value
        versioned = b"v=" in scope.get("query_string", b"")
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if versioned else "no-cache"
        return response


def html_answer(text: str, status: int = 200) -> Response:
    return HTMLResponse(text, status, headers={**SECURITY_HEADERS, "cache-control": "no-store"})


def _with_name(answer: Callable[[str], Awaitable[Response]]) -> Callable[[str], Awaitable[Response]]:
    """A handler with one path parameter: FastAPI would take a partial's other arguments for parameters too."""

    async def handler(name: str) -> Response:
        return await answer(name)

    return handler
