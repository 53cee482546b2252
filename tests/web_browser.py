"""A page served on this machine and a headless Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, sync_playwright

from tessera.devnet.snapshot import Snapshot, SnapshotFeed
from tessera.web.page import mount

__all__ = ["Visit", "chromium", "serving", "visiting"]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@dataclass
class Visit:
    """A tab, and what it said and asked for meanwhile."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def live(self) -> None:
        self.page.wait_for_selector('body[data-state="live"]')
        self.page.wait_for_selector('#chart[data-drawn="yes"]')


@contextmanager
def chromium() -> Iterator[Browser]:
    path = os.environ.get("TESSERA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed: apt-get install chromium")
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def serving(first: Snapshot, port: int = 0) -> Iterator[tuple[str, Callable[[Snapshot], None]]]:
    """The page's URL, and how to publish; the server runs in a thread with its own event loop."""
    app, feed = FastAPI(), SnapshotFeed(first)
    mount(app, feed)
    config = uvicorn.Config(app, port=port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        loop = server.servers[0].get_loop()
        bound = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{bound}", lambda snapshot: _later(loop, feed, snapshot)
    finally:
        loop.call_soon_threadsafe(feed.close)
        server.should_exit = True
        thread.join(20)


@contextmanager
def visiting(
    browser: Browser, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light", script: bool = True
) -> Iterator[Visit]:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,  # type: ignore[arg-type]
        java_script_enabled=script,
    )
    context.set_default_timeout(20_000)
    visit = Visit(context.new_page(), url)
    visit.page.on("console", lambda message: visit.problems.append(f"{message.type}: {message.text}"))
    visit.page.on("pageerror", lambda error: visit.problems.append(str(error)))
    visit.page.on("request", lambda request: visit.requests.append(request.url))
    try:
        visit.page.goto(url)
        yield visit
    finally:
        context.close()


def _later(loop: AbstractEventLoop, feed: SnapshotFeed, snapshot: Snapshot) -> None:
    loop.call_soon_threadsafe(feed.publish, snapshot)
