"""What the board keeps over a restart, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

from tessera.core.errors import Invalid
from tessera.devnet.board import Board
from tessera.training.host import WorkerReport

MANIFEST: Any = SimpleNamespace(model=SimpleNamespace(stages=2), tokens_per_step=64)
SEATS: Any = [SimpleNamespace(peer=f"peer {number}", stage=stage) for number, stage in enumerate((0, 1, 1))]


def report(step: int, **figures: Any) -> WorkerReport:
    return WorkerReport(step=step, **figures)


def test_a_restart_shows_the_whole_curve(database_url: str) -> None:
    board = Board(MANIFEST, database_url)
    board.report(SEATS[0], report(1, losses=[(0, 5.5), (1, 5.25)], validations=[(0, 6.0)]))
    board.report(SEATS[1], report(2, losses=[(1, 5.0)], wire_bytes=3 * 2**40, wire_tokens=2**40))
    board.report(SEATS[1], report(2))  # nothing new
    board.close()
    again = Board(MANIFEST, database_url)
    assert again.points("train") == [(0, 5.5), (1, 5.0)]
    assert again.points("validation") == [(0, 6.0)]
    assert (again.wire(), again.wire_bytes_per_token) == ({1: (3 * 2**40, 2**40)}, 3.0)
    again.close()


def test_figures_that_are_none_are_not_drawn(database_url: str) -> None:
    board = Board(MANIFEST, database_url)
    board.report(SEATS[0], report(1, losses=[(0, float("nan")), (1, float("inf")), (2, 1.0), (2, 2.0)]))
    assert board.points("train") == [(2, 2.0)]
    with pytest.raises(Invalid):
        board.report(SEATS[0], report(1, losses=[(2**70, 1.0)]))
    assert board.points("train") == [(2, 2.0)]
    board.close()


def test_a_stage_is_as_far_as_the_furthest_of_its_workers(database_url: str) -> None:
    board = Board(MANIFEST, database_url)
    for seat, step in zip(SEATS, (9, 7, 4), strict=True):
        board.report(seat, report(step, wire_bytes=100 * step, wire_tokens=10 * step))
    assert board.step == 7
    assert board.wire() == {0: (900, 90), 1: (1100, 110)}
    board.close()


def test_everyone_is_who_is_here(database_url: str) -> None:
    board = Board(MANIFEST, database_url)
    board.report(SEATS[0], report(9, trained=True))
    assert not board.everyone("trained")  # nobody of stage 1 has
    board.report(SEATS[1], report(9, trained=True))
    board.report(SEATS[2], report(8))
    assert not board.everyone("trained")  # one of it has, one still works
    board.heard[SEATS[2].peer] -= 60  # and has gone away
    assert board.everyone("trained")
    assert not board.everyone("settled")
    board.close()


def test_a_board_of_the_first_layout_is_brought_forward(tmp_path: Path) -> None:
    board = Board(MANIFEST, tmp_path / "board.sqlite")
    with board._db.transaction() as db:
        db.execute(text("drop table board_wire"))
        db.execute(text("create table board_wire (stage bigint, bytes bigint, tokens bigint)"))
        db.execute(text("insert into board_wire values (0, 300, 100), (1, 500, 100)"))
        db.execute(text("update layouts set version = 1"))
    board.close()
    again = Board(MANIFEST, tmp_path / "board.sqlite")
    assert again.wire() == {0: (300, 100), 1: (500, 100)}
    again.close()
