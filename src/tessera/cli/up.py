"""`tessera up`: an economy, and two views of it: the terminal and the page."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI
from rich.console import Console
from rich.text import Text

from tessera.cli.live import choose_view, final_table
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
    showing = _Showing(config, Console(stderr=as_json))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(showing.in_the_terminal)
        try:
            await showing.economy.live()
        finally:
            showing.end()
    if as_json:
        sys.stdout.write(json.dumps(showing.closing) + "\n")


class _Showing:
    """One economy and its two feeds: the page's lasts as long as the economy, the terminal's until the table."""

    def __init__(self, config: UpConfig, console: Console) -> None:
        self.closing: dict[str, Any] = {}
        self._config, self._console = config, console
        self._page_feed, self._terminal_feed = SnapshotFeed(), SnapshotFeed()
        self._invitation_shown = self._terminal_done = False
        self.economy = Economy(config, SystemClock(), self._page, self._changed)

    async def in_the_terminal(self) -> None:
        """Live progress; then the table, and where to go from there."""
        await choose_view(self._console).run(self._terminal_feed)
        if self.economy.settled:
            self._console.print(final_table(self._terminal_feed.snapshot()))
            if not self._config.once:
                self._say_where_to_go()

    def end(self) -> None:
        self._end_terminal()
        self._page_feed.close()

    def _page(self, economy: Economy) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        mount(app, self._page_feed, lookup=make_lookup(economy))
        return app

    def _changed(self, economy: Economy) -> None:
        snapshot = take_snapshot(economy)
        self._page_feed.publish(snapshot)
        if not self._terminal_done:
            self._terminal_feed.publish(snapshot)
            self._show_invitation(economy)
        if economy.settled:
            self._end_terminal()
        if economy.phase == "closed":
            self.closing = closing_object(economy)
            self._page_feed.close()  # open streams end before the server does

    def _end_terminal(self) -> None:
        self._terminal_done = True
        self._terminal_feed.close()

    def _show_invitation(self, economy: Economy) -> None:
        """Once, on a line of its own that a terminal does not break, so that it can be copied."""
        run = economy.run
        if run is not None and run.open_seats and not self._invitation_shown:
            self._invitation_shown = True
            command = Text(f"tessera join {run.invitation}")
            self._console.print(command, soft_wrap=True, highlight=False)

    def _say_where_to_go(self) -> None:
        urls, command = self.economy.urls, _own_command()
        where = f" --state-dir {self._config.state_dir}"
        rows = [
            ("page", urls["page"]),
            ("gateway", f"{urls['gateway']}  (OpenAI's interface, paid with x402)"),
            ("chain", f"{urls['chain']}  (JSON-RPC for wallets and web3.py)"),
            ("try", f"{command} chat{where}"),
            ("", f"{command} shares{where}"),
        ]
        for name, value in rows:
            self._console.print(f"[bold]{name:>8}[/]  {value}", highlight=False, soft_wrap=True)
        self._console.print("It stays up until Ctrl-C; starting again goes on from there.", style="dim")


def _own_command() -> str:
    """How this very command is called from here: by its name on the PATH, or by the way to its environment."""
    path = Path(sys.prefix) / "bin" / "tessera"
    if shutil.which("tessera") == str(path) or not path.exists():
        return "tessera"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
