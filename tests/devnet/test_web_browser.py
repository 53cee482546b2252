"""The page in headless Chromium: it shows the feed, follows it, and keeps to this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from web_browser import Visit, chromium, serving, visiting
from web_world import account, moment, transaction

SERVED = moment(600, phase="serving", payments=4, claimed=True)
SIZES = [
    pytest.param(1280, 900, "light", marks=pytest.mark.slow),
    (1280, 900, "dark"),
    (390, 844, "light"),
    pytest.param(390, 844, "dark", marks=pytest.mark.slow),
]
PAINTED = """() => [...document.querySelectorAll('#chart canvas')].map((canvas) => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 200) colours.add(pixels.slice(i, i + 3).join());
  return colours.size;
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def figure(page: Page, name: str) -> str:
    return page.get_by_test_id(f"figure-{name}").locator(".value").inner_text()


def check_clean(visit: Visit) -> None:
    assert visit.problems == []
    assert {urlsplit(request).netloc for request in visit.requests} == {urlsplit(visit.url).netloc}


def test_the_page_shows_the_feed_and_follows_it(browser: Browser) -> None:
    with serving(moment(100)) as (url, publish), visiting(browser, url) as visit:
        page = visit.page
        visit.live()
        assert figure(page, "speed") == "14,213"
        expect(page.get_by_test_id("status")).to_contain_text("step 100 of 600")
        publish(moment(430))
        expect(page.get_by_test_id("status")).to_contain_text("step 430 of 600")
        assert figure(page, "loss") == "2.238"
        publish(SERVED)
        expect(page.locator('[aria-current="step"]')).to_have_text("serving")
        expect(page.get_by_test_id("payments").locator("tbody tr")).to_have_count(4)
        expect(page.get_by_test_id("income")).to_contain_text("0.039996 tUSD")
        expect(page.get_by_test_id("income-sound")).to_be_visible()
        expect(page.get_by_role("status")).to_have_text("The run is now serving.")
        check_clean(visit)


@pytest.mark.slow
def test_the_chart_is_painted_and_grows(browser: Browser) -> None:
    with serving(moment(60)) as (url, publish), visiting(browser, url) as visit:
        page = visit.page
        visit.live()
        assert max(page.evaluate(PAINTED)) > 20  # four lines, a grid and text, with soft edges
        legend = page.locator("#chart .u-legend")
        expect(legend).to_contain_text("bigram model")
        expect(legend.locator(".u-series").nth(0)).to_contain_text("60")
        before = page.locator("#chart canvas").screenshot()
        publish(moment(300))
        expect(legend.locator(".u-series").nth(0)).to_contain_text("300")
        assert page.locator("#chart canvas").screenshot() != before
        check_clean(visit)


@pytest.mark.slow
def test_a_run_that_has_not_begun_says_so_and_then_begins(browser: Browser) -> None:
    with serving(moment(0, phase="seating")) as (url, publish), visiting(browser, url) as visit:
        expect(visit.page.locator("body")).to_have_attribute("data-state", "live")
        expect(visit.page.locator("#chart")).to_have_text("The curve begins with the first step.")
        publish(moment(3))
        visit.live()
        expect(visit.page.locator("#chart")).not_to_contain_text("begins")
        check_clean(visit)


@pytest.mark.slow
def test_numbers_lead_to_their_proof_and_back(browser: Browser) -> None:
    with serving(SERVED) as (url, _), visiting(browser, url) as visit:
        page = visit.page
        visit.live()
        page.get_by_test_id("epochs").locator("tbody tr").nth(2).get_by_role("link").nth(1).click()
        page.wait_for_url(f"**/tx/{transaction(2)}")
        expect(page.get_by_role("heading", name="Epoch 2")).to_be_visible()
        page.get_by_role("link", name="Back to the run").click()
        visit.live()
        page.get_by_test_id("owners").get_by_role("link").first.click()
        page.wait_for_url(f"**/account/{account(0)}")
        check_clean(visit)


@pytest.mark.slow
def test_the_keyboards_place_survives_an_update(browser: Browser) -> None:
    with serving(moment(160)) as (url, publish), visiting(browser, url) as visit:
        page = visit.page
        visit.live()
        page.locator("#workers-tokens-2").focus()
        publish(moment(320))
        expect(page.locator("#workers-tokens-2")).to_have_text("1,228,800")
        expect(page.locator("#workers-tokens-2")).to_be_focused()


@pytest.mark.slow
def test_the_page_says_when_the_connection_is_lost_and_finds_it_again(browser: Browser) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        with serving(moment(10), port) as (url, _):
            visit = stack.enter_context(visiting(browser, url))
            visit.live()
        expect(visit.page.locator("#link-text")).to_have_text("reconnecting")
        with serving(moment(99), port):
            visit.live()
            expect(visit.page.get_by_test_id("status")).to_contain_text("step 99 of 600")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "scheme"), SIZES)
def test_the_page_fits_every_screen(browser: Browser, width: int, height: int, scheme: str) -> None:
    with serving(SERVED) as (url, _), visiting(browser, url, width=width, height=height, scheme=scheme) as visit:
        visit.live()
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        check_clean(visit)


@pytest.mark.slow
def test_the_page_works_without_scripts(browser: Browser) -> None:
    with serving(SERVED) as (url, _), visiting(browser, url, script=False) as visit:
        assert figure(visit.page, "revenue") == "0.04"
        assert visit.page.get_by_test_id("workers").locator("tbody tr").count() == 4


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "scheme"), SIZES)
def test_axe_finds_nothing(browser: Browser, width: int, height: int, scheme: str) -> None:
    script = os.environ.get("TESSERA_AXE")
    if script is None:
        pytest.skip("TESSERA_AXE does not name axe-core's axe.min.js")
    with serving(SERVED) as (url, _), visiting(browser, url, width=width, height=height, scheme=scheme) as visit:
        for path in ("/", f"/account/{account(0)}", "/epoch/2", "/epoch/99"):
            visit.page.goto(url + path)
            if path == "/":
                visit.live()
            visit.page.evaluate(Path(script).read_text(encoding="utf-8"))
            found = visit.page.evaluate("axe.run()")
            assert len(found["passes"]) > 10
            assert [(one["id"], one["impact"]) for one in found["violations"]] == []
