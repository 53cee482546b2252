"""`tessera up`: an economy, and two views of it: the terminal and the page."""

from __future__ import annotations

import json
import sys
from typing import Any

import anyio
from fastapi import FastAPI
from rich.console import Console

from tessera.cli.live import choose_view, final_table
from tessera.cli.logs import configure_logs
from tessera.core.clock import SystemClock
from tessera.devnet.economy import Economy
from tessera.devnet.lookup import make_lookup
from tessera.devnet.picture import closing_object, take_snapshot
from tessera.devnet.plan import UpConfig
from tessera.devnet.snapshot import SnapshotFeed
from tessera.web.page import mount

__all__ = ["run_up"]


async def run_up(config: UpConfig, *, as_json: bool) -> None:
    """Run the economy to its end, or until Ctrl-C. People read standard error when `as_json`, so that the object on
    standard output stands alone."""
    console = Console(stderr=as_json)
    configure_logs("warning")  # the view tells what happens
    feed = SnapshotFeed()

    def page(economy: Economy) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        mount(app, feed, lookup=make_lookup(economy))
        return app

    closing: dict[str, Any] = {}

    def changed(economy: Economy) -> None:
        feed.publish(take_snapshot(economy))
        if economy.phase == "closed":
            closing.update(closing_object(economy))

    economy = Economy(config, SystemClock(), page, changed)
    view = choose_view(console)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(view.run, feed)
        try:
            await economy.live()
        finally:
            feed.close()
    console.print(final_table(feed.snapshot()))
    if as_json:
        sys.stdout.write(json.dumps(closing) + "\n")
