"""Tables in SQLite or PostgreSQL, behind one interface that behaves alike on both.

Invariants: a transaction is all or nothing, and serializable: its result is that of running one after the other. Every
wait has a bound. What a driver raises leaves as an error of ours (`failures`).

    books = open_database(Path("books.sqlite"), Layout("books", TABLES))
    with books.transaction() as db:              # one try: Conflict when somebody else was first
        db.add(RECEIPTS, rows)
    total = books.apply(count_up)                # count_up(db) runs again when two transactions crossed
    with books.read() as db: ...                 # one consistent view

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
from tessera.storage.engine import claim_schema, make_engine
from tessera.storage.failures import is_race, translated
from tessera.storage.layout import Layout, prepare
from tessera.storage.location import MEMORY, Dialect, Location, locate

__all__ = ["Database", "Durability", "Transaction", "open_database"]

T = TypeVar("T")
Durability = Literal["normal", "full"]
Row = Mapping[str, Any]

PATIENCE_S = 5.0
TRIES = 12  # of a transaction that crosses others
PAUSE_S = 0.002  # before the second; doubles each time up to 0.1 s, with chance
MAX_PAUSE_S = 0.1


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
        self._views, self._making = engine, engine
        if location.dialect == "sqlite":
            self._views = engine.execution_options(view=True)
        else:
            self._views = engine.execution_options(isolation_level="REPEATABLE READ")
            self._making = engine.execution_options(isolation_level="READ COMMITTED")
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
    def transaction(self) -> Iterator[Transaction]:
        """One try. Commits at the end, rolls back when anything is raised.

        Raises: Conflict when a lock is not free in time, or somebody else changed what was read; Unavailable; Invalid.
        """
        with self._translating(), self._begun(self._engine) as transaction:
            yield transaction

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """One consistent view, which no writer disturbs and which disturbs none. Do not write in it."""
        with self._translating(), self._begun(self._views) as transaction:
            yield transaction

    def apply(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction, again when it crossed another's: it must do nothing but talk to the database.

        Raises: what `transaction` raises; Conflict after 12 tries (about 0.7 s).
        """
        pause_s = PAUSE_S
        for _ in range(TRIES - 1):
            try:
                with self._translating(races=False), self._begun(self._engine) as transaction:
                    return work(transaction)
            except DBAPIError:
                time.sleep(random.uniform(0.5, 1.0) * pause_s)  # so that the two do not cross again
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        with self.transaction() as transaction:
            return work(transaction)

    async def apply_async(self, work: Callable[[Transaction], T]) -> T:
        """As `apply`, in a thread, so that neither a far server nor a slow disk holds up the event loop.

        Once begun it runs to its end, also when the caller is cancelled: it is never unknown whether it happened.
        """
        if self._location.url.database == MEMORY:
            return self.apply(work)
        return await anyio.to_thread.run_sync(self.apply, work)

    def close(self) -> None:
        """Let go of files and connections. Whoever asks afterwards hears `Unavailable`."""
        self._closed = True
        self._engine.dispose()

    def _open(self) -> None:
        with self._translating(), self._begun(self._making) as transaction:
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
