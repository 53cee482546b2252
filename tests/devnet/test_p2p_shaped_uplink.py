"""Real iroh on a real bottleneck: 20 Mb/s, 50 ms, a queue of 200 ms. What the pacer is for."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from shaped_link import inside, possible, shaped
from tessera.p2p.uplink import CRUISE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not possible(), reason="needs root and /dev/net/tun")]

LINK = 2_500_000.0  # bytes per second: slow enough for a busy machine to fill


@pytest.fixture(scope="module")
def record() -> Iterator[str]:
    with shaped(LINK, 0.025), subprocess.Popen(inside(1, "serve"), stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout is not None
        try:
            yield next(line for line in peer.stdout if line.startswith("{")).strip()
        finally:
            peer.kill()


def measure(record: str, uplink: str, warm_s: float) -> dict[str, Any]:
    done = subprocess.run(
        inside(0, "upload", record, uplink, str(warm_s)), capture_output=True, text=True, timeout=60, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["median"] = statistics.median(result["trips"])
    return result


def test_small_messages_do_not_wait_behind_two_uploads(record: str) -> None:
    free = measure(record, "none", 3)
    capped = measure(record, str(LINK), 2)
    measured = measure(record, "measured", 8)
    assert free["median"] > 0.12, "the queue of the slowest router is full"
    for paced in (capped, measured):
        assert paced["median"] < 0.6 * free["median"]
    assert 0.5 * CRUISE * LINK < capped["rate"] <= 1.02 * CRUISE * LINK  # a busy machine sends less
    assert 0.4 * LINK < measured["uplink"] < 1.25 * LINK
    assert measured["rate"] > 0.3 * LINK
