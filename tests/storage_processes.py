"""Processes that share a database, for the tests of crashes and races. One interpreter is started; it forks the others.

python storage_processes.py crash URL ACKS ROUNDS SEED     writers, each killed at a random moment
python storage_processes.py spend URL PROCESSES            spenders of the same few accounts
python storage_processes.py hold URL PROCESSES PAYMENTS    gateways that are shown the same payments
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import anyio
from sqlalchemy import BigInteger, Column, MetaData, String, Table, func, insert, select, update

from tessera.core.clock import SystemClock
from tessera.core.errors import Conflict
from tessera.serving.paying.ledger import PaymentLedger, PaymentName
from tessera.storage.database import Database, Transaction, open_database
from tessera.storage.layout import Layout

ROWS = 20  # of one batch
ACCOUNTS, CREDIT = 3, 25
_TABLES = MetaData()
BATCHES = Table(
    "batches",
    _TABLES,
    Column("batch", BigInteger, primary_key=True, autoincrement=False),
    Column("row", BigInteger, primary_key=True, autoincrement=False),
    Column("filler", String, nullable=False),
)
TOTALS = Table("totals", _TABLES, Column("name", String, primary_key=True), Column("rows", BigInteger, nullable=False))
CREDITS = Table("credits", _TABLES, Column("account", BigInteger, primary_key=True), Column("left", BigInteger))
SPENT = Table(
    "spent",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("account", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
)
LAYOUT = Layout("processes", _TABLES)


def check_batches(database: Database) -> set[int]:
    """The batches that are there, each of them whole, and in the total."""
    with database.read() as db:
        counts = {row[0]: row[1] for row in db.execute(select(BATCHES.c.batch, func.count()).group_by(BATCHES.c.batch))}
        total = db.execute(select(TOTALS.c.rows)).scalar() or 0
    assert set(counts.values()) <= {ROWS}, f"half a batch: {counts}"
    assert total == ROWS * len(counts), f"{total} rows in the total, {ROWS * len(counts)} in the table"
    return set(counts)


def write_batches(url: str, acks: str) -> None:
    """Until killed: batches in one transaction each, told of in `acks` when they are kept."""
    database = open_database(url, LAYOUT)
    told = os.open(acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    present = check_batches(database)
    for batch in count(max(present, default=-1) + 1):
        rows = [{"batch": batch, "row": row, "filler": "x" * 400} for row in range(ROWS)]

        def work(db: Transaction, batch: int = batch, rows: list[dict[str, object]] = rows) -> None:
            db.put(TOTALS, [{"name": "all", "rows": ROWS * (batch + 1)}])
            for row in rows:
                db.execute(insert(BATCHES), row)

        database.apply(work)
        os.write(told, b"%d\n" % batch)


def crash(url: str, acks: str, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rounds):
        size = os.path.getsize(acks) if os.path.exists(acks) else 0
        writer = fork(partial(write_batches, url, acks))
        deadline = time.monotonic() + 30
        while not os.path.exists(acks) or os.path.getsize(acks) == size:  # it writes
            assert time.monotonic() < deadline, "the writer wrote nothing"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(writer, signal.SIGKILL)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL, "the writer failed by itself"


def spend_all(url: str, process: int) -> None:
    """One unit or two at a time, from whichever account, until nothing is left."""
    database, rng = open_database(url, LAYOUT), random.Random(process)
    for number in count():

        def work(db: Transaction, number: int = number) -> bool:
            left = {row.account: row.left for row in db.execute(select(CREDITS).where(CREDITS.c.left > 0))}
            if not left:
                return False
            account = rng.choice(sorted(left))
            units = min(rng.randint(1, 2), left[account])
            db.execute(update(CREDITS).where(CREDITS.c.account == account).values(left=left[account] - units))
            db.execute(insert(SPENT), {"id": f"{process}-{number}", "account": account, "units": units})
            return True

        try:
            if not database.apply(work):
                break
        except Conflict:
            continue  # many at once: again
    database.close()


def spend(url: str, processes: int) -> None:
    database = open_database(url, LAYOUT)
    database.apply(lambda db: db.put(CREDITS, [{"account": a, "left": CREDIT} for a in range(ACCOUNTS)]))
    database.close()
    wait([fork(partial(spend_all, url, process)) for process in range(processes)])


def hold_all(url: str, process: int, payments: int) -> None:
    """Take each payment that is free, and tell which ones on standard output."""

    async def main() -> list[int]:
        ledger, mine = PaymentLedger(SystemClock(), max_held_per_payer=1_000, where=url), []
        for number in range(payments):
            while True:
                try:
                    await ledger.hold(PaymentName(f"0x{number % 4}", f"0x{number}"))
                    mine.append(number)
                    break
                except Conflict as error:
                    if "keep changing" not in str(error) and "another process writes" not in str(error):
                        break
        ledger.close()
        return mine

    os.write(1, f"{process}: {anyio.run(main)}\n".encode())


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:  # noqa: BLE001 (a fork must not go on in its parent's code)
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def wait(children: list[int]) -> None:
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children), "a process failed"


if __name__ == "__main__":
    what, url, *rest = sys.argv[1:]
    if what == "crash":
        crash(url, rest[0], int(rest[1]), int(rest[2]))
    elif what == "spend":
        spend(url, int(rest[0]))
    else:
        wait([fork(partial(hold_all, url, process, int(rest[1]))) for process in range(int(rest[0]))])
