"""Questions to the index's tables that are the same for every contract; each contract's view is built of them.

Every answer is as of one moment: no block is half in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import desc, select, tuple_

from tessera.chain.indexer.facts import Fact
from tessera.chain.indexer.tables import FACTS, NEWEST, TOTALS, Mark, fact_of, known, mark_of
from tessera.storage.database import Database, Transaction

__all__ = ["NOTHING", "Figure", "Queries"]

BATCH = 300  # items in one query


@dataclass(frozen=True, slots=True)
class Figure:
    """A sum of facts, and the newest transaction that moved it."""

    amount: int
    count: int  # of facts
    block: int
    log_index: int
    tx_hash: str

    def plus(self, other: Figure, sign: int = 1) -> Figure:
        """Both together; proven by the later one's transaction."""
        later = max(self, other, key=lambda figure: (figure.block, figure.log_index))
        amount, count = self.amount + sign * other.amount, self.count + other.count
        return Figure(amount, count, later.block, later.log_index, later.tx_hash)


NOTHING = Figure(0, 0, -1, -1, "")


class Queries:
    """Reads only; any number may be open."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def mark(self) -> Mark:
        with self._db.read() as db:
            return mark_of(db)

    def known(self) -> dict[int, str]:
        """Hashes of the blocks that a reorg may reach, newest first."""
        with self._db.read() as db:
            return known(db)

    def facts(
        self,
        source: str = "",
        kind: str = "",
        account: str = "",
        item: str = "",
        *,
        limit: int = 1_000,
        before: Fact | None = None,
    ) -> list[Fact]:
        """The newest first; empty means any.

        Args:
            before: the last one of the page that came before this one.
        """
        wanted = {"source": source, "kind": kind, "account": account, "item": item}
        query = select(FACTS).where(*(FACTS.c[name] == value for name, value in wanted.items() if value))
        if before is not None:
            query = query.where(tuple_(*NEWEST) < before.place)
        query = query.order_by(*(desc(column) for column in NEWEST)).limit(limit)
        with self._db.read() as db:
            return [fact_of(dict(row)) for row in db.execute(query).mappings()]

    def histories(self, source: str, items: Sequence[str], kinds: Sequence[str] = ()) -> dict[str, list[Fact]]:
        """What happened to each item, the oldest first; without `kinds`, all of it."""
        found: dict[str, list[Fact]] = {item: [] for item in items}
        with self._db.read() as db:
            for first in range(0, len(items), BATCH):
                some = items[first : first + BATCH]
                query = select(FACTS).where(FACTS.c.item.in_(some), FACTS.c.source == source).order_by(*NEWEST)
                query = query.where(FACTS.c.kind.in_(kinds)) if kinds else query
                for row in db.execute(query).mappings():
                    found[row["item"]].append(fact_of(dict(row)))
        return found

    def figure(self, source: str, kind: str, *, account: str = "", item: str = "") -> Figure:
        """Of a kind, of an account, or of an item: give one of the two, or neither."""
        t = TOTALS.c
        which = (t.source == source, t.kind == kind, t.account == account, t.item == item)
        with self._db.read() as db:
            row = db.execute(select(TOTALS).where(*which)).mappings().one_or_none()
        return NOTHING if row is None else _figure(row)

    def by_account(self, source: str, *kinds: str) -> list[dict[str, Figure]]:
        """For each kind the figure of every account that has one."""
        with self._db.read() as db:
            return [_figures(db, source, kind, "account") for kind in kinds]

    def by_item(self, source: str, *kinds: str) -> list[dict[str, Figure]]:
        with self._db.read() as db:
            return [_figures(db, source, kind, "item") for kind in kinds]


def _figures(db: Transaction, source: str, kind: str, by: str) -> dict[str, Figure]:
    column = TOTALS.c[by]
    query = select(TOTALS).where(TOTALS.c.source == source, TOTALS.c.kind == kind, column != "").order_by(column)
    return {row[by]: _figure(row) for row in db.execute(query).mappings()}


def _figure(row: Mapping[str, Any] | Any) -> Figure:
    return Figure(int(row["amount"]), row["facts"], row["block"], row["log_index"], row["tx_hash"])
