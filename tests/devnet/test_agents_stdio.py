"""`tessera agent mcp` over standard input and output, as another program starts it; and used by one of our agents."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fastmcp.client import Client
from fastmcp.client.transports import StdioTransport
from typer.testing import CliRunner

from tessera.agents.runtime.agent import Agent, Server
from tessera.agents.runtime.models import scripted
from tessera.agents.runtime.session import Runtime
from tessera.agents.steps import StepLedger
from tessera.cli.main import app

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    assert CliRunner().invoke(app, ["agent", "new", "clerk", "--demo", "--state-dir", str(tmp_path)]).exit_code == 0
    words = ["-m", "tessera", "agent", "mcp", "clerk", "--request", "Write to pal@example.com"]
    return [sys.executable, *words, "--state-dir", str(tmp_path)]


def environment(root: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.environ.get("PYTHONPATH", str(root / "src")), "PATH": os.environ["PATH"]}


def mail(to: str) -> dict[str, Any]:
    return {"recipients": [to], "body": "hello"}


async def test_another_program_calls_through_the_guard(command: list[str], root: Path, tmp_path: Path) -> None:
    transport = StdioTransport(command[0], command[1:], env=environment(root), keep_alive=False)
    async with Client(transport) as client:
        assert {tool.name for tool in await client.list_tools()} == {"read_inbox", "send_email"}
        allowed = await client.call_tool("send_email", mail("pal@example.com"))
        waits = await client.call_tool("send_email", mail("thief@example.com"))
    assert json.loads(allowed.content[0].text) == {"sent": ["pal@example.com"]}  # type: ignore[union-attr]
    assert "recipient_not_named" in json.loads(waits.content[0].text)["why"]  # type: ignore[union-attr]
    sent = (tmp_path / "clerk/outbox.jsonl").read_text().splitlines()
    assert [json.loads(line)["to"] for line in sent] == [["pal@example.com"]]


async def test_an_agent_uses_it_as_a_server(command: list[str], root: Path, tmp_path: Path) -> None:
    line = {"tool": "mail_send_email", "arguments": mail("pal@example.com")}
    server = Server("mail", command, environment=environment(root))
    ledger = StepLedger(tmp_path / "caller.sqlite")
    outcome = await Runtime(Agent("boss", scripted([line, "done"]), servers=[server]), ledger).start(
        "Write to pal@example.com"
    )
    ledger.close()
    assert (outcome.state, outcome.calls[0].answer) == ("done", {"sent": ["pal@example.com"]})
