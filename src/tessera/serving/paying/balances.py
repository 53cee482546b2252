"""Integer units that are set aside before work and used up by it: prepaid credit, debts, tokens of a day or an epoch.

A balance has a name and is the sum of its entries, which are only ever appended; each carries the sum so far. What a
request may need is taken from it before any work; when the request ends, what it did not use comes back. When its
gateway was killed in between, all of it comes back once the hold has run out: the buyer loses nothing, and the gateway
at most what its requests in flight were worth.

Invariants: a balance is never below nothing but by a debt, or by as much as its holder is allowed; an entry of one kind
and reference exists once; a hold ends once, by its request or by running out; several gateways on one database see one
balance.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    MetaData,
    String,
    Table,
    and_,
    delete,
    insert,
    select,
)

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.storage.location import MEMORY

__all__ = ["Balance", "Balances", "Entry", "Reserve"]

LEASE_S = 900.0  # longer than any request: two answer timeouts of a gateway, and the settlement
MOST_UNITS = 10**18  # of one entry, and of a sum: what a signed 64-bit column holds, with room

_TABLES = MetaData()
_ENTRIES = Table(
    "balance_entries",
    _TABLES,
    Column("name", String, primary_key=True),
    Column("number", BigInteger, primary_key=True),  # from 1, without a gap
    Column("kind", String, nullable=False),
    Column("reference", String, nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("balance", BigInteger, nullable=False),  # the sum of all units up to here
    Column("time", Float(53), nullable=False),  # seconds since 1970
)
Index("balance_entries_once", _ENTRIES.c.name, _ENTRIES.c.kind, _ENTRIES.c.reference, unique=True)
_HOLDS = Table(
    "balance_holds",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, index=True),
    Column("units", BigInteger, nullable=False),
    Column("until", Float(53), nullable=False),  # seconds since 1970
)
_LAYOUT = Layout("balances", _TABLES)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Balance:
    """`units` can be used; `held` are set aside for requests in flight."""

    units: int
    held: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a balance. `time` in seconds since 1970."""

    number: int
    kind: str
    reference: str
    units: int
    balance: int
    time: float


@dataclass(frozen=True, slots=True)
class Reserve:
    """Units set aside for one request."""

    id: str
    name: str
    units: int


