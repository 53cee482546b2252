"""Several processes and one database: writers that are killed, credits that are spent, payments that are held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import func, select

from storage_processes import ACCOUNTS, CREDIT, CREDITS, LAYOUT, SPENT, check_batches
from tessera.storage.database import open_database

SCRIPT = Path(__file__).parent.parent / "storage_processes.py"


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_nothing_half_applied_and_loses_nothing_it_told_of(
    database_url: str, tmp_path: Path, rounds: int
) -> None:
    acks = tmp_path / "acks"
    run("crash", database_url, acks, rounds, 7)  # each writer checks what the last one left
    told = {int(line) for line in acks.read_text().splitlines()}
    database = open_database(database_url, LAYOUT)
    kept = check_batches(database)
    database.close()
    assert told <= kept
    assert len(kept) <= len(told) + rounds  # of each writer at most one batch that it could not tell of any more


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_no_credit_is_lost_or_spent_twice(database_url: str, processes: int) -> None:
    run("spend", database_url, processes)
    database = open_database(database_url, LAYOUT)
    with database.read() as db:
        left = db.execute(select(func.sum(CREDITS.c.left))).scalar_one()
        spent = db.execute(select(SPENT.c.account, func.sum(SPENT.c.units)).group_by(SPENT.c.account)).all()
    database.close()
    assert left == 0
    assert sorted((account, int(units)) for account, units in spent) == [(a, CREDIT) for a in range(ACCOUNTS)]


@pytest.mark.slow
@pytest.mark.parametrize("payments", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_each_payment_is_held_by_one_of_two_gateways(database_url: str, payments: int) -> None:
    lines = run("hold", database_url, 2, payments).splitlines()
    held = [number for line in lines for number in json.loads(line.split(": ")[1])]
    assert sorted(held) == list(range(payments))
