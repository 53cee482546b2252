"""Which payments are in flight, owed or in doubt, so that one authorization is worked for once at a time.

The chain is what makes a nonce pay once; this ledger only knows what the chain cannot: that an authorization is being
worked for right now, that one was settled without an answer, or that its settlement got no answer from the chain. In
memory it serves one gateway; in a file it survives a restart; in PostgreSQL several gateways share it.

Invariants: a payment is leased to at most one request of all gateways; a lease ends by itself when its gateway was
killed; that money may move is written down before it does; memories are bounded in number and age, oldest out first.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Float,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    and_,
    delete,
    func,
    insert,
    select,
    text,
    tuple_,
    update,
)

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Unavailable
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.storage.location import MEMORY

__all__ = ["REMEMBER_S", "Lease", "Memory", "PaymentLedger", "PaymentName"]

MAX_REMEMBERED = 4_096
MOST_UNITS = 2**63 - 1
REMEMBER_S = 24 * 3600.0
LEASE_S = 900.0  # longer than any request: two answer timeouts of a gateway, and the settlement

_TABLES = MetaData()
_LEASES = Table(
    "payment_leases",
    _TABLES,
    Column("asset", String, primary_key=True),
    Column("payer", String, primary_key=True),
    Column("nonce", String, primary_key=True),
    Column("token", String, nullable=False),  # the lease's own
    Column("until", Float(53), nullable=False),  # seconds since 1970
    Column("units", BigInteger, nullable=False, server_default="0"),  # the most that will be settled after the work
)
_MEMORIES = Table(
    "payment_memories",
    _TABLES,
    Column("asset", String, primary_key=True),
    Column("payer", String, primary_key=True),
    Column("nonce", String, primary_key=True),
    Column("state", String, nullable=False),
    Column("request", LargeBinary, nullable=False),
    Column("since", Float(53), nullable=False),  # seconds since 1970
)
Index("payment_memories_by_age", _MEMORIES.c.since)


def _add_units(connection: Connection) -> None:
    connection.execute(text("alter table payment_leases add column units bigint not null default 0"))


_LAYOUT = Layout("payments", _TABLES, migrations=(_add_units,))

T = TypeVar("T")
Memory = Literal["owed", "doubtful"]


@dataclass(frozen=True, slots=True)
class PaymentName:
    """An EIP-3009 authorization: a nonce belongs to its payer. Both lower-case hex."""

    payer: str
    nonce: str


@dataclass(frozen=True, slots=True)
class Lease:
    """One request's right to work for a payment.

    Attributes:
        payers_units: what this payer's requests in flight, this one too, will settle at most when they end.
    """

    name: PaymentName
    token: str
    payers_units: int


class PaymentLedger:
    """The payments of one gateway, or of several that share `where`.

    Args:
        asset: the coin, on its chain: a nonce of one says nothing about the same nonce of another.
        where: a file, or a database's URL.
        schema: the name-space in a shared database, the same for all gateways.
        lease_s: more than a request may take. Gateways' clocks should agree within a fraction of it.

    Cost: each method that writes is one transaction, on the disk when it returns.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        max_held_per_payer: int,
        asset: str = "",
        where: str | Path = MEMORY,
        schema: str = "",
        lease_s: float = LEASE_S,
    ) -> None:
        self._clock, self._asset, self._lease_s = clock, asset, lease_s
        self._max_held_per_payer = max_held_per_payer
        self._mine: set[Lease] = set()
        self._db = open_database(where, _LAYOUT, schema=schema, durability="full")
        now = clock.time()
        self._db.apply(lambda db: db.execute(delete(_LEASES).where(_LEASES.c.until <= now)))  # of killed gateways

    @property
    def held(self) -> int:
        """Payments in flight in this process."""
        return len(self._mine)

    async def hold(self, name: PaymentName, units: int = 0) -> Lease:
        """Takes `name` for one request, which will settle at most `units` when it ends.

        Raises: Conflict when it is taken; Unavailable when its payer has too many, or the database is busy.
        """
        token, now = secrets.token_hex(16), self._clock.time()

        def work(db: Transaction) -> Lease | None:
            payer = and_(_LEASES.c.asset == self._asset, _LEASES.c.payer == name.payer)
            db.execute(delete(_LEASES).where(payer, _LEASES.c.until <= now))
            held = {row.nonce: row.units for row in db.execute(select(_LEASES.c.nonce, _LEASES.c.units).where(payer))}
            if name.nonce in held:
                return None
            if len(held) >= self._max_held_per_payer:
                limit = self._max_held_per_payer
                raise Unavailable(f"{limit} payments of this payer are in flight; nothing was charged")
            row = {"token": token, "until": now + self._lease_s, "units": min(units, MOST_UNITS)}
            db.execute(insert(_LEASES), self._key(name) | row)
            return Lease(name, token, sum(held.values()) + units)

        lease = await self._apply(work, name)
        if lease is None:
            raise Conflict("this authorization is already paying for another request")
        self._mine.add(lease)
        return lease

    async def intend(self, lease: Lease, request: bytes) -> bool:
        """Before money moves: renews the lease, and remembers the payment as doubtful for `request`.

        Returns: whether nothing was remembered of it before.

        Raises: Conflict when the lease ended and somebody else may have the payment; Unavailable.
        """
        now = self._clock.time()

        def work(db: Transaction) -> bool | None:
            renewed = update(_LEASES).where(self._is(lease)).values(until=now + self._lease_s)
            if db.execute(renewed.returning(_LEASES.c.token)).first() is None:
                return None
            known = db.execute(select(_MEMORIES.c.state).where(self._of(_MEMORIES, lease.name))).first()
            self._remember(db, lease.name, "doubtful", request, now)
            return known is None

        fresh = await self._apply(work, lease.name)
        if fresh is None:
            raise Conflict("this authorization was held for too long: send it again")
        return fresh

    async def release(self, lease: Lease, outcome: Literal["owed", "forget", "keep"], request: bytes = b"") -> None:
        """The request is over: its payment is owed for `request`, or forgotten, or what is remembered stays."""
        now = self._clock.time()
        self._mine.discard(lease)

        def work(db: Transaction) -> None:
            ours = db.execute(delete(_LEASES).where(self._is(lease)).returning(_LEASES.c.token)).first()
            if ours is None:
                return  # it ended, and what is remembered may be another request's now
            if outcome == "owed":
                self._remember(db, lease.name, "owed", request, now)
            elif outcome == "forget":
                db.execute(delete(_MEMORIES).where(self._of(_MEMORIES, lease.name)))

        await self._apply(work, lease.name)

    async def recall(self, name: PaymentName, request: bytes) -> Memory | None:
        """What is remembered of `name` for exactly this request.

        The request's digest stands in for a secret: after settlement the authorization is public on the chain.
        """
        m, since = _MEMORIES.c, self._clock.time() - REMEMBER_S
        query = select(m.state).where(self._of(_MEMORIES, name), m.request == request, m.since >= since)
        state = await self._apply(lambda db: db.execute(query).scalar(), name)
        return state if state in ("owed", "doubtful") else None

    def close(self) -> None:
        self._db.close()

    async def _apply(self, work: Callable[[Transaction], T], name: PaymentName) -> T:
        """Payers do not wait for one another. A database that is busy says nothing about the payment."""
        try:
            return await self._db.apply_async(work, lock=f"{self._asset}/{name.payer}")
        except Conflict as error:
            raise Unavailable(f"{error.message}; nothing was charged") from error

    def _remember(self, db: Transaction, name: PaymentName, state: Memory, request: bytes, now: float) -> None:
        row = {"state": state, "request": request, "since": now}
        db.put(_MEMORIES, [self._key(name) | row])
        db.execute(delete(_MEMORIES).where(_MEMORIES.c.since < now - REMEMBER_S))
        excess = (db.execute(select(func.count()).select_from(_MEMORIES)).scalar() or 0) - MAX_REMEMBERED
        if excess > 0:
            key = (_MEMORIES.c.asset, _MEMORIES.c.payer, _MEMORIES.c.nonce)
            oldest = select(*key).order_by(_MEMORIES.c.since, *key).limit(excess)
            db.execute(delete(_MEMORIES).where(tuple_(*key).in_(oldest)))

    def _key(self, name: PaymentName) -> dict[str, object]:
        return {"asset": self._asset, "payer": name.payer, "nonce": name.nonce}

    def _of(self, table: Table, name: PaymentName) -> ColumnElement[bool]:
        return and_(*(table.c[column] == value for column, value in self._key(name).items()))

    def _is(self, lease: Lease) -> ColumnElement[bool]:
        return and_(self._of(_LEASES, lease.name), _LEASES.c.token == lease.token)
