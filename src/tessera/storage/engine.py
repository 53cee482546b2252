"""SQLAlchemy engines, set up so that both databases behave alike: writers take turns, and waits have bounds."""

from __future__ import annotations

import sqlite3
import time
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.pool import QueuePool

from tessera.core.errors import Invalid
from tessera.storage.location import Location

__all__ = ["claim_schema", "make_engine", "take_turn"]

CONNECT_S = 5
STATEMENT_S = 30
IDLE_S = 60  # a transaction that stands still this long is broken off by the server: its locks are others' too
MAX_CONNECTIONS = 4  # of one process, for one component

_LOCK = text("select pg_advisory_xact_lock(hashtextextended('tessera ' || :name, 0))")


def make_engine(location: Location, *, durability: Literal["normal", "full"], patience_s: float) -> Engine:
    """An engine that has not connected yet. Raises: Invalid without PostgreSQL's driver."""
    if location.dialect == "sqlite":
        return _sqlite(location, durability, patience_s)
    return _postgres(location, durability, patience_s)


def _sqlite(location: Location, durability: str, patience_s: float) -> Engine:
    engine = create_engine(
        location.url,
        connect_args={"check_same_thread": False, "timeout": patience_s, "isolation_level": None},
        poolclass=QueuePool,  # of one connection: threads take turns, and a database in memory stays
        pool_size=1,
        max_overflow=0,
        pool_timeout=max(patience_s, 0.001),
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: sqlite3.Connection, record: Any) -> None:
        _write_ahead(connection, patience_s)
        connection.execute(f"pragma synchronous = {durability}")
        connection.execute("pragma foreign_keys = on")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # The driver is in autocommit. A writer locks at once: one that has read already could not wait for the lock.
        view = connection.get_execution_options().get("view")
        connection.exec_driver_sql("begin" if view else "begin immediate")

    return engine


def _write_ahead(connection: sqlite3.Connection, patience_s: float) -> None:
    """Turning it on takes the file for oneself, and SQLite does not wait for that as it does for other locks."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            connection.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.005)


def _postgres(location: Location, durability: str, patience_s: float) -> Engine:
    try:
        import psycopg
    except ImportError as error:  # also when it finds no libpq
        raise Invalid("PostgreSQL's driver is missing: pip install 'tessera-network[postgres]'") from error
    settings = {
        "search_path": location.schema,
        "lock_timeout": f"{max(1, round(patience_s * 1000))}",  # ms; 0 would mean: for ever
        "statement_timeout": f"{STATEMENT_S * 1000}",
        "idle_in_transaction_session_timeout": f"{IDLE_S * 1000}",
        "synchronous_commit": "on" if durability == "full" else "off",
    }
    given = location.url.query.get("options", "")
    options = [given] if isinstance(given, str) else list(given)
    options += [f"-c {name}={value}" for name, value in settings.items()]
    connect_args = {"options": " ".join(options), "connect_timeout": CONNECT_S, "application_name": "tessera"}
    connect_args |= {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    connect_args["tcp_user_timeout"] = STATEMENT_S * 1000
    return create_engine(
        location.url.difference_update_query(["options"]),
        module=psycopg,
        connect_args=connect_args,
        isolation_level="READ COMMITTED",  # each statement sees what those before us in `take_turn` have written
        pool_size=1,  # one stays open; the others are closed after use
        max_overflow=MAX_CONNECTIONS - 1,
        pool_timeout=max(patience_s, 0.001),
        pool_pre_ping=True,  # a server that was restarted is met with a new connection
        hide_parameters=True,
    )


def take_turn(connection: Connection, name: str) -> None:
    """Wait for the transactions of this name that are before us, and hold off later ones until ours ends."""
    connection.execute(_LOCK, {"name": name})


def claim_schema(connection: Connection, schema: str) -> None:
    """Make the schema, and keep other openers of it out until the transaction ends: tables are made once."""
    take_turn(connection, schema)
    if not connection.scalar(text("select 1 from pg_namespace where nspname = :name"), {"name": schema}):
        connection.execute(text(f'create schema "{schema}"'))
