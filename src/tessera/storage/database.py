"""Tables in SQLite or PostgreSQL, behind one interface that behaves alike on both.

Invariants: a transaction is all or nothing. Those that write take turns, in one process or in many: SQLite locks the
file, and PostgreSQL an advisory lock of the component's (its own optimistic SERIALIZABLE breaks off most writers of
small tables, whose pages they share). Every wait has a bound. What a driver raises leaves as an error of ours.

    books = open_database(Path("books.sqlite"), Layout("books", TABLES))
    with books.transaction() as db:              # one try
        db.add(RECEIPTS, rows)
    total = books.apply(count_up)                # count_up(db) runs again after a deadlock
    with books.read() as db: ...                 # one consistent view; no other process makes it wait

Threads: a `Database` may be used by several; each transaction belongs to one thread, and they do not nest. On SQLite
there is one connection, so that threads take turns. On an event loop a transaction on a file takes 0.2 ms at `normal`
durability and may be run in place; never await inside one. Where others are served meanwhile, use `apply_async`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio.to_thread
from sqlalchemy import Connection, Engine, Executable, Result, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tessera.core.errors import Invalid, Unavailable
from tessera.storage.engine import claim_schema, make_engine, take_turn
from tessera.storage.failures import is_race, translated
from tessera.storage.layout import Layout, prepare
from tessera.storage.location import MEMORY, Dialect, Location, locate

__all__ = ["Database", "Durability", "Transaction", "open_database"]

T = TypeVar("T")
Durability = Literal["normal", "full"]
Row = Mapping[str, Any]

PATIENCE_S = 5.0
TRIES = 5  # of a transaction that the server broke off for another's sake
PAUSE_S = 0.01  # before the second try; doubles each time, with chance


def open_database(
    where: str | Path,
    layout: Layout,
    *,
    schema: str = "",
    durability: Durability = "normal",
    patience_s: float = PATIENCE_S,
) -> Database:
    """Open, or make, the tables of `layout`.

    Args:
        where: a SQLite file, `sqlite:///FILE`, `:memory:`, or `postgresql://USER:PASSWORD@HOST/NAME`.
        schema: the name-space, e.g. one for each run (see `locate`).
        durability: `normal` loses nothing to a killed process, and the last commits to a power cut; `full` waits for
            the disk at every commit.
        patience_s: how long a transaction waits for a lock, or for a connection.

    Raises: Invalid when it is damaged, of a newer version, or refuses us; Conflict while it is locked; Unavailable.
    """
    location = locate(where, schema)
    engine = make_engine(location, durability=durability, patience_s=patience_s)
    database = Database(engine, location, layout)
    try:
        database._open()
    except BaseException:
        database.close()
        raise
    return database


class Transaction:
    """What may be done inside one. Statements are SQLAlchemy Core's; the helpers mean the same on both dialects."""

    __slots__ = ("_dialect", "connection")

    def __init__(self, connection: Connection, dialect: Dialect) -> None:
        self.connection = connection
        self._dialect = dialect

    def execute(self, statement: Executable, rows: Row | Sequence[Row] | None = None) -> Result[Any]:
        return self.connection.execute(statement, rows)

    def add(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert the rows whose primary key is new, all with the same columns; those that are there stay."""
        if rows:
            self.connection.execute(_insert(table, self._dialect).on_conflict_do_nothing(), rows)

    def put(self, table: Table, rows: Sequence[Row]) -> None:
        """Insert rows, all with the same columns; the columns of those that are there are overwritten."""
        keys = [column.name for column in table.primary_key]
        changed = [name for row in rows[:1] for name in row if name not in keys]
        if not changed:
            self.add(table, rows)
            return
        statement = _insert(table, self._dialect)
        values = {name: statement.excluded[name] for name in changed}
        self.connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=values), rows)


class Database:
    """Made by `open_database`."""

    def __init__(self, engine: Engine, location: Location, layout: Layout) -> None:
        self._location, self._layout = location, layout
        self._engine = engine
        view = {"view": True} if location.dialect == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        self._views = engine.execution_options(**view)
        self._inside = threading.local()
        self._closed = False

    @property
    def shown(self) -> str:
        """What to call it in messages; without secrets."""
        return self._location.shown

    @property
    def dialect(self) -> Dialect:
        return self._location.dialect

    @contextmanager
    def transaction(self, lock: str = "") -> Iterator[Transaction]:
        """One try. Commits at the end, rolls back when anything is raised.

        Args:
            lock: which transactions must not run beside this one: those with the same. A component either leaves it
                out, or names it wherever it writes the same rows. SQLite lets none run beside another.

        Raises: Conflict when its turn does not come in time; Unavailable; Invalid.
        """
        with self._translating(), self._writing(lock) as transaction:
            yield transaction

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """One consistent view, which no writer disturbs and which disturbs none. Do not write in it."""
        with self._translating(), self._begun(self._views) as transaction:
            yield transaction

    def apply(self, work: Callable[[Transaction], T], *, lock: str = "") -> T:
        """Run `work` in a transaction, again when the server broke it off: it must do nothing but talk to the database.

        Raises: what `transaction` raises; Conflict after 5 tries (about 0.1 s).
        """
        pause_s = PAUSE_S
        for _ in range(TRIES - 1):
            try:
                with self._translating(races=False), self._writing(lock) as transaction:
                    return work(transaction)
            except DBAPIError:
                time.sleep(random.uniform(0.5, 1.0) * pause_s)  # so that the two do not cross again
                pause_s *= 2
        with self.transaction(lock) as transaction:
            return work(transaction)

    async def apply_async(self, work: Callable[[Transaction], T], *, lock: str = "") -> T:
        """As `apply`, in a thread, so that neither a far server nor a slow disk holds up the event loop.

        Once begun it runs to its end, also when the caller is cancelled: it is never unknown whether it happened.
        """
        if self._location.url.database == MEMORY:
            return self.apply(work, lock=lock)
        return await anyio.to_thread.run_sync(lambda: self.apply(work, lock=lock))

    def close(self) -> None:
        """Let go of files and connections. Whoever asks afterwards hears `Unavailable`."""
        self._closed = True
        self._engine.dispose()

    def _open(self) -> None:
        with self._translating(), self._begun(self._engine) as transaction:
            if self.dialect == "postgresql":
                claim_schema(transaction.connection, self._location.schema)
            prepare(transaction.connection, self._layout, self.shown)

    @contextmanager
    def _translating(self, races: bool = True) -> Iterator[None]:
        """Errors become ours; without `races`, those pass that a second try may cure."""
        try:
            yield
        except SQLAlchemyError as error:
            if not races and is_race(error):
                raise
            raise translated(error, self._location, self._layout.remedy) from error
        except (OverflowError, UnicodeEncodeError) as error:  # SQLite's driver raises them as they are
            raise Invalid(f"{self.shown} cannot hold a value: {error}") from error

    @contextmanager
    def _writing(self, lock: str) -> Iterator[Transaction]:
        with self._begun(self._engine) as transaction:
            if self.dialect == "postgresql":
                take_turn(transaction.connection, f"{self._location.schema}/{self._layout.name}/{lock}")
            yield transaction

    @contextmanager
    def _begun(self, engine: Engine) -> Iterator[Transaction]:
        if self._closed:
            raise Unavailable(f"{self.shown} is closed")
        if getattr(self._inside, "now", False):
            raise RuntimeError("transactions do not nest: pass the open one on")
        self._inside.now = True
        try:
            with engine.connect() as connection, connection.begin():
                yield Transaction(connection, self.dialect)
        finally:
            self._inside.now = False


def _insert(table: Table, dialect: Dialect) -> Any:
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
