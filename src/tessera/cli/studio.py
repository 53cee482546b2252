"""The studio in the terminal: progress, the table of jobs, where the film is; the page runs beside it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table

from tessera.core.clock import SystemClock
from tessera.core.errors import Missing, Refused
from tessera.devnet.figures import money
from tessera.devnet.http import bind_port, listening
from tessera.devnet.snapshot import Income, printable
from tessera.devnet.studio.cast import ASSET, DECIMALS, StudioConfig
from tessera.devnet.studio.studio import Studio, View, productions
from tessera.web.studio import mount_studio

__all__ = ["run_studio", "show_productions", "show_report"]

COIN = Income(asset=ASSET, decimals=DECIMALS)


async def run_studio(
    config: StudioConfig, *, host: str, port: int, once: bool, out: Path | None, as_json: bool
) -> None:
    """Raises: Invalid when a program is missing; Refused when no film came of it."""
    console = Console(stderr=as_json)
    teller = _Teller(console)
    studio = Studio(config, SystemClock(), teller.tell)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount_studio(app, lambda: studio.view, studio.film, studio.lookup)
    server = bind_port(host, port)
    try:
        async with listening(app, server) as url:
            console.print(f"[bold]page[/]  {url}/", highlight=False)
            view = await studio.live()
            console.print(job_table(view.to_dict()))
            _print_end(console, view)
            if view.film and out is not None:
                await anyio.to_thread.run_sync(shutil.copyfile, studio.film, out)
            if as_json:
                sys.stdout.write(json.dumps(view.to_dict()) + "\n")
                sys.stdout.flush()
            if not once:
                console.print("The page stays until Ctrl-C.", style="dim")
                await anyio.sleep_forever()
    finally:
        server.close()
    if not view.film:
        raise Refused(f"no film: {view.note}", rule="cluster")


class _Teller:
    """One line for each thing that happened to a job."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[int, str] = {}

    def tell(self, view: View) -> None:
        for job in reversed(view.jobs):
            phase = job["phase"]
            if self._seen.get(job["id"]) != phase:
                self._seen[job["id"]] = phase
                who = f"{job['client']} → {job['provider']}"
                line = f"job {job['id']}  {phase:<12} {who:<28} {printable(job['title'])}"
                self._console.print(line, highlight=False, markup=False)


def job_table(report: dict[str, Any]) -> Table:
    """Every job with its money."""
    table = Table(title=f"Jobs, in {report['asset']}", title_justify="left", box=None, pad_edge=False)
    for name in ("job", "title", "client", "does it", "state"):
        table.add_column(name)
    for name in ("price", "paid", "refunded"):
        table.add_column(name, justify="right")
    for job in reversed(report["jobs"]):
        sums = (money(job[name], COIN) if job[name] else "–" for name in ("price", "paid", "refunded"))
        title = printable(job["title"])
        table.add_row(str(job["id"]), title, job["client"], job["provider"], job["phase"], *sums)
    return table


def show_productions(state_dir: Path, *, as_json: bool) -> None:
    """All of them, shortly."""
    done = productions(state_dir)
    rows = [
        {"number": one["number"], "phase": one["phase"], "note": one["note"], "seconds": one["film"].get("seconds", 0),
         "jobs": len(one["jobs"]), "adds_up": one["adds_up"]}
        for one in done
    ]  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps({"productions": rows}) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("number", "phase", "film", "jobs", "note"):
        table.add_column(name)
    for row in rows:
        table.add_row(str(row["number"]), row["phase"], f"{row['seconds']} s", str(row["jobs"]), row["note"])
    Console().print(table if rows else "Nothing yet: tessera cluster studio")


def show_report(state_dir: Path, number: int, *, as_json: bool) -> None:
    """Raises: Missing for a production that was not here."""
    done = [one for one in productions(state_dir) if number in (0, one["number"])]
    if not done:
        raise Missing(f"there is no production{f' {number}' if number else ''} in {state_dir}: tessera cluster studio")
    report = done[-1]
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    console = Console()
    console.print(job_table(report))
    _print_sums(console, report)


def _print_end(console: Console, view: View) -> None:
    _print_sums(console, view.to_dict())
    if view.film:
        film = view.film
        console.print(f"[bold]film[/]  {film['file']}  ({film['seconds']} s)", highlight=False, soft_wrap=True)
    console.print(f"{view.label}.", style="dim")


def _print_sums(console: Console, report: dict[str, Any]) -> None:
    sound = "every unit is accounted for" if report["adds_up"] else "THE SUMS DIFFER"
    console.print(f"{report['phase']}: {report['note']}; {sound}", highlight=False)
    value = report["value"]
    if value:
        text = "as a cluster {value} = {income} - {cost}; one by one {value_alone} = {income_alone} - {cost_alone}"
        amounts = {name: f"{units / 10**DECIMALS:.4f}" for name, units in value.items()}
        console.print(f"value, in {ASSET}: {text.format(**amounts)}", highlight=False)
