"""The indexer: a fold over a share contract's events and its coin's transfers, into tables.

Two pure reducers, one for each contract, turn a log into facts; `ShareIndex` stores facts and running totals in one
transaction with the block that they reach, so that it can stop anywhere and go on. Pages and tests read the same
tables, and every number leads to the transaction that proves it.

Invariant: totals = sums of facts; a block's facts are stored once, also where several processes read into one database.
The tables hold nothing that the chain does not: they can be deleted and built again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sqlalchemy import BigInteger, Column, Index, MetaData, String, Table, desc, func, select, update

from tessera.chain.faces import Coin, ModelShare
from tessera.chain.types import Chain, Log
from tessera.core.errors import Invalid, Missing
from tessera.core.ids import Account, parse_account
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.storage.location import MEMORY

__all__ = ["Fact", "Kind", "ShareIndex", "coin_facts", "share_facts"]

Kind = Literal["posted", "redeemed", "received", "sent", "distributed", "claimed", "paid"]

CHUNK_BLOCKS = 5_000  # in one transaction

_TABLES = MetaData()
_META = Table("index_meta", _TABLES, Column("name", String, primary_key=True), Column("value", String, nullable=False))
_FACTS = Table(
    "index_facts",
    _TABLES,
    Column("block", BigInteger, primary_key=True, autoincrement=False),
    Column("log_index", BigInteger, primary_key=True, autoincrement=False),
    Column("part", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String, nullable=False),
    Column("account", String, nullable=False),
    Column("amount", String, nullable=False),  # decimal: up to 2^256
    Column("epoch", BigInteger),
    Column("tx_hash", String, nullable=False),
    sqlite_with_rowid=False,
)
_NEWEST = (_FACTS.c.block, _FACTS.c.log_index, _FACTS.c.part)  # ascending: an index is read backwards as well
Index("index_facts_by_kind", _FACTS.c.kind, *_NEWEST)
Index("index_facts_by_account", _FACTS.c.account, *_NEWEST)
_TOTALS = Table(
    "index_totals",
    _TABLES,
    Column("kind", String, primary_key=True),
    Column("account", String, primary_key=True),
    Column("amount", String, nullable=False),  # decimal
    sqlite_with_rowid=False,
)
_LAYOUT = Layout("share_index", _TABLES, remedy="delete it, it is built again")


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that happened.

    posted: an epoch's shares. redeemed: `account` got its leaf. received / sent: shares moved between accounts.
    distributed: income spread over all shares. claimed: `account` was paid. paid: `account` paid in (a buyer).
    """

    kind: Kind
    account: str  # empty where nobody in particular is meant
    amount: int
    epoch: int | None
    block: int
    log_index: int
    tx_hash: str


def share_facts(log: Log) -> list[Fact]:
    """What an event of the share contract says. Events that change nothing of ours say nothing."""
    topic = log.topics[0] if log.topics else b""
    if topic == ModelShare.Posted.TOPIC:
        posted = ModelShare.Posted.decode(log)
        return [_fact(log, "posted", "", posted.shares, posted.epoch)]
    if topic == ModelShare.Redeemed.TOPIC:
        redeemed = ModelShare.Redeemed.decode(log)
        return [_fact(log, "redeemed", redeemed.holder, redeemed.shares, redeemed.epoch)]
    if topic == ModelShare.Distributed.TOPIC:
        return [_fact(log, "distributed", "", ModelShare.Distributed.decode(log).income)]
    if topic == ModelShare.Claimed.TOPIC:
        claimed = ModelShare.Claimed.decode(log)
        return [_fact(log, "claimed", claimed.holder, claimed.amount)]
    if topic == ModelShare.Transfer.TOPIC:
        move = ModelShare.Transfer.decode(log)
        if int(move.sender, 16) == 0:
            return []  # a redemption, told by Redeemed
        return [_fact(log, "sent", move.sender, move.value), _fact(log, "received", move.receiver, move.value)]
    return []


def coin_facts(log: Log, share: Account) -> list[Fact]:
    """What a transfer of the coin means to the share contract: income, or nothing (claims tell themselves)."""
    if not log.topics or log.topics[0] != Coin.Transfer.TOPIC:
        return []
    payment = Coin.Transfer.decode(log)
    return [_fact(log, "paid", payment.sender, payment.value)] if payment.receiver == share else []


