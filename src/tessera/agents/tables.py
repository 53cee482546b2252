"""The tables of money and runs: rows are added and never changed, and the database itself refuses anything else."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Connection, Index, LargeBinary, MetaData, String, Table, Text, event, text

from tessera.storage.layout import Layout

__all__ = [
    "APPROVAL_GRANTS",
    "APPROVAL_REQUESTS",
    "APPROVAL_VERDICTS",
    "CHARGES",
    "ENDS",
    "EVENTS",
    "INTENTS",
    "LAYOUT",
    "MANDATES",
    "NOTES",
    "PINS",
    "RUNS",
    "STEPS",
    "STOPS",
    "TURNS",
]

_TABLES = MetaData()


def _big(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


MANDATES = Table(
    "agent_mandates",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("parent", String, nullable=False),
    Column("signed", LargeBinary, nullable=False),
    _big("at_ms"),
)
STOPS = Table(
    "agent_stops",
    _TABLES,
    Column("mandate", String, primary_key=True),  # "agent/NAME" stops an agent, "" everything
    Column("reason", String, nullable=False),
    _big("at_ms"),
)
INTENTS = Table(
    "agent_intents",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("mandate", String, nullable=False),
    Column("terms", LargeBinary, nullable=False),  # canonical
    _big("at_ms"),
)
EVENTS = Table(
    "agent_events",
    _TABLES,
    Column("intent", String, primary_key=True),
    Column("kind", String, primary_key=True),  # signed, consumed or released
    Column("turn", BigInteger, primary_key=True, autoincrement=False),
    Column("detail", LargeBinary, nullable=False),  # canonical
    _big("at_ms"),
)
CHARGES = Table(  # what counts against a mandate and those above it; an amount may exceed 64 bits
    "agent_charges",
    _TABLES,
    Column("mandate", String, primary_key=True),
    Column("intent", String, primary_key=True),
    Column("units", String, nullable=False),
)
Index("agent_charges_by_intent", CHARGES.c.intent)
ENDS = Table(  # an intent ends once, in one of two ways
    "agent_ends",
    _TABLES,
    Column("intent", String, primary_key=True),
    Column("kind", String, nullable=False),  # consumed or released
    _big("at_ms"),
)
Index("agent_ends_by_time", ENDS.c.at_ms)
APPROVAL_REQUESTS = Table(
    "agent_approval_requests",
    _TABLES,
    Column("call", String, primary_key=True),  # the digest of the call
    Column("body", LargeBinary, nullable=False),  # canonical
    _big("expires_at"),
    _big("at_ms"),
)
APPROVAL_VERDICTS = Table(
    "agent_approval_verdicts",
    _TABLES,
    Column("call", String, primary_key=True),
    Column("kind", String, primary_key=True),  # used or denied
    _big("at_ms"),
)
APPROVAL_GRANTS = Table(  # signed, and not used yet
    "agent_approval_grants",
    _TABLES,
    Column("call", String, primary_key=True),
    Column("signature", LargeBinary, primary_key=True),
    _big("expires_at"),
    _big("at_ms"),
)
RUNS = Table(
    "agent_runs",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("agent", String, nullable=False),
    Column("request", Text, nullable=False),
    _big("at_ms"),
)
TURNS = Table(  # which process goes on with a run: the latest
    "agent_turns",
    _TABLES,
    Column("run", String, primary_key=True),
    Column("turn", BigInteger, primary_key=True, autoincrement=False),
    _big("at_ms"),
)
STEPS = Table(
    "agent_steps",
    _TABLES,
    Column("run", String, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String, nullable=False),
    Column("body", LargeBinary, nullable=False),  # JSON
    _big("at_ms"),
)
PINS = Table(  # what an agent's tools were when they were accepted; the latest counts
    "agent_pins",
    _TABLES,
    Column("agent", String, primary_key=True),
    Column("tool", String, primary_key=True),
    Column("turn", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", String, nullable=False),
    _big("at_ms"),
)
NOTES = Table(  # what an agent remembers: the oldest are forgotten, so these rows may go
    "agent_notes",
    _TABLES,
    Column("agent", String, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("origin", String, nullable=False),
    Column("note", Text, nullable=False),
    _big("at_ms"),
)


def _protect(table: Table, connection: Connection, **_: object) -> None:
    """Triggers by which both databases refuse to change or delete rows."""
    name, refusal = table.name, f"{table.name}: rows are never changed"
    if connection.dialect.name == "sqlite":
        statements = [
            f"create trigger {name}_{action} before {action} on {name} begin select raise(abort, '{refusal}'); end"
            for action in ("update", "delete")
        ]
    else:
        body = f"begin raise exception '{refusal}'; end"
        statements = [
            f"create or replace function {name}_keep() returns trigger language plpgsql as $${body}$$",
            f"create trigger {name}_keep before update or delete or truncate on {name} "
            f"for each statement execute function {name}_keep()",
        ]
    for statement in statements:
        connection.execute(text(statement))


for _table in _TABLES.sorted_tables:
    if _table is not NOTES:
        event.listen(_table, "after_create", _protect)
LAYOUT = Layout(
    "agents",
    _TABLES,
    remedy="restore it from your backup; a new file forgets what was paid",
    migrations=(_TABLES.create_all,),  # version 2: grants, runs, pins and notes
)
