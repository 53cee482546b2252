"""What the economy's tests share: commands as a person types them, with short runs on a small text."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEXT = Path(asyncio.__file__).parent  # 0.5 MB of text that nobody edits: enough to learn a little
PATIENCE_S = 200.0  # two economies may share two cores


def environment(home: Path) -> dict[str, str]:
    """A machine of its own: an empty home, no settings, one thread."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tessera", *map(str, arguments)]


def up(state: Path, *more: object, steps: int = 24) -> list[str]:
    return command("up", "--once", "--json", "--data", TEXT, "--steps", steps, "--port", 0, "--state-dir", state, *more)


def run(arguments: list[str], home: Path, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """A command to its end. One that takes too long is interrupted, so that it stops the workers that it started."""
    with subprocess.Popen(
        arguments,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _stop(process)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@contextmanager
def started(arguments: list[str], home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the background, its output in `log`; stopped at the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, env=environment(home), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(condition: Any, what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Poll until `condition()` is true; its value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def last_object(output: str) -> dict[str, Any]:
    """The JSON object on the last line."""
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def check_sums(result: dict[str, Any]) -> None:
    """The table adds up, to the last unit."""
    owned = sum(row["shares"] for row in (*result["workers"], *result["owners"]))
    assert owned == result["total_shares"] > 0
    claimed = sum(row["claimed"] for row in (*result["workers"], *result["owners"]))
    assert claimed > 0
    assert claimed + result["unclaimed"] + result["undistributed"] + result["dust"] == result["revenue"]
    assert 0 <= result["dust"] <= len(result["workers"]) + len(result["owners"])
    assert all(worker["verified_tokens"] == result["tokens"] for worker in result["workers"])
