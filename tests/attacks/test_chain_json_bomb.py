"""Nested JSON that overflows the C stack: py_ecc, which the EVM loads, raises Python's recursion limit to 100,000.

Found here: with that limit, a peer's 100 kB of `[` ended the whole process with a segmentation fault.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

BOMBS = ["'[' * 900_000", "'{\"a\":' * 150_000", "'[{\"a\":' * 120_000"]
PROGRAM = """
import sys, threading
from tessera.chain.local import LocalChain
from tessera.core.encoding import decode
from tessera.core.errors import Invalid

def explode():
    bomb = ({bomb}).encode()
    assert b"-32700" in LocalChain(None, chain_id=1).handle(bomb)
    try:
        decode(bomb, 1 << 20)
    except Invalid:
        print("alive")

assert sys.getrecursionlimit() <= 10_240
explode()
thread = threading.Thread(target=explode)
thread.start()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [BOMBS[0], *(pytest.param(bomb, marks=pytest.mark.slow) for bomb in BOMBS[1:])])
def test_nested_json_does_not_end_the_process(bomb: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(bomb=bomb)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["alive", "alive"]), done.stderr[-500:]


LIGHT = ["tessera.chain.client", "tessera.chain.faces", "tessera.chain.settle", "tessera.chain.indexer.model_share"]
HEAVY = ["eth", "web3", "vyper", "torch", "eth_account"]


def test_talking_to_a_chain_does_not_load_an_evm() -> None:
    """`tessera --help` must answer at once, and a worker needs no EVM of its own."""
    program = f"import sys, {', '.join(LIGHT)}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