class Balances:
    """The balances of one gateway, or of several that share `where`.

    Args:
        where: a file, or a database's URL.
        schema: the name-space in a shared database, the same for all gateways.
        lease_s: more than a request may take. Gateways' clocks should agree within a fraction of it.

    Cost: each method is one transaction, on the disk when it returns. Requests of one balance take turns; those of
    different ones do not wait for one another on PostgreSQL.
    """

    def __init__(self, clock: Clock, *, where: str | Path = MEMORY, schema: str = "", lease_s: float = LEASE_S) -> None:
        self._clock, self._lease_s = clock, lease_s
        self._db = open_database(where, _LAYOUT, schema=schema, durability="full")

    async def add(self, name: str, kind: str, units: int, reference: str) -> bool:
        """Appends an entry. False, and nothing happens, when there is one of this kind and reference."""
        if type(units) is not int or abs(units) > MOST_UNITS:
            raise Invalid(f"an entry has at most {MOST_UNITS} units, not {units!r}")

        def work(db: Transaction) -> bool:
            if _has(db, name, kind, reference):
                return False
            self._append(db, name, kind, units, reference)
            return True

        return await self._apply(work, name)

    async def hold(self, name: str, units: int, *, allowed: int = 0) -> Reserve | None:
        """Sets `units` aside; None when there are not so many.

        Args:
            allowed: how far the balance may go below nothing, now.
        """
        reserve = Reserve(secrets.token_hex(16), name, units)

        def work(db: Transaction) -> Reserve | None:
            self._end_holds(db, name)
            if not 0 <= units <= _last(db, name)[1] + allowed:
                return None
            self._append(db, name, "held", -units, reserve.id)
            row = {"id": reserve.id, "name": name, "units": units, "until": self._clock.time() + self._lease_s}
            db.execute(insert(_HOLDS), row)
            return reserve

        return await self._apply(work, name)

    async def use(self, reserve: Reserve, units: int) -> int:
        """Ends a hold: `units` of it are used up, and the rest comes back. Once; a second call changes nothing.

        When the hold has run out, and so has come back already, the units are taken from the balance as it is now.

        Returns: the balance.
        """
        if not 0 <= units <= reserve.units:
            raise Invalid(f"{units} units are used of a hold of {reserve.units}")

        def work(db: Transaction) -> int:
            ours = db.execute(delete(_HOLDS).where(_HOLDS.c.id == reserve.id).returning(_HOLDS.c.id)).first()
            if ours is not None:
                self._append(db, reserve.name, "returned", reserve.units - units, reserve.id)
            elif _has(db, reserve.name, "ran_out", reserve.id) and not _has(db, reserve.name, "used_late", reserve.id):
                self._append(db, reserve.name, "used_late", -units, reserve.id)
            return _last(db, reserve.name)[1]

        return await self._apply(work, reserve.name)

    async def read(self, name: str) -> Balance:
        """What there is now; holds of killed gateways that have run out are given back first."""

        def work(db: Transaction) -> Balance:
            self._end_holds(db, name)
            held = db.execute(select(_HOLDS.c.units).where(_HOLDS.c.name == name))
            return Balance(_last(db, name)[1], sum(row.units for row in held))

        return await self._apply(work, name)

    async def last(self, name: str, limit: int) -> list[Entry]:
        """The last entries, newest first."""
        e = _ENTRIES.c
        columns = (e.number, e.kind, e.reference, e.units, e.balance, e.time)
        query = select(*columns).where(e.name == name).order_by(e.number.desc()).limit(limit)
        return await self._apply(lambda db: [Entry(**row) for row in db.execute(query).mappings()], name)

    async def debts(self, name: str, since: float) -> tuple[int, dict[str, int]]:
        """The balance, and the debts since a time that are not known to be paid: units by reference."""
        e = _ENTRIES.c

        def work(db: Transaction) -> tuple[int, dict[str, int]]:
            query = select(e.kind, e.reference, e.units).where(
                e.name == name, e.kind.in_(("debt", "paid")), e.time >= since
            )
            rows = db.execute(query).all()
            paid = {row.reference for row in rows if row.kind == "paid"}
            owed = {row.reference: -row.units for row in rows if row.kind == "debt" and row.reference not in paid}
            return _last(db, name)[1], owed

        return await self._apply(work, name)

    def close(self) -> None:
        self._db.close()

    async def _apply(self, work: Callable[[Transaction], T], name: str) -> T:
        """A database that is busy says nothing about the balance."""
        try:
            return await self._db.apply_async(work, lock=name)
        except Conflict as error:
            raise Unavailable(f"{error.message}; nothing was charged") from error

    def _append(self, db: Transaction, name: str, kind: str, units: int, reference: str) -> None:
        number, balance = _last(db, name)
        if abs(balance + units) > MOST_UNITS:
            raise Invalid(f"a balance is at most {MOST_UNITS} units, not {balance + units}")
        row = {"kind": kind, "reference": reference, "units": units, "balance": balance + units}
        db.execute(insert(_ENTRIES), {"name": name, "number": number + 1, "time": self._clock.time()} | row)

    def _end_holds(self, db: Transaction, name: str) -> None:
        """What killed gateways held comes back."""
        ended = and_(_HOLDS.c.name == name, _HOLDS.c.until <= self._clock.time())
        for row in db.execute(delete(_HOLDS).where(ended).returning(_HOLDS.c.id, _HOLDS.c.units)).all():
            self._append(db, name, "ran_out", row.units, row.id)


def _last(db: Transaction, name: str) -> tuple[int, int]:
    """The number and the balance of the last entry."""
    e = _ENTRIES.c
    row = db.execute(select(e.number, e.balance).where(e.name == name).order_by(e.number.desc()).limit(1)).first()
    return (0, 0) if row is None else (row.number, row.balance)


def _has(db: Transaction, name: str, kind: str, reference: str) -> bool:
    e = _ENTRIES.c
    query = select(e.number).where(e.name == name, e.kind == kind, e.reference == reference)
    return db.execute(query).first() is not None
