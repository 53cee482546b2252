"""The board: what the workers report and what the chain proves, put together for people to look at.

Reports are kept on disk, so that a restart shows the whole curve. Nothing on the board decides anything.
"""

from __future__ import annotations

import sqlite3
import time
from collections import deque
from pathlib import Path

from tessera.training.host import WorkerReport
from tessera.training.manifest import Manifest

__all__ = ["Board"]

RATE_WINDOW_S = 10.0
EVENTS = 100


class Board:
    """The run's figures, updated by `report`. Losses in nats per token."""

    def __init__(self, manifest: Manifest, file: Path) -> None:
        self._manifest = manifest
        self._db = sqlite3.connect(file, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=normal")
        self._db.executescript(
            """create table if not exists points(kind text, step integer, value real, primary key(kind, step));
               create table if not exists wire(stage integer primary key, bytes integer, tokens integer);"""
        )
        self.reports: dict[int, WorkerReport] = {}
        self.heard: dict[int, float] = {}  # stage -> monotonic time of the last report
        self.events: deque[tuple[float, str]] = deque(maxlen=EVENTS)
        self._pace: deque[tuple[float, int]] = deque()

    def report(self, stage: int, report: WorkerReport) -> None:
        before = self.reports.get(stage)
        self.reports[stage] = report
        self.heard[stage] = time.monotonic()
        self._save("train", report.losses)
        self._save("validation", report.validations)
        if report.wire_tokens > 0:
            row = (stage, report.wire_bytes, report.wire_tokens)
            self._db.execute("insert or replace into wire values(?, ?, ?)", row)
        if stage == 0:
            self._pace.append((time.monotonic(), report.step))
            while self._pace and self._pace[-1][0] - self._pace[0][0] > RATE_WINDOW_S:
                self._pace.popleft()
        if before is not None and report.sessions > max(1, before.sessions):
            self.note(f"stage {stage} resumed at step {report.step}")

    def note(self, text: str) -> None:
        self.events.append((time.time(), text))

    @property
    def step(self) -> int:
        """Steps that every stage has finished."""
        stages = self._manifest.model.stages
        return min((self.reports[s].step for s in range(stages) if s in self.reports), default=0)

    @property
    def tokens_per_s(self) -> float:
        if len(self._pace) < 2:
            return 0.0
        (t0, s0), (t1, s1) = self._pace[0], self._pace[-1]
        return max(0.0, (s1 - s0) * self._manifest.tokens_per_step / max(t1 - t0, 1e-9))

    def points(self, kind: str) -> list[tuple[int, float]]:
        """`train` or `validation` losses by step."""
        return list(self._db.execute("select step, value from points where kind = ? order by step", (kind,)))

    def wire(self) -> dict[int, tuple[int, int]]:
        """Bytes and tokens, both directions together, by the stage above each boundary."""
        return {stage: (count, tokens) for stage, count, tokens in self._db.execute("select * from wire")}

    @property
    def wire_bytes_per_token(self) -> float:
        """Mean over boundaries and directions, frame headers and receipts included."""
        rows = self.wire().values()
        tokens = sum(row[1] for row in rows)
        return sum(row[0] for row in rows) / tokens if tokens else 0.0

    def everyone(self, fact: str) -> bool:
        """Whether every stage reports `fact`: trained or settled."""
        stages = range(self._manifest.model.stages)
        return all(s in self.reports and getattr(self.reports[s], fact) for s in stages)

    def close(self) -> None:
        self._db.close()

    def _save(self, kind: str, points: list[tuple[int, float]]) -> None:
        if points:
            rows = [(kind, step, value) for step, value in points]
            self._db.executemany("insert or replace into points values(?, ?, ?)", rows)
