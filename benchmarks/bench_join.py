"""What joining costs: from the command to the first useful work, blobs that are cut and pulled from many, and relays.

    python benchmarks/bench_join.py [--quick] [--json]

A host with one worker opens a run of two stages on this machine; `tessera join` takes the second one, with nothing but
the invitation. `join_s` is from the start of that command to its first finished step, its probe included;
`forecast_ratio` what it forecast ÷ what happened in the following steps. Blobs and links are measured between processes
on loopback: a blob that is interrupted 20 times (`resume_bytes_ratio`, bytes sent ÷ its size), three capped peers
against one (`blob_mb_s_ratio`), and 8 MiB messages, direct and through a relay's process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
from blob_figures import blob_mb_s_ratio, resume_bytes_ratio

from tessera.cli.logs import configure_logs
from tessera.p2p.relay.measure import measure_links

RESULTS = Path(__file__).parent / "results"
PROBE_S = 3.0
PATIENCE_S = 120.0
FIGURES = (
    "join_s", "resume_bytes_ratio", "blob_mb_s_ratio", "relay_mb_s", "direct_mb_s", "forecast_ratio",
    "forecast_tokens_per_s", "happened_tokens_per_s",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller blobs, fewer steps")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    configure_logs("warning")
    result: dict[str, Any] = {}
    joins = [measure_join(steps=10 if arguments.quick else 60) for _ in range(1 if arguments.quick else 3)]
    result |= sorted(joins, key=lambda join: join["forecast_ratio"])[len(joins) // 2]
    result["join_s"] = max(join["join_s"] for join in joins)
    result |= {key: value for key, value in resume_bytes_ratio(quick=arguments.quick).items() if key in FIGURES}
    result |= {key: value for key, value in blob_mb_s_ratio(quick=arguments.quick).items() if key in FIGURES}
    speed = anyio.run(lambda: measure_links(messages=8 if arguments.quick else 32))
    result |= {"relay_mb_s": round(speed.relay_mb_s, 1), "direct_mb_s": round(speed.direct_mb_s, 1)}
    if not arguments.quick:
        write_results(result, joins)
    for name in FIGURES:
        print(f"{name:24} {result[name]:>10,.3f}")
    if arguments.json:
        print(json.dumps({name: result[name] for name in FIGURES}))


# --- joining ----------------------------------------------------------------------------------------------------------


def measure_join(steps: int) -> dict[str, float]:
    """One run, one join, `steps` steps of training after it."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        command(folder, "run", "draft", folder / "run.json", "--stages", 2, "--state-dir", folder / "host", wait=True)
        create = ("run", "create", folder / "run.json", "--workers", 1, "--port", 0, "--state-dir", folder / "host")
        with started(folder, "host", *create), in_time("an invitation"):
            invitation = wait_for(folder / "host.log", r"^tessera join (tessera1\S+)$")[1]
            wait_for(folder / "host" / "workers" / "worker-0.log", r"seated")
            begun = time.monotonic()
            join = ("join", invitation, "--yes", "--probe-seconds", PROBE_S, "--state-dir", folder / "worker")
            with started(folder, "worker", *join), in_time("the first step"):
                wait_for(folder / "worker.log", r"\bworking\b")
                join_s = time.monotonic() - begun
                forecast = float(wait_for(folder / "worker.log", r"([\d,]+) tokens/s expected")[1].replace(",", ""))
                return {"join_s": round(join_s, 2), **pace(folder / "worker", steps, forecast)}


def pace(state: Path, steps: int, forecast: float) -> dict[str, float]:
    """Tokens per second over `steps` steps, from the worker's own status, against the forecast."""
    first = status(state, lambda now: now["last_step"] is not None and now["step"] >= 2)
    last = status(state, lambda now: now["step"] >= first["step"] + steps)
    seconds = last["last_step"][0] - first["last_step"][0]
    happened = (last["step"] - first["step"]) * first["tokens_per_step"] / seconds
    return {
        "forecast_tokens_per_s": round(forecast),
        "happened_tokens_per_s": round(happened),
        "forecast_ratio": round(forecast / happened, 3),
    }


def status(state: Path, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    while True:
        for file in state.glob("runs/*/status.json"):
            now: dict[str, Any] = json.loads(file.read_bytes())
            if ready(now):
                return now
        time.sleep(0.2)


def command(folder: Path, *words: object, wait: bool = False, log: Path | None = None) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "tessera", *map(str, words)]
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    output = log.open("wb") if log else subprocess.DEVNULL
    process = subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    if wait and process.wait(PATIENCE_S):
        raise SystemExit(f"{' '.join(line)} failed with {process.returncode}")
    return process


@contextmanager
def started(folder: Path, name: str, *words: object) -> Iterator[None]:
    process = command(folder, *words, log=folder / f"{name}.log")
    try:
        yield
    except BaseException:
        sys.stderr.write((folder / f"{name}.log").read_text(errors="replace")[-3000:])
        raise
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def in_time(what: str) -> Iterator[None]:
    """Ends the benchmark when `what` takes too long."""

    def late(number: int, frame: object) -> None:
        raise SystemExit(f"no sign of {what} within {PATIENCE_S:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(PATIENCE_S))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def wait_for(file: Path, pattern: str) -> re.Match[str]:
    while True:
        if file.exists() and (found := re.search(pattern, file.read_text(errors="replace"), re.M)):
            return found
        time.sleep(0.02)


# --- the report -------------------------------------------------------------------------------------------------------


def write_results(result: dict[str, Any], joins: list[dict[str, float]]) -> None:
    hardware = f"{platform.machine()}-{os.cpu_count()}cores"
    now = datetime.now(UTC)
    rows = "".join(f"| {name} | {result[name]:,} |\n" for name in FIGURES)
    runs = "".join(
        f"| {join['join_s']} | {join['forecast_tokens_per_s']:,} | {join['happened_tokens_per_s']:,} | "
        f"{join['forecast_ratio']} |\n"
        for join in joins
    )
    text = (
        f"# Joining, {now:%Y-%m-%d}\n\n{hardware}, Python {platform.python_version()}, loopback.\n\n"
        f"    python benchmarks/bench_join.py\n\n| figure | value |\n|---|---|\n{rows}\n"
        f"Each join (join_s: the slowest; forecast: the middle one):\n\n"
        f"| join_s | forecast tokens/s | happened | ratio |\n|---|---|---|---|\n{runs}"
    )
    (RESULTS / f"join_{hardware}_{now:%Y%m}.md").write_text(text)
    (RESULTS / "join.json").write_text(json.dumps({name: result[name] for name in FIGURES}) + "\n")


if __name__ == "__main__":
    main()
