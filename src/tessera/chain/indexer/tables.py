"""The index's tables, and the only four ways in which they change: begin, extend, settle, roll back.

Invariants: totals = sums of facts; facts are those of the blocks from the first to `Mark.last`, each stored once; the
hashes of all blocks from `Mark.settled` to `Mark.last` are kept, and no others. Each change happens whole, and only to
tables that stand where the caller saw them, so that several processes may write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Column, Index, MetaData, String, Table, and_, delete, desc, select, tuple_

from tessera.chain.indexer.facts import Fact
from tessera.core.errors import Invalid, Missing
from tessera.storage.database import Transaction
from tessera.storage.layout import Layout

__all__ = ["FACTS", "LAYOUT", "NEWEST", "TOTALS", "Mark", "begin", "claim", "extend", "fact_of", "known", "mark_of",
           "roll_back", "settle"]  # fmt: skip

BATCH = 300  # totals in one query

_TABLES = MetaData()
_META = Table("chain_index", _TABLES, Column("name", String, primary_key=True), Column("value", String, nullable=False))
_BLOCKS = Table(
    "chain_blocks",
    _TABLES,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", String, nullable=False),
)
FACTS = Table(
    "chain_facts",
    _TABLES,
    Column("block", BigInteger, primary_key=True, autoincrement=False),
    Column("log_index", BigInteger, primary_key=True, autoincrement=False),
    Column("source", String, primary_key=True),
    Column("part", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String, nullable=False),
    Column("account", String, nullable=False),
    Column("item", String, nullable=False),
    Column("amount", String, nullable=False),  # decimal: up to 2^256
    Column("detail", String, nullable=False),  # JSON
    Column("tx_hash", String, nullable=False),
    Column("time", BigInteger, nullable=False),  # seconds since 1970
    sqlite_with_rowid=False,
)
NEWEST = (FACTS.c.block, FACTS.c.log_index, FACTS.c.source, FACTS.c.part)  # ascending: read backwards as well
Index("chain_facts_by_kind", FACTS.c.source, FACTS.c.kind, FACTS.c.block, FACTS.c.log_index)
Index("chain_facts_by_account", FACTS.c.account, FACTS.c.block, FACTS.c.log_index)
Index("chain_facts_by_item", FACTS.c.item, FACTS.c.block, FACTS.c.log_index)
TOTALS = Table(
    "chain_totals",  # three for each fact: of its kind, of its account, of its item
    _TABLES,
    Column("source", String, primary_key=True),
    Column("kind", String, primary_key=True),
    Column("account", String, primary_key=True),
    Column("item", String, primary_key=True),
    Column("amount", String, nullable=False),  # decimal
    Column("facts", BigInteger, nullable=False),
    Column("block", BigInteger, nullable=False),  # of the newest fact in it
    Column("log_index", BigInteger, nullable=False),
    Column("tx_hash", String, nullable=False),
    sqlite_with_rowid=False,
)
LAYOUT = Layout("chain_index", _TABLES, remedy="delete it, it is built again")

Key = tuple[str, str, str, str]  # source, kind, account, item


class Mark(NamedTuple):
    """How far the tables reach: `hash` names block `last`; up to `settled` no reorg is followed back."""

    last: int
    hash: str  # empty before the first block
    settled: int


@dataclass(slots=True)
class _Sum:
    amount: int = 0
    facts: int = 0
    newest: Fact | None = None

    def add(self, fact: Fact) -> None:
        self.amount += fact.amount
        self.facts += 1
        self.newest = fact  # they come in order


def begin(db: Transaction, addresses: Mapping[str, str], versions: str, start: int, shown: str) -> None:
    """Make empty tables begin before block `start`; or see that those there are for the same contracts.

    Tables that another version of a reducer filled are emptied. Raises: Invalid for another contract's tables.
    """
    first = {"last": str(start - 1), "hash": "", "settled": str(start - 1), "versions": versions, "start": str(start)}
    named = {f"address {name}": address for name, address in addresses.items()}
    db.add(_META, [{"name": name, "value": value} for name, value in {**first, **named}.items()])
    stored = {row.name: row.value for row in db.execute(select(_META)) if row.name.startswith("address ")}
    for name in sorted({*stored, *named}):
        if stored.get(name) != named.get(name):
            kind = name.removeprefix("address ")
            raise Invalid(f"{shown} indexes another {kind}: {stored.get(name)}, expected {named.get(name, 'none')}")
    if (_meta(db, "versions"), _meta(db, "start")) != (versions, str(start)):
        _clear(db, start)
        _set(db, versions=versions, start=str(start))


def claim(db: Transaction, chain_id: int, shown: str) -> None:
    """Bind the tables to one network. Raises: Invalid when they are bound to another."""
    db.add(_META, [{"name": "chain_id", "value": str(chain_id)}])
    if (stored := _meta(db, "chain_id")) != str(chain_id):
        raise Invalid(f"{shown} indexes the network {stored}, the node is of {chain_id}: correct the URL")


def mark_of(db: Transaction) -> Mark:
    query = select(_META).where(_META.c.name.in_(("last", "hash", "settled")))
    values = {row.name: row.value for row in db.execute(query)}
    return Mark(int(values["last"]), values["hash"], int(values["settled"]))


def known(db: Transaction) -> dict[int, str]:
    """Hashes of the blocks that a reorg may reach, newest first."""
    return {row.number: row.hash for row in db.execute(select(_BLOCKS).order_by(desc(_BLOCKS.c.number)))}


def extend(db: Transaction, seen: Mark, blocks: Sequence[tuple[int, str]], facts: Sequence[Fact]) -> bool:
    """Add blocks, which follow one another and `seen.last`. False when another process was first: look again."""
    if mark_of(db) != seen:
        return False
    _insert(db, facts)
    db.add(_BLOCKS, [{"number": number, "hash": block_hash} for number, block_hash in blocks])
    _set(db, last=str(blocks[-1][0]), hash=blocks[-1][1])
    return True


def settle(db: Transaction, seen: Mark, last: int, block_hash: str, facts: Sequence[Fact]) -> bool:
    """Take the blocks up to `last` as final, with these facts in them. False when another process was first.

    Blocks up to `last` that have been read before are compared: where they said something else, all that is not
    settled is dropped, and read again from there.
    """
    if mark_of(db) != seen:
        return False
    changes = {"settled": str(last)}
    if last > seen.last or known(db).get(last) != block_hash or not _same(db, seen.settled, last, facts):
        _drop(db, seen.settled)
        _insert(db, facts)
        changes |= {"last": str(last), "hash": block_hash}
    db.execute(delete(_BLOCKS).where(_BLOCKS.c.number <= last))
    db.add(_BLOCKS, [{"number": last, "hash": block_hash}])
    _set(db, **changes)
    return True


def roll_back(db: Transaction, seen: Mark, to: int | None) -> bool:
    """Forget what came after block `to`; all of it for None. False when another process was first."""
    if mark_of(db) != seen:
        return False
    if to is None:
        _clear(db, int(_meta(db, "start")))
    else:
        _drop(db, to)
        _set(db, last=str(to), hash=known(db).get(to, ""))
    return True


def fact_of(row: Mapping[str, Any]) -> Fact:
    return Fact(**{**row, "amount": int(row["amount"]), "detail": json.loads(row["detail"])})


def _clear(db: Transaction, start: int) -> None:
    for table in (FACTS, TOTALS, _BLOCKS):
        db.execute(delete(table))
    _set(db, last=str(start - 1), hash="", settled=str(start - 1))


def _same(db: Transaction, after: int, last: int, facts: Sequence[Fact]) -> bool:
    query = select(FACTS).where(FACTS.c.block > after, FACTS.c.block <= last).order_by(*NEWEST)
    return [dict(row) for row in db.execute(query).mappings()] == [_row(fact) for fact in facts]


def _insert(db: Transaction, facts: Sequence[Fact]) -> None:
    if not facts:
        return
    sums = _sums(facts)
    for key, before in _stored(db, sums):
        sums[key].amount += int(before["amount"])
        sums[key].facts += before["facts"]
    db.put(TOTALS, [_total(key, total) for key, total in sums.items()])
    db.add(FACTS, [_row(fact) for fact in facts])


def _drop(db: Transaction, to: int) -> None:
    """Facts after block `to`, and their part in the totals."""
    gone = FACTS.c.block > to
    rows = db.execute(select(FACTS).where(gone).order_by(*NEWEST)).mappings()
    sums = _sums(fact_of(dict(row)) for row in rows)
    db.execute(delete(FACTS).where(gone))
    db.execute(delete(_BLOCKS).where(_BLOCKS.c.number > to))
    left: dict[Key, _Sum] = {}
    for key, before in _stored(db, sums):
        if count := before["facts"] - sums[key].facts:
            left[key] = _Sum(int(before["amount"]) - sums[key].amount, count, _newest(db, key))
    for keys in _batches(sums):
        db.execute(delete(TOTALS).where(_one_of(keys)))
    db.put(TOTALS, [_total(key, total) for key, total in left.items()])


def _sums(facts: Iterable[Fact]) -> dict[Key, _Sum]:
    sums: dict[Key, _Sum] = {}
    for fact in facts:
        for account, item in {("", ""), (fact.account, ""), ("", fact.item)}:
            sums.setdefault((fact.source, fact.kind, account, item), _Sum()).add(fact)
    return sums


def _stored(db: Transaction, keys: Iterable[Key]) -> Iterator[tuple[Key, Mapping[Any, Any]]]:
    for some in _batches(keys):
        for row in db.execute(select(TOTALS).where(_one_of(some))).mappings().all():
            yield (row["source"], row["kind"], row["account"], row["item"]), row


def _batches(keys: Iterable[Key]) -> Iterator[list[Key]]:
    everyone = list(keys)
    for first in range(0, len(everyone), BATCH):
        yield everyone[first : first + BATCH]


def _one_of(keys: Sequence[Key]) -> Any:
    return tuple_(TOTALS.c.source, TOTALS.c.kind, TOTALS.c.account, TOTALS.c.item).in_(keys)


def _newest(db: Transaction, key: Key) -> Fact:
    source, kind, account, item = key
    f = FACTS.c
    which = [f.source == source, f.kind == kind]
    which += [f.account == account] if account else []
    which += [f.item == item] if item else []
    row = db.execute(select(FACTS).where(and_(*which)).order_by(*(desc(c) for c in NEWEST)).limit(1)).mappings().one()
    return fact_of(dict(row))


def _total(key: Key, total: _Sum) -> dict[str, Any]:
    newest = total.newest
    assert newest is not None
    names = dict(zip(("source", "kind", "account", "item"), key, strict=True))
    place = {"block": newest.block, "log_index": newest.log_index, "tx_hash": newest.tx_hash}
    return {**names, "amount": str(total.amount), "facts": total.facts, **place}


def _row(fact: Fact) -> dict[str, Any]:
    return {
        "block": fact.block,
        "log_index": fact.log_index,
        "source": fact.source,
        "part": fact.part,
        "kind": fact.kind,
        "account": fact.account,
        "item": fact.item,
        "amount": str(fact.amount),
        "detail": json.dumps(fact.detail, sort_keys=True),
        "tx_hash": fact.tx_hash,
        "time": fact.time,
    }


def _set(db: Transaction, **values: str) -> None:
    db.put(_META, [{"name": name, "value": value} for name, value in values.items()])


def _meta(db: Transaction, name: str) -> str:
    value = db.execute(select(_META.c.value).where(_META.c.name == name)).scalar()
    if value is None:
        raise Missing(f"the index has no {name}")
    return str(value)
