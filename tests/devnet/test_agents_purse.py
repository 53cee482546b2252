"""An agent with a purse, as typed: a mandate made against a node over HTTP, a payment that the request asks for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvicorn
from typer.testing import CliRunner

from agents_world import ATTACKER, PAYER, SELLER
from tessera.chain.faces import Coin
from tessera.chain.http import rpc_app
from tessera.chain.local import LocalChain
from tessera.cli.main import app

pytestmark = pytest.mark.slow


@contextmanager
def node(chain: LocalChain) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(rpc_app(chain), port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def typed(*words: str) -> Any:
    result = CliRunner().invoke(app, ["agent", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_a_new_agent_pays_whom_its_user_names_within_its_mandate(tmp_path: Path) -> None:
    chain, here = LocalChain(None, chain_id=31_337), ("--state-dir", str(tmp_path))
    coin = anyio.run(lambda: Coin.deploy(chain.client(), PAYER))
    with node(chain) as url:
        terms = ("--chain", url, "--coin", coin.address, "--per-payment", "100", "--per-day", "250")
        made = typed("new", "buyer", "--demo", *terms, "--payee", SELLER, *here)
        anyio.run(lambda: coin.mint(PAYER, made["accounts"]["agent"], 1_000))
        lines = [{"tool": "pay", "arguments": {"payee": who, "units": 40}} for who in (SELLER, ATTACKER.account)]
        (tmp_path / "buyer/script.json").write_text(json.dumps([*lines, "done"]))
        outcome = typed("run", "buyer", f"Pay 40 to {SELLER}", *here)
        assert [call["kind"] for call in outcome["calls"]] == ["returned", "refused"]
        assert outcome["calls"][1]["answer"]["rule"] == "mandate"
        ledger = typed("ledger", "buyer", *here)
    assert (ledger["mandate"]["left"], [row["state"] for row in ledger["purchases"]]) == (210, ["consumed"])
    assert anyio.run(lambda: coin.balanceOf(SELLER)) == 40
    chain.close()
