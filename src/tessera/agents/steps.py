"""The steps of agents' runs, written down before and after each: what a killed run goes on from, and what replays it.

    model ─▶ called ─▶ returned ─▶ model ─▶ asked ─▶ called ─▶ returned ─▶ model ─▶ ended

Invariants: steps are only added; one process at a time adds to a run, the latest that opened it, and an earlier one is
refused; a call whose `called` has no `returned` may or may not have happened, and nobody pretends to know.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from tessera.agents.tables import LAYOUT, PINS, RUNS, STEPS, STOPS, TURNS
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, Missing
from tessera.storage.database import Transaction, open_database
from tessera.storage.location import MEMORY

__all__ = ["NAME", "Run", "Step", "StepLedger", "Turn"]

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # of an agent
REQUEST_LIMIT = 32_768  # characters
BODY_LIMIT = 4 * 2**20  # bytes of one step
STEPS_LIMIT = 10_000  # of one run


@dataclass(frozen=True, slots=True)
class Run:
    """One request to one agent."""

    id: str
    agent: str
    request: str
    began_at: float  # seconds since 1970
    state: str  # open, or how it ended: done, failed
    steps: int


@dataclass(frozen=True, slots=True)
class Step:
    """`kind` is model, called, returned, refused, asked or ended; `body` is JSON's."""

    number: int
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A process's leave to go on with a run, until another one has taken it."""

    run: str
    number: int


class StepLedger:
    """Made with a file or a database's URL, which it may share with the money's ledger.

    Args:
        schema: the name-space in a shared database.
    """

    def __init__(self, where: str | Path = MEMORY, *, clock: Clock | None = None, schema: str = "") -> None:
        self._clock = clock or SystemClock()
        self._db = open_database(where, LAYOUT, schema=schema, durability="full")

    # --- runs -------------------------------------------------------------------------------------------------------

    def begin(self, agent: str, request: str) -> Run:
        """A new run."""
        if NAME.fullmatch(agent) is None:
            raise Invalid(f"an agent is called a-z, 0-9, - and _, at most 64 of them, not {agent[:80]!r}")
        if not len(request.strip()) > 0 or len(request) > REQUEST_LIMIT:
            raise Invalid(f"a request has 1 to {REQUEST_LIMIT} characters, not {len(request)}")
        id, at_ms = secrets.token_hex(8), self._now_ms()
        row = {"id": id, "agent": agent, "request": request, "at_ms": at_ms}
        self._db.apply(lambda db: db.add(RUNS, [row]))
        return Run(id, agent, request, at_ms / 1000, "open", 0)

    def open(self, run: str) -> Turn:
        """Take a run over: whoever held it before adds nothing any more. Raises: Missing."""
        self.find(run)

        def work(db: Transaction) -> Turn:
            number = _latest_turn(db, run) + 1
            db.add(TURNS, [{"run": run, "turn": number, "at_ms": self._now_ms()}])
            return Turn(run, number)

        return self._db.apply(work)

    def find(self, run: str) -> Run:
        """By its id, or the first digits of it. Raises: Missing; Invalid when several begin so."""
        if not run or set(run) - set("0123456789abcdef"):
            raise Invalid(f"a run is named by hex digits, not {run[:40]!r}")
        with self._db.read() as db:
            rows = db.execute(select(RUNS).where(RUNS.c.id.startswith(run)).limit(2)).all()
            if len(rows) != 1:
                raise (Invalid(f"several runs begin with {run}") if rows else Missing(f"there is no run {run}"))
            return _run(db, rows[0])

    def runs(self, agent: str = "", limit: int = 100) -> list[Run]:
        """Newest first; of one agent, or of all."""
        query = select(RUNS).order_by(RUNS.c.at_ms.desc(), RUNS.c.id).limit(limit)
        with self._db.read() as db:
            return [_run(db, row) for row in db.execute(query.where(RUNS.c.agent == agent) if agent else query).all()]

    # --- steps ------------------------------------------------------------------------------------------------------

    def steps(self, run: str) -> list[Step]:
        """All of a run's, in order."""
        with self._db.read() as db:
            rows = db.execute(select(STEPS).where(STEPS.c.run == run).order_by(STEPS.c.number)).all()
        return [Step(row.number, row.kind, json.loads(row.body)) for row in rows]

    def add(self, turn: Turn, step: Step) -> Step:
        """Write a step down.

        Raises: Conflict when another process has taken the run over; Invalid when it is too large.
        """
        body = json.dumps(step.body, separators=(",", ":")).encode()
        if len(body) > BODY_LIMIT or step.number >= STEPS_LIMIT:
            raise Invalid(f"step {step.number} has {len(body)} bytes: {STEPS_LIMIT} steps of {BODY_LIMIT} are the most")
        row = {"run": turn.run, "number": step.number, "kind": step.kind, "body": body, "at_ms": self._now_ms()}

        def work(db: Transaction) -> Step:
            latest = _latest_turn(db, turn.run)
            count = db.execute(select(func.count()).select_from(STEPS).where(STEPS.c.run == turn.run)).scalar_one()
            if latest != turn.number or count != step.number:
                raise Conflict(f"another process goes on with run {turn.run}: this one stops")
            db.add(STEPS, [row])
            return step

        return self._db.apply(work)

    # --- agents -----------------------------------------------------------------------------------------------------

    def stop(self, agent: str, reason: str = "") -> None:
        """No further call of this agent's, at once and for good."""
        row = {"mandate": f"agent/{agent}", "reason": reason[:500], "at_ms": self._now_ms()}
        self._db.apply(lambda db: db.add(STOPS, [row]))

    def is_stopped(self, agent: str) -> bool:
        with self._db.read() as db:
            found = db.execute(select(STOPS.c.mandate).where(STOPS.c.mandate.in_(["", f"agent/{agent}"]))).first()
        return found is not None

    def pins(self, agent: str) -> dict[str, str]:
        """The digests of the tools as they were accepted, by name."""
        with self._db.read() as db:
            rows = db.execute(select(PINS).where(PINS.c.agent == agent).order_by(PINS.c.turn)).all()
        return {row.tool: row.digest for row in rows}

    def pin(self, agent: str, tool: str, digest: str) -> None:
        """Accept a tool as it is now."""

        def work(db: Transaction) -> None:
            mine = (PINS.c.agent == agent) & (PINS.c.tool == tool)
            turn = db.execute(select(func.count()).select_from(PINS).where(mine)).scalar_one()
            row = {"agent": agent, "tool": tool, "turn": turn, "digest": digest, "at_ms": self._now_ms()}
            db.add(PINS, [row])

        self._db.apply(work)

    def close(self) -> None:
        self._db.close()

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)


def _latest_turn(db: Transaction, run: str) -> int:
    return int(db.execute(select(func.coalesce(func.max(TURNS.c.turn), 0)).where(TURNS.c.run == run)).scalar_one())


def _run(db: Transaction, row: Any) -> Run:
    query = select(STEPS.c.number, STEPS.c.kind, STEPS.c.body).where(STEPS.c.run == row.id)
    last = db.execute(query.order_by(STEPS.c.number.desc())).first()
    state = json.loads(last.body)["state"] if last is not None and last.kind == "ended" else "open"
    return Run(row.id, row.agent, row.request, row.at_ms / 1000, state, 0 if last is None else last.number + 1)
