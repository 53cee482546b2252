"""The board: what the workers report and what the chain proves, put together for people to look at.

Reports are kept on disk, so that a restart shows the whole curve. Nothing on the board decides anything.
"""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import BigInteger, Column, Connection, Float, MetaData, String, Table, func, insert, select, text

from tessera.core.ids import PeerId
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.training.host import WorkerReport
from tessera.training.manifest import Manifest
from tessera.training.roster import Seat

__all__ = ["SILENT_S", "Board"]

RATE_WINDOW_S = 10.0
EVENTS = 100
SILENT_S = 5.0  # a worker that has not reported for so long counts as down

_TABLES = MetaData()
_POINTS = Table(
    "board_points",
    _TABLES,
    Column("kind", String, primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("value", Float(53), nullable=False),  # nats per token
    sqlite_with_rowid=False,
)
_WIRE = Table(
    "board_wire",
    _TABLES,
    Column("peer", String, primary_key=True),
    Column("stage", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)


def _wire_by_peer(connection: Connection) -> None:
    """Layout 1 kept one worker's traffic for each stage."""
    old = connection.execute(text("SELECT stage, bytes, tokens FROM board_wire")).all()
    connection.execute(text("DROP TABLE board_wire"))
    _WIRE.create(connection)
    rows = [{"peer": f"stage {row.stage}", **row._mapping} for row in old]
    if rows:
        connection.execute(insert(_WIRE), rows)


_LAYOUT = Layout("board", _TABLES, (_wire_by_peer,), remedy="delete it, only the curve's beginning is lost")


class Board:
    """The run's figures, updated by `report`. Losses in nats per token.

    Args:
        where: a file or a database's URL; `schema` is the name-space in it, one for each run.
    """

    def __init__(self, manifest: Manifest, where: str | Path, *, schema: str = "") -> None:
        self._manifest = manifest
        self._db = open_database(where, _LAYOUT, schema=schema)
        self.reports: dict[PeerId, WorkerReport] = {}
        self.heard: dict[PeerId, float] = {}  # monotonic time of the last report
        self.events: deque[tuple[float, str]] = deque(maxlen=EVENTS)
        self._stages: dict[PeerId, int] = {}
        self._pace: deque[tuple[float, int]] = deque()

    def report(self, seat: Seat, report: WorkerReport) -> None:
        before = self.reports.get(seat.peer)
        self.reports[seat.peer], self._stages[seat.peer] = report, seat.stage
        self.heard[seat.peer] = time.monotonic()
        self._save(seat, report)
        if seat.stage == 0:
            self._pace.append((time.monotonic(), self._furthest(0)))
            while self._pace and self._pace[-1][0] - self._pace[0][0] > RATE_WINDOW_S:
                self._pace.popleft()
        if before is not None and report.sessions > max(1, before.sessions):
            self.note(f"stage {seat.stage} resumed at step {report.step}")

    def note(self, text: str) -> None:
        self.events.append((time.time(), text))

    @property
    def step(self) -> int:
        """Steps that every stage has finished."""
        return min((self._furthest(stage) for stage in set(self._stages.values())), default=0)

    @property
    def tokens_per_s(self) -> float:
        if len(self._pace) < 2:
            return 0.0
        (t0, s0), (t1, s1) = self._pace[0], self._pace[-1]
        return max(0.0, (s1 - s0) * self._manifest.tokens_per_step / max(t1 - t0, 1e-9))

    def points(self, kind: str) -> list[tuple[int, float]]:
        """`train` or `validation` losses by step."""
        query = select(_POINTS.c.step, _POINTS.c.value).where(_POINTS.c.kind == kind).order_by(_POINTS.c.step)
        with self._db.read() as db:
            return [(row.step, row.value) for row in db.execute(query)]

    def wire(self) -> dict[int, tuple[int, int]]:
        """Bytes and tokens, both directions together, by the stage above each boundary."""
        query = select(_WIRE.c.stage, func.sum(_WIRE.c.bytes), func.sum(_WIRE.c.tokens)).group_by(_WIRE.c.stage)
        with self._db.read() as db:
            rows: list[Any] = list(db.execute(query))
        return {int(stage): (int(sent), int(tokens)) for stage, sent, tokens in rows}

    @property
    def wire_bytes_per_token(self) -> float:
        """Mean over boundaries and directions, frame headers and receipts included."""
        rows = self.wire().values()
        tokens = sum(row[1] for row in rows)
        return sum(row[0] for row in rows) / tokens if tokens else 0.0

    def everyone(self, fact: Literal["trained", "settled"]) -> bool:
        """Whether every stage has a worker who reports `fact`, and nobody who is here reports otherwise."""
        said = {peer: bool(getattr(report, fact)) for peer, report in self.reports.items()}
        now = time.monotonic()
        waits = any(not yes and now - self.heard[peer] < SILENT_S for peer, yes in said.items())
        done = {self._stages[peer] for peer, yes in said.items() if yes}
        return not waits and done >= set(range(self._manifest.model.stages))

    def _furthest(self, stage: int) -> int:
        return max(self.reports[peer].step for peer, at in self._stages.items() if at == stage)

    def close(self) -> None:
        self._db.close()

    def _save(self, seat: Seat, report: WorkerReport) -> None:
        curves = {"train": report.losses, "validation": report.validations}
        points = [
            {"kind": kind, "step": step, "value": value}
            for kind, curve in curves.items()
            for step, value in dict(curve).items()
            if math.isfinite(value)
        ]
        wire = {"peer": seat.peer, "stage": seat.stage, "bytes": report.wire_bytes, "tokens": report.wire_tokens}

        def work(db: Transaction) -> None:
            db.put(_POINTS, points)
            db.put(_WIRE, [wire] if report.wire_tokens > 0 else [])

        if points or report.wire_tokens > 0:
            self._db.apply(work)
