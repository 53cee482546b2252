"""What the board keeps over a restart, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tessera.core.errors import Invalid
from tessera.devnet.board import Board
from tessera.training.host import WorkerReport

MANIFEST: Any = SimpleNamespace(model=SimpleNamespace(stages=2), tokens_per_step=64)


def report(step: int, **figures: Any) -> WorkerReport:
    return WorkerReport(step=step, **figures)


def test_a_restart_shows_the_whole_curve(database_url: str) -> None:
    board = Board(MANIFEST, database_url)
    board.report(0, report(1, losses=[(0, 5.5), (1, 5.25)], validations=[(0, 6.0)]))
    board.report(1, report(2, losses=[(1, 5.0)], wire_bytes=3 * 2**40, wire_tokens=2**40))
    board.report(1, report(2))  # nothing new
    board.close()
    again = Board(MANIFEST, database_url)
    assert again.points("train") == [(0, 5.5), (1, 5.0)]
    assert again.points("validation") == [(0, 6.0)]
    assert (again.wire(), again.wire_bytes_per_token) == ({1: (3 * 2**40, 2**40)}, 3.0)
    again.close()


def test_figures_that_are_none_are_not_drawn(database_url: str) -> None:
    board = Board(MANIFEST, database_url)
    board.report(0, report(1, losses=[(0, float("nan")), (1, float("inf")), (2, 1.0), (2, 2.0)]))
    assert board.points("train") == [(2, 2.0)]
    with pytest.raises(Invalid):
        board.report(0, report(1, losses=[(2**70, 1.0)]))
    assert board.points("train") == [(2, 2.0)]
    board.close()
