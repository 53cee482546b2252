"""The studio's page: every job with its proofs, the film when it is there, and text of agents as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tessera.devnet.studio.studio import View
from tessera.web.studio import mount_studio

pytestmark = pytest.mark.anyio
TX, ACCOUNT = "0x" + "ab" * 32, "0x53a2Cb2C7C845D62B1019501B34F70cF89767B8d"
JOB = {
    "id": 1, "title": "<b>Narration</b>", "client": "editor", "provider": "narrator", "evaluator": "referee",
    "phase": "rejected", "price": 2_000_000, "paid": 0, "refunded": 2_000_000, "deliverable": "",
    "proofs": {"funded": TX, "refunded": TX},
}  # fmt: skip
AGENT = {"role": "editor", "account": ACCOUNT, "balance": 5, "change": -300_000, "earned": 0, "funded": 300_000,
         "refunded": 0, "votes": 1, "stars": 5.0, "mandate": "", "cap": 9_000_000, "counted": 300_000}  # fmt: skip


class Shown:
    def __init__(self, film: Path) -> None:
        self.view, self.film = View(), film

    async def lookup(self, kind: str, name: str) -> dict[str, Any] | None:
        return {"block": 7} if name == TX else None

    def client(self) -> httpx.AsyncClient:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        mount_studio(app, lambda: self.view, self.film, self.lookup)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://studio")


async def test_each_job_payment_and_refund_is_on_the_page_with_its_proof(tmp_path: Path) -> None:
    shown = Shown(tmp_path / "film.mp4")
    shown.view = View(phase="working", jobs=(JOB,), agents=(AGENT,), held=300_000)
    async with shown.client() as client:
        page = (await client.get("/")).text
        assert "&lt;b&gt;Narration&lt;/b&gt;" in page
        assert "<b>Narration" not in page
        assert f'href="/tx/{TX}"' in page
        assert f'href="/account/{ACCOUNT}"' in page
        assert "every unit is accounted for" in page
        assert "2 tUSD" in page
        assert "It is being made." in page
        state = (await client.get("/api/state")).json()
        assert (state["jobs"], state["adds_up"]) == ([JOB], True)
        shown.view = View(jobs=(JOB,), agents=(AGENT,), held=299_999)
        assert "the sums differ" in (await client.get("/")).text


async def test_what_did_not_change_is_not_sent_again(tmp_path: Path) -> None:
    shown = Shown(tmp_path / "film.mp4")
    async with shown.client() as client:
        assert (await client.get("/live")).status_code == 200
        assert (await client.get("/live?seen=0")).status_code == 204
        shown.view = View(note="something happened")
        assert "something happened" in (await client.get("/live?seen=0")).text
        assert (await client.get("/live?seen=one")).status_code == 422


async def test_the_film_is_played_when_it_is_there(tmp_path: Path) -> None:
    shown = Shown(tmp_path / "film.mp4")
    async with shown.client() as client:
        assert (await client.get("/recap.mp4")).status_code == 404
        assert (await client.get("/film")).status_code == 200
        shown.film.write_bytes(bytes(range(100)))
        shown.view = View(film={"file": "x", "bytes": 100, "seconds": 57.7, "job": 1})
        player = await client.get("/film")
        assert (player.status_code, "<video" in player.text) == (286, True)  # and htmx asks no more
        part = await client.get("/recap.mp4", headers={"range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
        assert "media-src 'self'" in part.headers["content-security-policy"]


async def test_proofs_are_looked_up_and_nonsense_is_refused(tmp_path: Path) -> None:
    async with Shown(tmp_path / "film.mp4").client() as client:
        assert "block" in (await client.get(f"/tx/{TX}")).text
        assert (await client.get("/tx/nonsense")).status_code == 400
        assert (await client.get("/tx/0x" + "00" * 32)).status_code == 404
