"""What `tessera agent` shows and decides without the agent itself: questions, ledgers, stops. Needs no model."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tessera.agents.approvals import Approvals, Request, approve
from tessera.agents.questions import facts_of
from tessera.agents.runtime.home import AgentHome, homes
from tessera.core.errors import Invalid, Missing, Refused
from tessera.core.signing import AccountKey
from tessera.training.keystore import Keyring

__all__ = ["APPROVAL_S", "question_table", "run_approve", "run_stop", "show_agents", "show_ledger"]

APPROVAL_S = 3_600  # how long a person's yes is good


def question_table(request: Request) -> Table:
    """A question with its evidence, for a terminal."""
    table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, title=request.call.digest[:12])
    for name, text in facts_of(request):
        table.add_row(Text(name), Text(text))
    return table


def show_agents(folder: Path, as_json: bool) -> None:
    rows = [_summary(home) for home in homes(folder)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        Console().print("No agent yet. `tessera agent new NAME --demo` makes one that runs offline.")
        return
    table = Table("agent", "model", "runs", "waits for you", "mandate", "", box=None)
    for row in rows:
        left = "" if row["left"] is None else f"{row['left']:,} units left"
        cells = (
            row["agent"],
            row["model"],
            row["runs"],
            row["waiting"] or "",
            left,
            "stopped" if row["stopped"] else "",
        )
        table.add_row(*(Text(str(cell)) for cell in cells))
    Console().print(table, highlight=False)


def run_approve(folder: Path, call: str, *, deny: bool, yes: bool, as_json: bool) -> None:
    """Raises: Missing for a question that does not wait; Refused when the approver's key is elsewhere."""
    home = AgentHome(folder)
    with closing(home.approvals()) as approvals:
        if not call:
            _show_pending(home.name, approvals, as_json)
            return
        request = _find(approvals, call)
        if not as_json:
            Console().print(question_table(request), highlight=False)
        if deny:
            approvals.deny(request.call.digest)
            answer = "denied"
        else:
            key = _approver_key(home)
            if not yes:
                typer.confirm("Allow this call, once?", abort=True)
            approvals.grant(approve(request.call, key, int(time.time()) + APPROVAL_S))
            answer = "allowed"
    run = request.evidence.get("run", "")
    if as_json:
        typer.echo(json.dumps({"call": request.call.digest, "answer": answer, "run": run}))
        return
    typer.echo(f"{answer}. Then: tessera agent run {home.name} --resume {run}")


def show_ledger(folder: Path, as_json: bool) -> None:
    home = AgentHome(folder)
    facts = _ledger_facts(home)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    console = Console()
    runs = Table("run", "state", "steps", Column("request", overflow="fold"), box=None)
    for run in facts["runs"]:
        runs.add_row(*(Text(str(run[key])) for key in ("run", "state", "steps", "request")))
    console.print(runs if facts["runs"] else "No run yet.", highlight=False)
    if facts["mandate"] is None:
        return
    paid = Table(Column("units", justify="right"), "state", "payee", Column("for", overflow="fold"), box=None)
    for row in facts["purchases"]:
        paid.add_row(f"{row['units']:,}", row["state"], row["payee"], Text(row["resource"]))
    console.print(paid if facts["purchases"] else "Nothing was paid yet.", highlight=False)
    left, cap = facts["mandate"]["left"], facts["mandate"]["per_period"]
    console.print(f"{left:,} of {cap:,} units are left in this period", style="dim", highlight=False)


def run_stop(folder: Path, reason: str) -> None:
    home = AgentHome(folder)
    with ExitStack() as stack:
        steps = stack.enter_context(closing(home.steps()))
        steps.stop(home.name, reason)
        if (mandate := home.mandate()) is not None:
            stack.enter_context(closing(home.ledger())).stop(mandate.id, reason)
    typer.echo(f"{home.name} is stopped, for good. What its purse holds is still in it: take it out with its key.")


# --- inside -----------------------------------------------------------------------------------------------------------


def _summary(home: AgentHome) -> dict[str, Any]:
    facts = _ledger_facts(home)
    with closing(home.approvals()) as approvals, closing(home.steps()) as steps:
        waiting = len([one for one in approvals.pending() if _is_of(one, facts)])
        stopped = steps.is_stopped(home.name)
    part = home.definition.model
    left = None if facts["mandate"] is None else facts["mandate"]["left"]
    return {"agent": home.name, "model": part.name or part.script, "runs": len(facts["runs"]), "waiting": waiting,
            "left": left, "stopped": stopped}  # fmt: skip


def _is_of(request: Request, facts: dict[str, Any]) -> bool:
    """Agents may share a database: a question belongs to whose run it is."""
    return any(run["run"] == request.evidence.get("run") for run in facts["runs"])


def _ledger_facts(home: AgentHome) -> dict[str, Any]:
    with closing(home.steps()) as steps, closing(home.ledger()) as ledger:
        runs = [
            {"run": run.id, "state": run.state, "steps": run.steps, "request": run.request, "began_at": run.began_at}
            for run in steps.runs(home.name)
        ]
        mandate = home.mandate()
        if mandate is None:
            return {"agent": home.name, "runs": runs, "mandate": None, "purchases": []}
        spent = ledger.spent(mandate.id)
        mine = [entry for entry in ledger.entries() if entry.intent.mandate == mandate.id]
    purchases = [
        {"payee": e.intent.payee, "units": e.intent.amount.units, "asset": e.intent.amount.asset, "state": e.state,
         "resource": e.intent.resource, "purpose": e.intent.purpose, "note": e.note}
        for e in reversed(mine)
    ]  # fmt: skip
    facts = mandate.to_dict() | {"id": mandate.id, "left": max(mandate.per_period.units - spent.units, 0)}
    return {"agent": home.name, "runs": runs, "mandate": facts, "purchases": purchases}


def _show_pending(name: str, approvals: Approvals, as_json: bool) -> None:
    waiting = approvals.pending()
    if as_json:
        rows = [{"call": request.call.digest, "facts": facts_of(request), "expires_at": request.expires_at}
                for request in waiting]  # fmt: skip
        typer.echo(json.dumps(rows))
        return
    console = Console()
    for request in waiting:
        console.print(question_table(request), highlight=False)
    hint = (
        f"tessera agent approve {name} {waiting[0].call.digest[:12]}, or with --deny" if waiting else "Nothing waits."
    )
    console.print(Text(hint), soft_wrap=True)


def _find(approvals: Approvals, call: str) -> Request:
    if not call or set(call.lower()) - set("0123456789abcdef"):
        raise Invalid(f"a question is named by hex digits, not {call[:40]!r}")
    found = [request for request in approvals.pending() if request.call.digest.startswith(call.lower())]
    if len(found) != 1:
        raise Missing(f"{'several questions begin' if found else 'no question that waits begins'} with {call}")
    return found[0]


def _approver_key(home: AgentHome) -> AccountKey:
    ring = Keyring(home.folder / "keys")
    if not any(entry.name == "approver" and entry.address == home.approver for entry in ring.entries()):
        raise Refused(
            f"the approver is {home.approver}, whose key is not here: sign on the page, `tessera agent page`",
            rule="not_the_approver",
        )
    return AccountKey(ring.secret("approver"))
