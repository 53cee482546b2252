"""One database interface on SQLite and PostgreSQL: what a transaction promises, and what each failure says."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest
from sqlalchemy import BigInteger, Column, Connection, ForeignKey, MetaData, String, Table, func, select, text, update

from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.storage.database import Database, Transaction, open_database
from tessera.storage.layout import Layout

TABLES = MetaData()
STOCK = Table(
    "stock",
    TABLES,
    Column("name", String, primary_key=True),
    Column("count", BigInteger, nullable=False),
    Column("note", String),
)
PARTS = Table("parts", TABLES, Column("id", BigInteger, primary_key=True), Column("of", ForeignKey("stock.name")))
LAYOUT = Layout("stock", TABLES)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = open_database(database_url, LAYOUT, patience_s=0.1)
    yield opened
    opened.close()


def stock(database: Database) -> dict[str, int]:
    with database.read() as db:
        return {row.name: row.count for row in db.execute(select(STOCK).order_by(STOCK.c.name))}


def add_one(db: Transaction, name: str = "a") -> None:
    db.execute(update(STOCK).where(STOCK.c.name == name).values(count=STOCK.c.count + 1))


def test_a_transaction_is_kept_whole_or_not_at_all(database: Database, database_url: str) -> None:
    with database.transaction() as db:
        db.add(STOCK, [{"name": "a", "count": 1}, {"name": "b", "count": 2}])

    def stopped() -> None:
        with database.transaction() as db:
            db.put(STOCK, [{"name": "a", "count": 9}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    again = open_database(database_url, LAYOUT)
    assert stock(database) == stock(again) == {"a": 1, "b": 2}
    again.close()


def test_add_keeps_what_is_there_and_put_overwrites_only_what_it_names(database: Database) -> None:
    with database.transaction() as db:
        db.add(STOCK, [{"name": "a", "count": 1, "note": "first"}])
        db.add(STOCK, [{"name": "a", "count": 5, "note": "second"}, {"name": "b", "count": 5, "note": "b"}])
        db.put(STOCK, [{"name": "b", "count": 2**62}, {"name": "c", "count": 3}])
        db.add(STOCK, [])
        db.put(STOCK, [])
    with database.read() as db:
        rows = [tuple(row) for row in db.execute(select(STOCK).order_by(STOCK.c.name))]
    assert rows == [("a", 1, "first"), ("b", 2**62, "b"), ("c", 3, None)]


def test_a_broken_constraint_is_a_conflict_and_undoes_the_rest(database: Database) -> None:
    def break_it(db: Transaction, rows: list[dict[str, object]]) -> None:
        db.put(STOCK, [{"name": "a", "count": 1}])
        for row in rows:
            db.execute(PARTS.insert(), row)

    for rows in ([{"id": 1, "of": "nobody"}], [{"id": 1}, {"id": 1}]):  # a foreign key; the primary key
        with pytest.raises(Conflict, match="somebody else"):
            database.apply(partial(break_it, rows=rows))
        assert stock(database) == {}


@pytest.mark.parametrize("wrong", [{"name": "a", "count": 2**63}, {"name": "\ud800", "count": 1}])
def test_a_value_that_no_column_holds_is_invalid(database: Database, wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid, match=r"cannot hold a value|out of range|surrogates"):
        database.apply(lambda db: db.put(STOCK, [wrong]))
    assert stock(database) == {}


def test_counters_that_several_threads_count_up_lose_nothing(database: Database, database_url: str) -> None:
    database.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 0}]))

    patient = open_database(database_url, LAYOUT)

    def read_then_write(db: Transaction) -> None:
        count = db.execute(select(STOCK.c.count)).scalar_one()
        db.put(STOCK, [{"name": "a", "count": count + 1}])

    def run() -> None:
        for _ in range(5):
            patient.apply(read_then_write)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    patient.close()
    assert stock(database) == {"a": 20}


def test_a_view_stands_still_while_others_write(database: Database, database_url: str) -> None:
    writer = open_database(database_url, LAYOUT)
    writer.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 1}]))
    with database.read() as db:
        count = select(STOCK.c.count)
        before = db.execute(count).scalar_one()
        writer.apply(add_one)
        assert (before, db.execute(count).scalar_one()) == (1, 1)
    assert stock(database) == {"a": 2}
    writer.close()


def test_whoever_waits_too_long_for_a_lock_hears_a_conflict(database: Database, database_url: str) -> None:
    database.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 1}]))
    other = open_database(database_url, LAYOUT, patience_s=0.05)
    with database.transaction() as db:
        add_one(db)
        with pytest.raises(Conflict, match=r"another process writes|holds a lock"):
            other.apply(add_one)
    other.apply(add_one)
    assert stock(database) == {"a": 3}
    other.close()


def test_transactions_of_different_locks_run_beside_one_another(postgres_url: str) -> None:
    first, second = (open_database(postgres_url, LAYOUT, patience_s=0.1) for _ in range(2))
    first.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 1}, {"name": "b", "count": 1}]))
    with first.transaction("a") as db:
        add_one(db, "a")
        second.apply(lambda db: add_one(db, "b"), lock="b")
        with pytest.raises(Conflict, match="holds a lock"):
            second.apply(lambda db: add_one(db, "b"), lock="a")
    assert stock(first) == {"a": 2, "b": 2}
    first.close()
    second.close()


def test_a_transaction_that_was_broken_off_for_anothers_sake_is_run_again(postgres_url: str) -> None:
    database = open_database(postgres_url, LAYOUT)
    database.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 0}, {"name": "b", "count": 0}]))
    both_began, tries = threading.Barrier(2), []

    def both(names: str) -> None:
        def work(db: Transaction) -> None:
            tries.append(names)
            add_one(db, names[0])
            if tries.count(names) == 1:
                both_began.wait(10)  # each has what the other wants
            add_one(db, names[1])

        database.apply(work, lock=names)

    threads = [threading.Thread(target=both, args=(names,)) for names in ("ab", "ba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(tries), stock(database)) == (3, {"a": 2, "b": 2})
    database.close()


def test_tries_are_bounded(postgres_url: str) -> None:
    database = open_database(postgres_url, LAYOUT)
    tries = []

    def always_late(db: Transaction) -> None:
        tries.append(1)
        db.execute(text("do $$ begin raise exception using errcode = '40001'; end $$"))

    with pytest.raises(Conflict, match="keep changing"):
        database.apply(always_late)
    assert len(tries) == 5
    database.close()


def test_transactions_do_not_nest(database: Database) -> None:
    with database.transaction(), pytest.raises(RuntimeError, match="do not nest"), database.read():
        pass
    assert stock(database) == {}


def test_a_closed_database_is_unavailable(database: Database) -> None:
    database.close()
    with pytest.raises(Unavailable, match="is closed"):
        stock(database)


@pytest.mark.anyio
async def test_work_in_a_thread_is_finished_also_when_its_caller_is_cancelled(database: Database) -> None:
    database.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 1}]))
    started, go_on = threading.Event(), threading.Event()

    def work(db: Transaction) -> None:
        started.set()
        go_on.wait(5)
        add_one(db)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(database.apply_async, work)
        while not started.is_set():
            await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
        go_on.set()
    assert stock(database) == {"a": 2}


def test_name_spaces_do_not_see_each_other(database_url: str) -> None:
    first, second = (open_database(database_url, LAYOUT, schema=name) for name in ("run_1", "run_2"))
    first.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 1}]))
    assert (stock(first), stock(second)) == ({"a": 1}, {})
    first.close()
    second.close()


def test_layouts_share_a_name_space(database: Database, database_url: str) -> None:
    tables = MetaData()
    other_table = Table("others", tables, Column("id", BigInteger, primary_key=True))
    other = open_database(database_url, Layout("others", tables, (lambda connection: None,)))
    other.apply(lambda db: db.put(other_table, [{"id": 1}]))  # nothing to overwrite but the key
    assert stock(database) == {}
    other.close()


def rename(connection: Connection) -> None:
    connection.execute(text("alter table stock rename to goods"))


def double(connection: Connection) -> None:
    connection.execute(text("update goods set count = 2 * count"))


def test_tables_are_brought_forward_once_in_order_and_a_newer_version_is_refused(database_url: str) -> None:
    old = open_database(database_url, LAYOUT)
    old.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 4}]))
    old.close()
    tables = MetaData()
    goods = Table("goods", tables, Column("name", String, primary_key=True), Column("count", BigInteger))
    for _ in range(2):
        new = open_database(database_url, Layout("stock", tables, (rename, double)))
        with new.read() as db:
            assert db.execute(select(goods.c.count)).scalar_one() == 8
        new.close()
    with pytest.raises(Invalid, match=r"stock of version 3, this program knows up to 1"):
        open_database(database_url, LAYOUT)


def test_a_migration_that_fails_changes_nothing(database_url: str) -> None:
    open_database(database_url, LAYOUT).close()

    def fail(connection: Connection) -> None:
        raise Unavailable("pulled the plug")

    with pytest.raises(Unavailable, match="plug"):
        open_database(database_url, Layout("stock", TABLES, (rename, fail)))
    database = open_database(database_url, LAYOUT)
    assert stock(database) == {}
    database.close()


def test_many_may_open_an_empty_database_at_once(database_url: str) -> None:
    opened: list[Database] = []
    threads = [threading.Thread(target=lambda: opened.append(open_database(database_url, LAYOUT))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stock(database) for database in opened] == [{}] * 6
    for database in opened:
        database.close()


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(400)])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "stock.sqlite"
    file.write_bytes(content)
    with pytest.raises(Invalid, match=r"stock\.sqlite is damaged \(.*\): throw it away"):
        open_database(file, Layout("stock", TABLES, remedy="throw it away"))


def test_a_page_that_was_overwritten_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "stock.sqlite"
    database = open_database(file, LAYOUT)
    database.apply(lambda db: db.put(STOCK, [{"name": f"{i:0200}", "count": i} for i in range(200)]))
    database.close()
    data = bytearray(file.read_bytes())
    for page in range(2 * 4096, len(data), 4096):
        data[page : page + 8] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(Invalid, match="is damaged"):
        stock(open_database(file, LAYOUT))


def test_a_full_disk_is_unavailable_and_leaves_what_was_there(tmp_path: Path) -> None:
    database = open_database(tmp_path / "stock.sqlite", LAYOUT)
    database.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 1}]))
    with database.transaction() as db:
        db.execute(text("pragma max_page_count = 10"))
    with pytest.raises(Unavailable, match="the disk is full"):
        database.apply(lambda db: db.put(STOCK, [{"name": f"{i:0900}", "count": i} for i in range(200)]))
    assert stock(database) == {"a": 1}
    database.close()


def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does the folder exist"):
        open_database(tmp_path / "nowhere" / "stock.sqlite", LAYOUT)


def test_a_file_is_set_up_for_its_durability(tmp_path: Path) -> None:
    for durability, level in (("normal", 1), ("full", 2)):
        database = open_database(tmp_path / f"{durability}.sqlite", LAYOUT, durability=durability)  # type: ignore[arg-type]
        with database.read() as db:
            settings = [db.execute(text(f"pragma {name}")).scalar() for name in ("synchronous", "journal_mode")]
        assert settings == [level, "wal"]
        database.close()


def test_a_session_is_set_up_for_its_durability_and_bounds(postgres_url: str) -> None:
    for durability, commit in (("normal", "off"), ("full", "on")):
        database = open_database(postgres_url, LAYOUT, durability=durability, schema="run_1")  # type: ignore[arg-type]
        with database.transaction() as db:
            names = ("synchronous_commit", "search_path", "lock_timeout", "statement_timeout", "transaction_isolation")
            found = [db.execute(select(func.current_setting(name))).scalar() for name in names]
        assert found == [commit, "run_1", "5s", "30s", "read committed"]
        database.close()


def test_an_engine_that_lost_its_server_says_so_and_comes_back(postgres_url: str) -> None:
    import psycopg

    database = open_database(postgres_url, LAYOUT)
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        cut = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"

        def cut_off(db: Transaction) -> None:
            admin.execute(f"{cut} and datname = current_database()")
            db.execute(select(STOCK))

        with pytest.raises(Unavailable):
            database.apply(cut_off)
        database.apply(lambda db: db.put(STOCK, [{"name": "a", "count": 1}]))
        admin.execute(f"{cut} and datname = current_database()")  # between two transactions nobody notices
    assert stock(database) == {"a": 1}
    database.close()


def test_a_file_made_by_another_program_is_not_taken_for_ours(tmp_path: Path) -> None:
    file = tmp_path / "stock.sqlite"
    with sqlite3.connect(file) as other:
        other.execute("create table layouts(x)")
    other.close()
    with pytest.raises(Invalid, match="is damaged"):
        open_database(file, LAYOUT)
