"""The page over HTTP: what it shows, what it links to, and what it refuses."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import tessera.web
from tessera.core.errors import Unavailable
from tessera.devnet.snapshot import Snapshot, SnapshotFeed
from tessera.web import proofs
from tessera.web.page import SECURITY_HEADERS, mount
from tessera.web.proofs import Lookup
from web_world import account, moment, peer_id, transaction

SERVED = moment(600, phase="serving", payments=4, claimed=True)
VENDOR = Path(tessera.web.__file__).parent / "static" / "vendor"


def client(snapshot: Snapshot = SERVED, lookup: Lookup | None = None) -> TestClient:
    app = FastAPI()
    mount(app, SnapshotFeed(snapshot), lookup)
    return TestClient(app)


def test_the_first_paint_has_every_number_without_a_script() -> None:
    html = client().get("/").text
    numbers = (
        "2.151", "1.469 under bigram", "33.6", "1/30.5 of dense", "2,457,600", "2,457.6000", "11,059.2000",
        "0.039996 tUSD", "0.040000 tUSD", "33.1", "165 MB", "4 requests paid",
    )  # fmt: skip
    for number in numbers:
        assert number in html, number
    assert "def abspath(path" in html


def test_an_empty_run_has_a_page_too() -> None:
    html = client(Snapshot()).get("/").text
    assert "Nobody has taken a seat yet." in html
    assert "No request was paid yet." in html
    assert 'aria-current="step">starting' in html


def test_a_sum_that_is_wrong_is_marked() -> None:
    broken = replace(SERVED, total_shares=1, income=replace(SERVED.income, dust=9))
    html = client(broken).get("/").text
    assert 'data-testid="income-unsound"' in html
    assert 'data-testid="shares-unsound"' in html
    good = client().get("/").text
    assert "unsound" not in good


def test_state_is_the_snapshot() -> None:
    answer = client().get("/api/state")
    assert answer.json() == SnapshotFeed(SERVED).snapshot().to_dict() | {
        name: list(map(_plain, SERVED.to_dict()[name]))
        for name in ("losses", "boundaries", "peers", "owners", "epochs", "payments", "events")
    }
    assert answer.headers["cache-control"] == "no-store"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}


@pytest.mark.parametrize("path", ["/", "/api/state", f"/account/{account(0)}", "/tx/nonsense", "/static/tessera.js"])
def test_every_answer_carries_the_security_headers(path: str) -> None:
    answer = client().get(path)
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == value
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_page_has_no_inline_script_style_or_handler() -> None:
    html = client().get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)", html)
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", html)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', html)


def test_static_files_are_kept_for_ever_under_a_url_that_names_their_content() -> None:
    page = client()
    urls = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.get("/").text)
    assert len(set(urls)) == 7
    for url in urls:
        answer = page.get(url)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert url.endswith("?v=" + hashlib.sha256(answer.content).hexdigest()[:12])
    assert page.get("/static/tessera.js").headers["cache-control"] == "no-cache"
    assert page.get("/static/../page.py").status_code == 404


def test_vendored_files_are_the_ones_that_are_written_down() -> None:
    listed = dict(re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})` \|$", (VENDOR / "VENDORED.md").read_text(), re.M))
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.iterdir()
        if path.suffix in (".js", ".css")
    }
    assert listed == found
    for licence in ("htmx", "htmx-ext-sse", "uPlot"):
        assert (VENDOR / f"{licence}.LICENSE").stat().st_size > 300


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        (f"/tx/{transaction(2)}", ["Epoch 2", "2,764.8", "0x" + "03" * 32, peer_id(3)]),
        (f"/tx/{transaction(101)}", ["A request paid", account(30), "0.01 tUSD"]),
        (f"/tx/{transaction(41)}", ["Income paid out", account(1), "0.008888 tUSD"]),
        (f"/account/{account(1)}", ["stage", "22.22 %", "2,457.600000000000000000", peer_id(1), transaction(41)]),
        (f"/account/{account(99)}", ["The share contract of this run", "0.04 tUSD", "0.000002 tUSD"]),
        (f"/account/{account(30)}", ["Recent payments for requests", transaction(103)]),
        (f"/account/{account(21)}", ["creator", "5.55 %"]),
        (f"/peer/{peer_id(2)}", ["Epochs it signed", transaction(3), "2,457,600", account(2)]),
        ("/epoch/1", ["Epoch 1", transaction(1)]),
    ],
)
def test_every_id_has_a_page_that_says_what_it_proves(path: str, facts: list[str]) -> None:
    answer = client().get(path)
    assert answer.status_code == 200
    for fact in facts:
        assert fact in answer.text, fact


def test_every_link_on_the_page_leads_somewhere() -> None:
    page = client()
    links = set(re.findall(r'href="(/(?:tx|account|peer|epoch)/[^"]+)"', page.get("/").text))
    assert len(links) > 20
    for link in links:
        assert page.get(link).status_code == 200, link


def test_the_chain_is_asked_and_its_answer_is_shown() -> None:
    asked = []

    async def lookup(kind: str, name: str) -> Mapping[str, Any] | None:
        asked.append((kind, name))
        return {
            "block": 12,
            "transaction": transaction(7),
            "succeeded": True,
            "note": "<i>",
            "moved": [{"to": account(4), "amount": "3 tUSD"}],
            "gas": {"used": 21_000},
        }

    html = client(lookup=lookup).get(f"/account/{account(50).lower()}").text
    assert asked == [("account", account(50))]
    links = (f'href="/account/{account(4)}"', f'href="/tx/{transaction(7)}"')
    for part in ("On the chain", "moved", *links, "21,000", "yes", "&lt;i&gt;"):
        assert part in html


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/tx/0x12", 400, "64 hex digits"),
        (f"/account/{account(1).swapcase()}", 400, "an account is 0x"),
        ("/account/0x" + "zz" * 20, 400, "an account is 0x"),
        ("/epoch/-1", 400, "an epoch is a number"),
        ("/epoch/²", 400, "an epoch is a number"),
        ("/peer/abc", 400, "64 lower-case hex digits"),
        ("/epoch/77", 404, "knows no epoch 77"),
        (f"/tx/{transaction(250)}", 404, "knows no tx"),
        ("/tx/%3Cscript%3Ealert(1)%3C%2Fscript%3E", 404, ""),
        ("/tx/<script>alert(1)", 400, "&lt;script&gt;"),
    ],
)
def test_what_cannot_be_an_id_is_refused_by_name(path: str, status: int, words: str) -> None:
    answer = client().get(path)
    assert answer.status_code == status
    assert words in answer.text
    assert "<script>alert" not in answer.text


def test_a_chain_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lookup(kind: str, name: str) -> None:
        await anyio.sleep(30)

    monkeypatch.setattr(proofs, "LOOKUP_S", 0.05)
    answer = client(lookup=lookup).get("/epoch/1")
    assert answer.status_code == 504
    assert "did not answer within 0.05 s" in answer.text


def test_a_chain_that_is_away_is_named() -> None:
    async def lookup(kind: str, name: str) -> None:
        raise Unavailable("no EVM node answers at http://127.0.0.1:1")

    answer = client(lookup=lookup).get("/epoch/1")
    assert answer.status_code == 503
    assert "no EVM node answers" in answer.text


@pytest.mark.anyio
async def test_few_questions_go_to_the_chain_at_once() -> None:
    active, most = 0, 0

    async def lookup(kind: str, name: str) -> Mapping[str, Any]:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await anyio.sleep(0.01)
        active -= 1
        return {"n": name}

    ask = proofs.bounded(lookup, 3)
    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(ask, "epoch", str(number))
    assert most == 3


def test_head_and_other_methods() -> None:
    page = client()
    assert page.head("/").status_code == 200
    assert page.post("/").status_code == 405
