"""The indexer: a fold over a share contract's events and its coin's transfers, into SQLite.

Two pure reducers, one for each contract, turn a log into facts; `ShareIndex` stores facts and running totals in one
transaction with the block that they reach, so that it can stop anywhere and go on. Pages and tests read the same
tables, and every number leads to the transaction that proves it.

Invariant: totals = sums of facts; a block's facts are stored once. The file holds nothing that the chain does not: it
can be deleted and built again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessera.chain.faces import Coin, ModelShare
from tessera.chain.types import Chain, Log
from tessera.core.errors import Conflict, Invalid, Missing
from tessera.core.ids import Account, parse_account

__all__ = ["Fact", "Kind", "ShareIndex", "coin_facts", "share_facts"]

Kind = Literal["posted", "redeemed", "received", "sent", "distributed", "claimed", "paid"]

CHUNK_BLOCKS = 5_000  # in one transaction
_SCHEMA = """
create table if not exists meta(name text primary key, value text not null) without rowid;
create table if not exists facts(
    block integer not null, log_index integer not null, part integer not null, kind text not null,
    account text not null, amount text not null, epoch integer, tx_hash text not null,
    primary key(block, log_index, part)
) without rowid;
create table if not exists totals(
    kind text not null, account text not null, amount text not null, primary key(kind, account)
) without rowid;
create index if not exists facts_of on facts(kind, account, block);
"""


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
        path: the file, made when missing; None keeps it in memory.
        from_block: where the contract begins.
        confirmations: blocks that must lie above one before it is read, where a network may take blocks back.

    Raises: `Invalid` for a file that is damaged or indexes another contract; `Conflict` while another process has it.
    """

    def __init__(
        self,
        path: Path | None,
        chain: Chain,
        share: Account,
        coin: Account,
        *,
        from_block: int = 0,
        confirmations: int = 0,
    ) -> None:
        self._chain, self._share, self._coin = chain, parse_account(share), parse_account(coin)
        self._confirmations = confirmations
        self._where = str(path or "memory")
        try:
            self._db = sqlite3.connect(path or ":memory:", timeout=0, isolation_level=None)
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = normal")  # what a power cut takes is read again
            self._db.executescript(_SCHEMA)
            self._begin(from_block)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    async def update(self) -> int:
        """Read on to the chain's present end; returns the last block read.  Cost: two log queries a 5,000 blocks."""
        end = await self._chain.block_number() - self._confirmations
        while (first := self.last_block + 1) <= end:
            last = min(first + CHUNK_BLOCKS - 1, end)
            topics = [Coin.Transfer.TOPIC, None, bytes(12) + bytes.fromhex(self._share[2:])]
            facts = [fact for log in await self._chain.logs(self._share, [], first, last) for fact in share_facts(log)]
            for log in await self._chain.logs(self._coin, topics, first, last):
                facts += coin_facts(log, self._share)
            self._store(facts, first, last)
        return self.last_block

    @property
    def last_block(self) -> int:
        """The last block whose facts are stored."""
        return int(self._meta("last_block"))

    def facts(self, kind: Kind | None = None, account: Account | None = None, *, limit: int = 1_000) -> list[Fact]:
        """The newest first."""
        rows = self._db.execute(
            "select kind, account, amount, epoch, block, log_index, tx_hash from facts"
            " where (?1 is null or kind = ?1) and (?2 is null or account = ?2)"
            " order by block desc, log_index desc, part desc limit ?3",
            (kind, account, limit),
        )
        return [Fact(kind_, who, int(amount), *rest) for kind_, who, amount, *rest in rows]

    def by_account(self, kind: Kind) -> dict[Account, int]:
        """Totals of one kind: `by_account("claimed")`, `by_account("paid")`."""
        rows = self._db.execute("select account, amount from totals where kind = ? order by account", (kind,))
        return {Account(account): int(amount) for account, amount in rows}

    def total(self, kind: Kind) -> int:
        """The sum over all accounts: `total("paid")` is the revenue."""
        return sum(self.by_account(kind).values())

    def count(self, kind: Kind) -> int:
        """How many facts of one kind: `count("paid")` is the number of payments."""
        return int(self._db.execute("select count(*) from facts where kind = ?", (kind,)).fetchone()[0])

    def balances(self) -> dict[Account, int]:
        """Shares in hand: redeemed + received - sent."""
        redeemed, received, sent = (self.by_account(kind) for kind in ("redeemed", "received", "sent"))
        holders = sorted({*redeemed, *received})
        return {who: redeemed.get(who, 0) + received.get(who, 0) - sent.get(who, 0) for who in holders}

    def posted(self) -> dict[int, int]:
        """Shares by epoch."""
        rows = self._db.execute("select epoch, amount from facts where kind = 'posted' order by epoch")
        return {epoch: int(amount) for epoch, amount in rows}

    def close(self) -> None:
        self._db.close()

    def _begin(self, from_block: int) -> None:
        for name, value in (("share", self._share), ("coin", self._coin), ("last_block", str(from_block - 1))):
            self._db.execute("insert or ignore into meta values(?, ?)", (name, value))
        for name, value in (("share", self._share), ("coin", self._coin)):
            if self._meta(name) != value:
                raise Invalid(f"{self._where} indexes another {name}: {self._meta(name)}, expected {value}")

    def _meta(self, name: str) -> str:
        row = self._db.execute("select value from meta where name = ?", (name,)).fetchone()
        if row is None:
            raise Missing(f"the index has no {name}")
        return str(row[0])

    def _store(self, facts: Iterable[Fact], first: int, last: int) -> None:
        """All facts of blocks `first` to `last`, or nothing."""
        try:
            self._db.execute("begin immediate")
            if self.last_block != first - 1:
                raise Conflict(f"somebody else reads into this index: it is at block {self.last_block}")
            for part, fact in enumerate(facts):
                self._insert(part, fact)
            self._db.execute("update meta set value = ? where name = 'last_block'", (str(last),))
            self._db.execute("commit")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("rollback")
            if isinstance(error, sqlite3.Error):
                raise self._translated(error) from error
            raise

    def _insert(self, part: int, fact: Fact) -> None:
        row = (fact.block, fact.log_index, part, fact.kind, fact.account, str(fact.amount), fact.epoch, fact.tx_hash)
        self._db.execute("insert into facts values(?, ?, ?, ?, ?, ?, ?, ?)", row)
        before = self._db.execute(
            "select amount from totals where kind = ? and account = ?", (fact.kind, fact.account)
        ).fetchone()
        amount = str(fact.amount + (int(before[0]) if before else 0))
        self._db.execute("insert or replace into totals values(?, ?, ?)", (fact.kind, fact.account, amount))

    def _translated(self, error: sqlite3.Error) -> Invalid | Conflict:
        if "locked" in str(error):
            return Conflict(f"another process writes the index {self._where}")
        return Invalid(f"the index {self._where} is damaged: delete it, it is built again ({error})")


def _fact(log: Log, kind: Kind, account: str, amount: int, epoch: int | None = None) -> Fact:
    return Fact(kind, account, amount, epoch, log.block_number, log.log_index, log.tx_hash)