class ShareIndex:
    """Facts and totals of one share contract.

    Args:
        where: a file, made when missing, or a database's URL; None keeps it in memory.
        schema: the name-space in a shared database, one for each contract.
        from_block: where the contract begins.
        confirmations: blocks that must lie above one before it is read, where a network may take blocks back.

    Raises: `Invalid` for a file that is damaged or indexes another contract; `Conflict` while it is locked.
    """

    def __init__(
        self,
        where: str | Path | None,
        chain: Chain,
        share: Account,
        coin: Account,
        *,
        schema: str = "",
        from_block: int = 0,
        confirmations: int = 0,
    ) -> None:
        self._chain, self._share, self._coin = chain, parse_account(share), parse_account(coin)
        self._confirmations = confirmations
        self._db = open_database(where or MEMORY, _LAYOUT, schema=schema)
        try:
            self._db.apply(lambda db: self._begin(db, from_block))
        except BaseException:
            self._db.close()
            raise

    async def update(self) -> int:
        """Read on to the chain's present end; returns the last block read.  Cost: two log queries a 5,000 blocks."""
        end = await self._chain.block_number() - self._confirmations
        while (first := self.last_block + 1) <= end:
            last = min(first + CHUNK_BLOCKS - 1, end)
            topics = [Coin.Transfer.TOPIC, None, bytes(12) + bytes.fromhex(self._share[2:])]
            facts = [fact for log in await self._chain.logs(self._share, [], first, last) for fact in share_facts(log)]
            for log in await self._chain.logs(self._coin, topics, first, last):
                facts += coin_facts(log, self._share)
            self._db.apply(partial(_store, facts=facts, first=first, last=last))
        return self.last_block

    @property
    def last_block(self) -> int:
        """The last block whose facts are stored."""
        with self._db.read() as db:
            return _last_block(db)

    def facts(self, kind: Kind | None = None, account: Account | None = None, *, limit: int = 1_000) -> list[Fact]:
        """The newest first."""
        f = _FACTS.c
        query = select(f.kind, f.account, f.amount, f.epoch, f.block, f.log_index, f.tx_hash)
        if kind is not None:
            query = query.where(f.kind == kind)
        if account is not None:
            query = query.where(f.account == account)
        query = query.order_by(*(desc(column) for column in _NEWEST)).limit(limit)
        with self._db.read() as db:
            rows = db.execute(query).all()
        return [Fact(**(row._asdict() | {"amount": int(row.amount)})) for row in rows]

    def by_account(self, kind: Kind) -> dict[Account, int]:
        """Totals of one kind: `by_account("claimed")`, `by_account("paid")`."""
        with self._db.read() as db:
            return _by_account(db, kind)

    def total(self, kind: Kind) -> int:
        """The sum over all accounts: `total("paid")` is the revenue."""
        return sum(self.by_account(kind).values())

    def count(self, kind: Kind) -> int:
        """How many facts of one kind: `count("paid")` is the number of payments."""
        with self._db.read() as db:
            return int(db.execute(select(func.count()).where(_FACTS.c.kind == kind)).scalar_one())

    def balances(self) -> dict[Account, int]:
        """Shares in hand: redeemed + received - sent."""
        with self._db.read() as db:
            redeemed, received, sent = (_by_account(db, kind) for kind in ("redeemed", "received", "sent"))
        holders = sorted({*redeemed, *received})
        return {who: redeemed.get(who, 0) + received.get(who, 0) - sent.get(who, 0) for who in holders}

    def posted(self) -> dict[int, int]:
        """Shares by epoch."""
        query = select(_FACTS.c.epoch, _FACTS.c.amount).where(_FACTS.c.kind == "posted").order_by(_FACTS.c.epoch)
        with self._db.read() as db:
            return {row.epoch: int(row.amount) for row in db.execute(query)}

    def close(self) -> None:
        self._db.close()

    def _begin(self, db: Transaction, from_block: int) -> None:
        facts = {"share": self._share, "coin": self._coin, "last_block": str(from_block - 1)}
        db.add(_META, [{"name": name, "value": value} for name, value in facts.items()])
        for name in ("share", "coin"):
            if (stored := _meta(db, name)) != facts[name]:
                raise Invalid(f"{self._db.shown} indexes another {name}: {stored}, expected {facts[name]}")


def _store(db: Transaction, facts: Sequence[Fact], first: int, last: int) -> None:
    """All facts of blocks `first` to `last`; or nothing, when another process has read them meanwhile."""
    if _last_block(db) != first - 1:
        return
    added = Counter[tuple[str, str]]()
    for fact in facts:
        added[fact.kind, fact.account] += fact.amount
    before = {
        (kind, account): n for kind in {kind for kind, _ in added} for account, n in _by_account(db, kind).items()
    }
    changed = ((kind, who, str(before.get((kind, Account(who)), 0) + n)) for (kind, who), n in added.items())
    db.put(_TOTALS, [{"kind": kind, "account": who, "amount": amount} for kind, who, amount in changed])
    db.add(_FACTS, [_row(part, fact) for part, fact in enumerate(facts)])
    db.execute(update(_META).where(_META.c.name == "last_block").values(value=str(last)))


def _fact(log: Log, kind: Kind, account: str, amount: int, epoch: int | None = None) -> Fact:
    return Fact(kind, account, amount, epoch, log.block_number, log.log_index, log.tx_hash)


def _row(part: int, fact: Fact) -> dict[str, object]:
    return {
        "block": fact.block,
        "log_index": fact.log_index,
        "part": part,
        "kind": fact.kind,
        "account": fact.account,
        "amount": str(fact.amount),
        "epoch": fact.epoch,
        "tx_hash": fact.tx_hash,
    }


def _by_account(db: Transaction, kind: str) -> dict[Account, int]:
    query = select(_TOTALS.c.account, _TOTALS.c.amount).where(_TOTALS.c.kind == kind).order_by(_TOTALS.c.account)
    return {Account(row.account): int(row.amount) for row in db.execute(query)}


def _last_block(db: Transaction) -> int:
    return int(_meta(db, "last_block"))


def _meta(db: Transaction, name: str) -> str:
    value = db.execute(select(_META.c.value).where(_META.c.name == name)).scalar()
    if value is None:
        raise Missing(f"the index has no {name}")
    return str(value)
