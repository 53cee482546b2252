"""The studio's page: its agents, every job with what proves it, and the film.

Only reads. The same rules as `page`'s: our own files alone run, and text of agents is text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response

from tessera.core.errors import TesseraError
from tessera.devnet.snapshot import Income, Snapshot
from tessera.devnet.studio.studio import View
from tessera.web.page import SECURITY_HEADERS, OwnFiles, html_answer
from tessera.web.proofs import Kind, Lookup, bounded, checked_id, proof
from tessera.web.render import STATIC, make_environment

__all__ = ["STUDIO_HEADERS", "mount_studio"]

STUDIO_HEADERS: Mapping[str, str] = {
    **SECURITY_HEADERS,
    "content-security-policy": SECURITY_HEADERS["content-security-policy"] + "; media-src 'self'",
}
STOP_ASKING = 286  # htmx asks no more after it
_TITLES: dict[Kind, str] = {"tx": "Transaction", "account": "Account"}


def mount_studio(app: FastAPI, view: Callable[[], View], film: Path, lookup: Lookup) -> None:
    """Add the page to `app`.

    `GET /` the page · `/live` what changes · `/film` the player · `/recap.mp4` · `/api/state` JSON · `/tx/{hash}` and
    `/account/{address}` what proves a number · `/static/…` our files.
    """
    site = _Site(view, film, bounded(lookup))
    router = APIRouter(include_in_schema=False)
    for path, answer in (
        ("/", site.page),
        ("/film", site.player),
        ("/recap.mp4", site.film),
        ("/api/state", site.state),
    ):
        router.add_api_route(path, answer, methods=["GET", "HEAD"], response_class=Response, response_model=None)
    router.add_api_route("/live", site.live, methods=["GET"], response_model=None)
    router.add_api_route("/tx/{name}", site.transaction, methods=["GET"], response_model=None)
    router.add_api_route("/account/{name}", site.account, methods=["GET"], response_model=None)
    app.include_router(router)
    app.mount("/static", OwnFiles(directory=STATIC), name="static")


class _Site:
    def __init__(self, view: Callable[[], View], film: Path, lookup: Lookup) -> None:
        self._view, self._film, self._lookup = view, film, lookup
        self._jinja = make_environment()
        self._seen: tuple[View, int] = (View(), 0)  # the newest view and its number

    async def page(self) -> Response:
        return _html(self._render("studio.html"))

    async def live(self, seen: int = -1) -> Response:
        """204 while nothing has changed: what a reader has marked or focused stays."""
        return Response(status_code=204) if seen == self._number() else _html(self._render("_studio.html"))

    async def player(self) -> Response:
        ready = bool(self._view().film)
        return _html(self._render("_film.html"), STOP_ASKING if ready else 200)

    async def film(self) -> Response:
        if not self._view().film:
            return JSONResponse({"error": "there is no film yet"}, 404, headers=dict(STUDIO_HEADERS))
        return FileResponse(self._film, media_type="video/mp4", headers={**STUDIO_HEADERS, "cache-control": "no-cache"})

    async def state(self) -> Response:
        return JSONResponse(self._view().to_dict(), headers={**STUDIO_HEADERS, "cache-control": "no-store"})

    async def transaction(self, name: str) -> Response:
        return await self._detail("tx", name)

    async def account(self, name: str) -> Response:
        return await self._detail("account", name)

    async def _detail(self, kind: Kind, name: str) -> Response:
        render = self._jinja.get_template("detail.html").render
        try:
            name = checked_id(kind, name)
            groups = await proof(Snapshot(), self._lookup, kind, name)
        except TesseraError as error:
            return html_answer(render(title=_TITLES[kind], lead=error.message, groups=()), error.status)
        return html_answer(render(title=_TITLES[kind], lead=name, groups=groups))

    def _number(self) -> int:
        view = self._view()
        if view != self._seen[0]:
            self._seen = (view, self._seen[1] + 1)
        return self._seen[1]

    def _render(self, template: str) -> str:
        number, view = self._number(), self._view()
        coin = Income(asset=view.asset, decimals=view.decimals)
        return self._jinja.get_template(template).render(v=view, coin=coin, number=number, jobs=len(view.jobs))


def _html(text: str, status: int = 200) -> HTMLResponse:
    return HTMLResponse(text, status, headers={**STUDIO_HEADERS, "cache-control": "no-store"})
