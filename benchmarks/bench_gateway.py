"""What does the gateway cost? Throughput and latency beside the same upstream asked directly, and memory over time.

    python benchmarks/bench_gateway.py [--quick] [--json]

100 callers in a closed loop ask an upstream that makes a token every 50 ms for each (a batching server's pace), once
directly and once through the gateway; the two arms take turns, pairs of them, with the same client. Streamed, every
token is an event of its own. Upstream, gateway and client are processes on the same cores, so the gateway's arm has
less processor for the other two than the direct arm has: the ratio errs against the gateway. Its own use of the
processor stands beside the figures.

`throughput_ratio`: requests a second through the gateway over directly, the worse of streamed and whole, each the
median of its pairs; in a closed loop that is callers over the mean time of an answer, whatever the run's edges.
`added_p50_ms`: the median request's time to the whole answer, through less directly, the worse of the two;
`added_first_p50_ms` the same for a stream's first token. `rss_growth`: the gateway's resident memory after 20,000
requests (a model of ours, streamed and whole in turn) over that after the first 2,000, less one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import gateway_client
import psutil

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CALLERS = 100
TOKEN_MS = 50
TOKENS = 40
FIGURES = ("throughput_ratio", "added_p50_ms", "rss_growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short pair of each, 3,000 requests for memory")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    pairs, seconds, requests = (1, 5.0, 3_000) if arguments.quick else (3, 6.0, 20_000)
    result: dict[str, Any] = {"callers": CALLERS, "token_ms": TOKEN_MS, "tokens_each": TOKENS}
    upstream_port, gateway_port = free_port(), free_port()
    with process("gateway_stub.py", upstream_port, TOKEN_MS):
        with process("gateway_process.py", gateway_port, f"http://127.0.0.1:{upstream_port}/v1") as gateway:
            for how in ("stream", "whole"):
                result |= compare(how, upstream_port, gateway_port, gateway, pairs, seconds)
            result |= memory(gateway_port, gateway, requests)
    result["throughput_ratio"] = min(result["stream_ratio"], result["whole_ratio"])
    result["added_p50_ms"] = max(result["stream_added_p50_ms"], result["whole_added_p50_ms"])
    print("\n".join(f"{name:<28}{value}" for name, value in result.items()))
    if not arguments.quick:
        write_results(result)
    if arguments.json:
        print(json.dumps({name: result[name] for name in FIGURES}))


def compare(
    how: str, upstream_port: int, gateway_port: int, gateway: psutil.Process, pairs: int, seconds: float
) -> dict[str, Any]:
    """Pairs of a direct run and one through the gateway."""
    ratios, added, first, used, rates = [], [], [], [], []
    for _ in range(pairs):
        direct = load(upstream_port, "stub", CALLERS, seconds, TOKENS, how)
        before = gateway.cpu_times()
        through = load(gateway_port, "stub", CALLERS, seconds, TOKENS, how)
        after = gateway.cpu_times()
        used.append((after.user + after.system - before.user - before.system) / len(through["whole_s"]) * 1_000)
        ratios.append(rate(through) / rate(direct))
        rates.append(rate(through))
        added.append((median(through["whole_s"]) - median(direct["whole_s"])) * 1_000)
        first.append((median(through["first_s"]) - median(direct["first_s"])) * 1_000)
        assert through["tokens"] == TOKENS * len(through["whole_s"]), "tokens were lost on the way"
    result = {
        f"{how}_ratio": round(median(ratios), 3),
        f"{how}_added_p50_ms": round(median(added), 2),
        f"{how}_requests_per_s": round(median(rates), 1),
        f"{how}_gateway_cpu_ms": round(median(used), 2),
    }
    return result | ({"added_first_p50_ms": round(median(first), 2)} if how == "stream" else {})


def memory(port: int, gateway: psutil.Process, requests: int) -> dict[str, Any]:
    """Many short requests to a model of ours, 20 callers at once."""
    warm = requests // 10

    def ask(count: int) -> None:
        for number, how in enumerate(("stream", "whole") * 5):
            share = count * (number + 1) // 10 - count * number // 10
            asyncio.run(short_requests(port, how, share))

    begun = time.perf_counter()
    ask(warm)
    first = gateway.memory_info().rss
    ask(requests - warm)
    last = gateway.memory_info().rss
    return {
        "rss_growth": round(last / first - 1, 4),
        "rss_mib": round(last / 2**20, 1),
        "memory_requests": requests,
        "memory_requests_per_s": round(requests / (time.perf_counter() - begun)),
    }


async def short_requests(port: int, how: str, count: int, callers: int = 20) -> None:
    request = gateway_client.make_request("local", 4, how)
    left = iter(range(count))

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            await gateway_client.ask(reader, writer, request)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(caller() for _ in range(callers)))


def load(port: int, *arguments: object) -> dict[str, Any]:
    """A run of the client, in a process of its own."""
    command = [sys.executable, str(HERE / "gateway_client.py"), str(port), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rate(run: dict[str, Any]) -> float:
    """Requests a second while all callers ask (Little's law)."""
    return CALLERS / mean(run["whole_s"])


@contextmanager
def process(script: str, port: int, *arguments: object) -> Iterator[psutil.Process]:
    """One of the benchmark's servers, once it listens."""
    path = os.pathsep.join([str(HERE), *sys.path])
    command = [sys.executable, str(HERE / script), str(port), *map(str, arguments)]
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"{script} does not listen")
        yield psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_results(result: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    (RESULTS / "gateway.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {name} | {value} |" for name, value in result.items())
    text = (
        f"# What the gateway costs, {now:%d %b %Y}\n\n`python benchmarks/bench_gateway.py`, {platform.machine()}, "
        f"Python {platform.python_version()}, two cores shared by upstream, gateway and client; load average at the "
        f"end {os.getloadavg()[0]:.1f}.\n\n| figure | value |\n|---|---|\n{rows}\n"
    )
    (RESULTS / f"gateway_2core_{now:%Y%m}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
