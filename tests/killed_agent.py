"""Kills a process that runs an agent, again and again, until the run is over. Run by `test_agents_killed.py`.

    python killed_agent.py DATABASE OUTBOX SEED

Each call of the agent writes one line to OUTBOX, which it cannot take back. The person who is asked whether an
interrupted call shall be made again looks into OUTBOX, as people do. Prints how often it was killed, and the lines.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import anyio

from agents_world import APPROVER
from tessera.agents.approvals import Approval, Approvals, Request, approve
from tessera.agents.runtime.agent import Agent, Tool
from tessera.agents.runtime.models import scripted
from tessera.agents.runtime.session import Runtime
from tessera.agents.steps import StepLedger
from tessera.agents.tools import ToolSpec
from tessera.core.errors import Conflict

CALLS = 6
REQUEST = "Note all of the numbers"


def live(database: str, outbox: Path) -> None:
    """One life of the agent: begins the run, or goes on with it."""

    def note(number: int) -> str:
        """Write a number down."""
        with outbox.open("a") as file:
            file.write(f"{number}\n")
        return "noted"

    def noted(number: object) -> bool:
        return str(number) in outbox.read_text().split()

    async def person(request: Request) -> Approval | None:
        made = noted(request.call.arguments["number"])
        return None if made else approve(request.call, APPROVER, int(time.time()) + 600)

    lines = [*({"tool": "note", "arguments": {"number": number}} for number in range(CALLS)), "done"]
    agent = Agent("noter", scripted(lines), tools=[Tool(note, ToolSpec("note", "write", {"number": "plain"}))])
    ledger, approvals = StepLedger(database), Approvals(APPROVER.account, database)
    runtime = Runtime(agent, ledger, approvals=approvals, ask=person)
    runs = ledger.runs()
    outcome = anyio.run(runtime.resume, runs[0].id) if runs else anyio.run(runtime.start, REQUEST)
    ledger.close()
    approvals.close()
    if outcome.state != "done":
        raise Conflict(f"the run is {outcome.state}")


def main(database: str, outbox: Path, seed: int) -> None:
    chance, kills = random.Random(seed), 0
    outbox.touch()
    while True:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                live(database, outbox)
                status = 0
            finally:  # a child never goes on as its parent does
                os._exit(status)
        deadline = time.monotonic() + chance.uniform(0.05, 0.5) * (1 + kills / 4)  # in the end one life is long enough
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.002)
        if ended[0]:
            if os.waitstatus_to_exitcode(ended[1]) != 0:
                raise SystemExit("a life ended with an error")
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        if kills > 200:
            raise SystemExit("the run does not come to its end")
    lines = [int(line) for line in outbox.read_text().split()]
    sys.stdout.write(json.dumps({"kills": kills, "lines": lines}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
