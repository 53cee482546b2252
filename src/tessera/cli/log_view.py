"""`tessera logs`: the last lines of a state directory's logs, and those that come."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import StateDir, default_state_dir
from tessera.core.errors import Missing

__all__ = ["show_logs"]

POLL_S = 0.5
LINE_LIMIT = 64 * 1024  # characters


def show_logs(
    name: Annotated[str, typer.Argument(help="Which log: worker, host, relay. Default: all of them.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines of each.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The lines as they are: one object each.")] = False,
    state_dir: StateDir = default_state_dir("worker"),
) -> None:
    """What happened here: the last lines of the logs that a worker, a host or a relay keeps."""
    files = [file for file in sorted((state_dir / "logs").glob("*.log")) if not name or file.stem == name]
    if not files:
        raise Missing(f"no log {name or 'at all'} in {state_dir / 'logs'}: nothing that keeps one has run here")
    last = sorted((line for file in files for line in _last_lines(file, lines)), key=_time)
    for line in last:
        _show(line, as_json)
    tails = {file: file.stat().st_size for file in files}
    while follow:
        time.sleep(POLL_S)
        for file, seen in tails.items():
            tails[file] = _go_on(file, seen, as_json)


def _last_lines(file: Path, count: int) -> Iterator[str]:
    """From the rotated file before it too, when the current one is short."""
    kept: deque[str] = deque(maxlen=count)
    for part in (file.with_name(file.name + ".1"), file):
        if part.exists():
            with part.open(encoding="utf-8", errors="replace") as opened:
                kept.extend(opened)
    yield from kept


def _go_on(file: Path, seen: int, as_json: bool) -> int:
    """Show what was added since `seen`; returns how far we are. A file that became shorter was rotated."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:  # between two files
        return 0
    if size == seen:
        return seen
    with file.open("rb") as opened:
        opened.seek(0 if size < seen else seen)
        data = opened.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line that is being written waits
        start = opened.tell() - len(data)
    for line in whole.decode("utf-8", "replace").splitlines():
        _show(line, as_json)
    return start + len(whole)


def _show(line: str, as_json: bool) -> None:
    event = _parse(line)
    if as_json or event is None:
        typer.echo(_plain(line.rstrip("\n")))
        return
    rest = " ".join(
        f"{key}={value}" for key, value in event.items() if key not in ("timestamp", "level", "event", "exception")
    )
    text = f"{str(event.get('timestamp', ''))[:19]} [{event.get('level', '')}] {event.get('event', '')} {rest}"
    typer.echo(_plain(text.rstrip()))
    if "exception" in event:
        for row in str(event["exception"]).splitlines():
            typer.echo(f"    {_plain(row)}")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line[:LINE_LIMIT])
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _time(line: str) -> str:
    return str((_parse(line) or {}).get("timestamp", ""))


def _plain(text: str) -> str:
    """Without control characters: what a peer said must not move the cursor."""
    return "".join(c if c.isprintable() else "�" for c in text)
