"""LocalChain computes what Ethereum's executable specification computes: gas, status, events and every state root."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chain_support import ROOT
from eels.corpus import corpus

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:SELFDESTRUCT:DeprecationWarning"),  # one of the edges
]
RUNNER = ROOT / "tests/eels/replay_corpus.py"
TIMEOUT_S = 100


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the environment that has EELS. Skips without one, except in CI, where that is a failure."""
    found = Path(os.environ.get("TESSERA_EELS") or ROOT / ".venv-eels/bin/python")
    if not found.is_file():
        reason = "EELS is not here: run `make install-eels`, or set TESSERA_EELS to the python that has it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def replay(python: Path, chains: list[dict[str, Any]], file: Path) -> tuple[int, list[str]]:
    file.write_text(json.dumps(chains), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [python, RUNNER, file], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
    )
    assert run.stdout, run.stderr
    return run.returncode, run.stdout.splitlines()


async def test_eels_comes_to_the_same_gas_events_and_state_roots(python: Path, tmp_path: Path) -> None:
    chains = await corpus()
    code, lines = replay(python, chains, tmp_path / "corpus.json")
    assert (code, lines[:-1]) == (0, [])
    figures = json.loads(lines[-1])
    assert figures == {"transactions": sum(block["raw"] is not None for c in chains for block in c["blocks"]),
                       "differences": 0}  # fmt: skip
    assert figures["transactions"] >= 75
    edges = chains[0]["blocks"]
    assert {block["ok"] for block in edges if block["raw"]} == {True, False}


@pytest.mark.parametrize("field", ["gasUsed", "ok", "logs", "stateRoot", "receiptsRoot"])
async def test_the_oracle_sees_a_difference_when_there_is_one(python: Path, tmp_path: Path, field: str) -> None:
    chains = [chain for chain in await corpus() if chain["name"] == "coin"]
    chains[0]["blocks"][2][field] = {"gasUsed": 1, "ok": False, "logs": []}.get(field, "0x" + "11" * 32)
    code, lines = replay(python, chains, tmp_path / "corpus.json")
    assert code == 1
    assert lines[0].startswith(f"coin, block 2: {field} is ")
    assert len(lines) == 2
