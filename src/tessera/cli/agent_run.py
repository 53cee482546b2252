"""`tessera agent run`, `tools` and `mcp`: what needs the agent itself, with its model, servers and purse."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyio import to_thread
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tessera.agents.approvals import Approval, Request, approve
from tessera.agents.questions import why
from tessera.agents.runtime.calls import Made
from tessera.agents.runtime.home import AgentHome
from tessera.agents.runtime.opening import open_agent
from tessera.agents.runtime.session import Outcome, Runtime
from tessera.agents.runtime.toolset import look_at_tools
from tessera.cli.agent_view import APPROVAL_S, question_table
from tessera.cli.logs import configure_logs
from tessera.core.errors import Invalid, Missing
from tessera.core.signing import AccountKey
from tessera.training.keystore import Keyring

__all__ = ["run_agent", "run_mcp", "run_tools"]


async def run_agent(
    folder: Path, request: str, resume: str, replay: str, *, ask: bool, as_json: bool
) -> None:  # fmt: skip
    """Raises: Invalid when it is not said what to do, once."""
    if sum(map(bool, (request, resume, replay))) != 1:
        raise Invalid("say what the agent shall do, or --resume RUN, or --replay RUN")
    home = AgentHome(folder)
    configure_logs("warning", folder / "logs" / "agent.log")
    console = Console(stderr=as_json)
    asks = _asker(home, console) if ask and sys.stdin.isatty() and not replay else None
    async with open_agent(home, _secret(folder), asks) as opened:
        if opened.payer is not None and not replay:
            await opened.payer.reconcile()
        outcome = await _go(opened.runtime, request, resume, replay)
    if as_json:
        print(json.dumps(_facts(outcome)))  # noqa: T201  the command's result
        return
    _show(console, home.name, outcome, replayed=bool(replay))


async def run_tools(folder: Path, accept: str, as_json: bool) -> None:
    """Look at every tool, also of servers. Raises: Missing for a tool that is not there."""
    home = AgentHome(folder)
    async with open_agent(home, _secret(folder)) as opened:
        seen = await look_at_tools(opened.runtime.agent)
        pins = opened.steps.pins(home.name)
        if accept:
            found = next((tool for tool in seen if tool.spec.name == accept and tool.server), None)
            if found is None:
                raise Missing(f"no server of {home.name} has a tool {accept!r}")
            opened.steps.pin(home.name, accept, found.digest)
            pins[accept] = found.digest
    rows = [
        {"tool": tool.spec.name, "effect": tool.spec.effect, "server": tool.server,
         "roles": dict(tool.spec.roles), "state": _pin_state(tool.server, pins.get(tool.spec.name), tool.digest),
         "description": tool.description}
        for tool in seen
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"agent": home.name, "tools": rows}))  # noqa: T201  the command's result
        return
    table = Table("tool", "effect", "from", "", Column("what the model is told", overflow="fold"), box=None)
    for row in rows:
        cells = (row["tool"], row["effect"], row["server"] or "your code", row["state"], str(row["description"])[:200])
        table.add_row(*(Text(str(cell)) for cell in cells))
    Console().print(table, highlight=False)


async def run_mcp(folder: Path, request: str) -> None:
    """Serve one client until it is gone. Standard output is the protocol's: nothing else is written there."""
    from tessera.agents.runtime.server import make_server

    home = AgentHome(folder)
    configure_logs("warning", folder / "logs" / "mcp.log")
    async with open_agent(home, _secret(folder)) as opened:
        await make_server(opened.runtime, request).run_stdio_async()


# --- inside -----------------------------------------------------------------------------------------------------------


async def _go(runtime: Runtime, request: str, resume: str, replay: str) -> Outcome:
    if replay:
        return await runtime.replay(replay)
    return await (runtime.resume(resume) if resume else runtime.start(request))


def _secret(folder: Path) -> Callable[[str], AccountKey]:
    ring = Keyring(folder / "keys")
    return lambda name: AccountKey(ring.secret(name))


def _asker(home: AgentHome, console: Console) -> Any:
    """Shows a question and reads the answer; None when the approver's key is elsewhere."""
    ring = Keyring(home.folder / "keys")
    if not any(entry.name == "approver" and entry.address == home.approver for entry in ring.entries()):
        return None

    async def ask(request: Request) -> Approval | None:
        console.print(question_table(request), highlight=False)
        answer = await to_thread.run_sync(_read_answer, abandon_on_cancel=True)
        if not answer:
            return None
        return approve(request.call, AccountKey(ring.secret("approver")), int(time.time()) + APPROVAL_S)

    return ask


def _read_answer() -> bool:
    try:
        return input("Allow this call, once? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _pin_state(server: str, pin: str | None, digest: str) -> str:
    if not server:
        return ""
    return "new" if pin is None else "accepted" if pin == digest else "changed"


def _facts(outcome: Outcome) -> dict[str, Any]:
    question = outcome.question
    return {
        "run": outcome.run, "state": outcome.state, "output": outcome.output,
        "waits_for": None if question is None else question.call.digest,
        "calls": [_call_facts(made) for made in outcome.calls],
    }  # fmt: skip


def _call_facts(made: Made) -> dict[str, Any]:
    decision = made.decision
    return {
        "tool": decision.tool, "arguments": dict(decision.arguments), "kind": made.kind, "approved": made.approved,
        "answer": made.answer, "holds": made.holds,
    }  # fmt: skip


def _show(console: Console, name: str, outcome: Outcome, *, replayed: bool) -> None:
    for made in outcome.calls:
        arguments = ", ".join(f"{key}={value!r}" for key, value in made.decision.arguments.items())
        mark, style = ("✗", "red") if made.kind == "refused" else ("✓", "green")
        note = " (you allowed it)" if made.approved else ""
        if made.kind == "refused":
            note = f" refused: {why(str(made.answer.get('rule', '')))}"
        if replayed and not made.holds:
            note += " · the guard would now say otherwise"
        console.print(Text.assemble((mark, style), f" {made.decision.tool}({arguments[:300]})", (note, "dim")))
    if outcome.output:
        console.print(Text(outcome.output))
    if outcome.question is not None:
        console.print(question_table(outcome.question), highlight=False)
        digest = outcome.question.call.digest[:12]
        console.print(Text(f"Waits for you: tessera agent approve {name} {digest}"), soft_wrap=True)
        console.print(Text(f"Then:          tessera agent run {name} --resume {outcome.run}"), soft_wrap=True)
    elif outcome.state != "done":
        console.print(Text(f"run {outcome.run}: {outcome.state}"), style="yellow")
    else:
        console.print(Text(f"run {outcome.run}"), style="dim")
