"""kill -9 at random points, 200 times: no block that was told of is lost, none is half there, and the state replays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chain_support import CHAIN_ID, ROOT
from killed_writer import PAYER, WEI, opened
from tessera.chain.genesis import Genesis
from tessera.chain.replay import verify_journal

KILLS = 200


@pytest.mark.slow
@pytest.mark.timeout(300)  # 20 s on an idle machine
def test_a_writer_killed_200_times_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    command = [sys.executable, str(ROOT / "tests/killed_writer.py"), str(path), str(KILLS), "7"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(run.stdout)
    assert figures["openings"] >= KILLS // 2
    assert figures["blocks"] >= KILLS

    assert path.with_name("chain.db.checkpoint").exists()
    with opened(path) as chain:
        assert chain._checkpoint
        assert chain._checkpoint.height > 0
        root, entries, height = chain.state_root(), chain.entries(), chain.head.number
        people = {block.transaction.to for n in range(1, height + 1) if (block := chain.block(n)) and block.transaction}
        everybody = [bytes.fromhex(PAYER.account[2:]), *people]
        assert sum(chain.state().balance(person or b"") for person in everybody) == WEI  # not a wei is made or lost
        assert chain.state().nonce(everybody[0]) == height  # each block's transaction took place, once
    head = verify_journal(entries, chain_id=CHAIN_ID, genesis=Genesis({PAYER.account: WEI}))
    assert (head.number, head.state_root) == (height, root)
    assert entries[figures["blocks"] - 1].hash.hex() == figures["last"]
