"""A peer that puts HTML, scripts, links or event lines where its name or text is shown gets text."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from playwright.sync_api import expect

from tessera.devnet.snapshot import Epoch, Event, Income, Model, Owner, Payment, Peer, Snapshot, SnapshotFeed, Urls
from tessera.web.page import mount
from web_browser import chromium, serving, visiting
from web_world import moment

PAYLOADS = [
    "<script>window.owned = 1</script>",
    "\"><img src=x onerror='window.owned=1'>",
    "'><svg/onload=window.owned=1>",
    "javascript:window.owned=1",
    '<a hx-get="/api/state" hx-trigger="load" hx-on::load="window.owned=1">x</a>',
    "{{ 7 * 191 }}{% for x in y %}",
    "</pre></main><iframe srcdoc='<script>parent.owned=1</script>'>",
    'x\n\nevent: chart\ndata: {"from":0,"points":[["<b>",1,1]]}',
]


def poisoned(text: str) -> Snapshot:
    """`text` wherever somebody else has a say."""
    return replace(
        moment(120),
        run_id=text,
        phase_note=text,
        model=Model(1, 4, 2, 3, codec=text, name=text),
        peers=[Peer(text, text, 0, role=text, transaction=text), Peer(text, text, None, role=text)],
        owners=[Owner(text, text, transaction=text)],
        epochs=[Epoch(0, text, 1, text, (text,))],
        income=Income(asset=text, contract=text),
        payments=[Payment(text, text, 1, 0.0)],
        sample=text,
        sample_prompt=text,
        events=[Event(0.0, text, text)],
        urls=Urls(text, text, text),
    )


def client(snapshot: Snapshot, lookup: Any = None) -> TestClient:
    app = FastAPI()
    mount(app, SnapshotFeed(snapshot), lookup)
    return TestClient(app)


@pytest.mark.parametrize("text", PAYLOADS)
def test_the_page_escapes_every_place(text: str) -> None:
    clean = client(poisoned("harmless")).get("/").text
    html = client(poisoned(text)).get("/").text
    tags = re.compile(r"<(/?[a-zA-Z]+)")
    assert tags.findall(html) == tags.findall(clean)  # not one element more
    assert "1337" not in html
    assert 'href="javascript:' not in html


@pytest.mark.parametrize("text", PAYLOADS)
def test_what_the_chain_says_is_escaped_too(text: str) -> None:
    async def lookup(kind: str, name: str) -> dict[str, Any]:
        return {text: text, "transaction": text, "rows": [{text: text}], "nested": {text: [text]}}

    tags = re.compile(r"<(/?[a-zA-Z]+)")
    html = client(moment(1), lookup).get("/epoch/3").text
    assert set(tags.findall(html)) <= set(tags.findall(client(moment(600)).get("/epoch/3").text)) | {
        "table", "/table", "thead", "/thead", "tbody", "/tbody", "tr", "/tr", "td", "/td", "th", "/th",
    }  # fmt: skip
    assert "window.owned" not in re.sub(r"<d[dt]>[^<]*</d[dt]>|<t[dh][^>]*>[^<]*</t[dh]>", "", html)


def test_an_answer_without_end_is_cut() -> None:
    async def lookup(kind: str, name: str) -> dict[str, Any]:
        return {"text": "a" * 10**6, "rows": [{"n": i} for i in range(10_000)], "many": list(range(10_000))}

    html = client(moment(600), lookup).get("/epoch/1").text
    assert len(html) < 50_000


@pytest.mark.slow
def test_nothing_runs_in_a_browser_and_nothing_is_asked_elsewhere() -> None:
    with chromium() as browser, serving(poisoned("first")) as (url, publish), visiting(browser, url) as visit:
        visit.live()
        for number, text in enumerate(PAYLOADS):
            publish(replace(poisoned(text), step=number + 1))
            expect(visit.page.get_by_test_id("status")).to_contain_text(f"step {number + 1} of 600")
            expect(visit.page.get_by_test_id("sample").locator("pre")).to_contain_text(text.splitlines()[0])
        assert visit.page.evaluate("typeof window.owned") == "undefined"
        assert visit.page.locator("main script, main iframe, main [hx-get]").count() == 0
        assert visit.problems == []
        assert {request.split("/")[3] for request in visit.requests} <= {"", "static", "api"}


@pytest.mark.slow
def test_the_policy_would_stop_a_script_that_got_in() -> None:
    with chromium() as browser, serving(moment(5)) as (url, _), visiting(browser, url) as visit:
        visit.live()
        visit.page.evaluate(
            """() => { const s = document.createElement('script'); s.textContent = 'window.owned = 1';
                       document.body.append(s);
                       const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); }"""
        )
        visit.page.wait_for_timeout(200)
        assert visit.page.evaluate("typeof window.owned") == "undefined"
        assert len([problem for problem in visit.problems if "Content Security Policy" in problem]) == 2
