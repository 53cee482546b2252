"""Two gateways on one database, one killed with SIGKILL under load: no credit is lost, and none is spent twice."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import httpx
import pytest

from credit_gateway import ASSET, MODEL, NETWORK
from tessera.core.clock import SystemClock
from tessera.core.signing import AccountKey
from tessera.serving.paying.balances import Balances, Entry
from tessera.serving.paying.keys import KeyRing
from tessera.serving.paying.payments import credit_name

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(120)]
SCRIPT = Path(__file__).resolve().parent.parent / "credit_gateway.py"
BOUGHT = 1_000_000
LEASE_S = 4.0
AT_ONCE, ANSWERS_BEFORE, ANSWERS_AFTER = 12, 40, 40


@contextmanager
def gateway(database: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    process = subprocess.Popen([sys.executable, str(SCRIPT), database, str(LEASE_S)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


async def test_a_gateway_killed_under_load_loses_no_credit_and_spends_none_twice(database_url: str) -> None:
    clock = SystemClock()
    balances, keys = Balances(clock, where=database_url, lease_s=LEASE_S), KeyRing(clock, where=database_url)
    payer = AccountKey.generate().account
    name = credit_name(NETWORK, ASSET, payer)
    await balances.add(name, "bought", BOUGHT, "a payment")
    headers = {"Authorization": f"Bearer {await keys.issue('credit', payer)}"}
    # Each request asks for another number of tokens, and so has its own cost, by which its entry is found again.
    sizes = itertools.count(1)
    answered: list[int] = []
    broken: list[int] = []
    with gateway(database_url) as (victim, first), gateway(database_url) as (_, second):
        async with httpx.AsyncClient(timeout=60, headers=headers) as client, anyio.create_task_group() as group:
            over = anyio.Event()

            async def ask(worker: int) -> None:
                while not over.is_set():
                    size = next(sizes)
                    url = first if worker % 2 and victim.poll() is None else second
                    body = {"model": MODEL, "prompt": "ab", "max_tokens": size, "stream": worker % 3 == 0}
                    try:
                        answer = await client.post(f"{url}/v1/completions", json=body)
                    except httpx.TransportError:  # the victim, or the test kills itself
                        broken.append(size)
                        continue
                    whole = answer.text.endswith("data: [DONE]\n\n") if body["stream"] else True
                    (answered if answer.status_code == 200 and whole else broken).append(size)

            for worker in range(AT_ONCE):
                group.start_soon(ask, worker)
            await until(answered, ANSWERS_BEFORE)
            victim.kill()
            await until(answered, len(answered) + ANSWERS_AFTER)
            over.set()
    assert broken, "the kill hit no request: it tested nothing"
    await anyio.sleep(LEASE_S)
    left = await balances.read(name)
    assert left.held == 0
    entries = await balances.last(name, 10_000)
    assert any(entry.kind == "ran_out" for entry in entries), "the victim held nothing: it tested nothing"
    spent = costs(entries)
    assert left.units == BOUGHT - sum(spent)
    times = Counter(spent)
    assert all(times[size] == 1 for size in answered)  # what was served is paid, once
    assert all(times[size] <= 1 for size in broken)  # what broke may have been made whole before the kill
    assert set(times) <= {0, *answered, *broken}
    balances.close()
    keys.close()


def costs(entries: list[Entry]) -> list[int]:
    """What each hold has used. Checks that each ended once, and that the balances add up."""
    held = {entry.reference: -entry.units for entry in entries if entry.kind == "held"}
    late = {entry.reference: -entry.units for entry in entries if entry.kind == "used_late"}  # on a slow machine
    ended = [(entry.reference, entry.units) for entry in entries if entry.kind in ("returned", "ran_out")]
    assert sorted(reference for reference, _ in ended) == sorted(held)
    total = 0
    for entry in reversed(entries):
        total += entry.units
        assert entry.balance == total
    return [held[reference] - units + late.get(reference, 0) for reference, units in ended]


async def until(answers: list[int], count: int) -> None:
    with anyio.fail_after(60):
        while len(answers) < count:
            await anyio.sleep(0.01)
