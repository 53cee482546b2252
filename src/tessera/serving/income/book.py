"""What a worker keeps on disk of what it served for money: sessions with their vouchers, and receipts.

A restart forgets nothing: what was drawn of a purchase stays drawn, and a receipt stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import BigInteger, Column, MetaData, String, Table, case, delete, func, select

from tessera.core.ids import Account, PeerId
from tessera.serving.income.receipts import Receipt
from tessera.serving.income.vouchers import Terms, Voucher
from tessera.storage.database import Database, Transaction, open_database
from tessera.storage.layout import Layout

__all__ = ["IncomeBook", "Served"]

_TABLES = MetaData()
_SESSIONS = Table(
    "served_sessions",
    _TABLES,
    Column("session", String, primary_key=True),
    Column("gateway", String, nullable=False, index=True),
    Column("purchase", String, nullable=False, index=True),
    Column("expires", BigInteger, nullable=False, index=True),  # seconds since 1970
    Column("opens", BigInteger, nullable=False),  # times that it was begun here
    Column("used", BigInteger, nullable=False),  # tokens that it has here
    Column("fed", BigInteger, nullable=False),  # tokens that we computed, every time that it was begun
    Column("signed", BigInteger, nullable=False),  # tokens that the gateway says it got; 0 = nothing was said
    Column("voucher", String, nullable=False),  # JSON, as it travels
    sqlite_with_rowid=False,
)
_RECEIPTS = Table(
    "serving_receipts",
    _TABLES,
    Column("session", String, primary_key=True),
    Column("worker", String, primary_key=True),
    Column("signer", String, primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    Column("signature", String, nullable=False),
    sqlite_with_rowid=False,
)
_TALLIES = Table(
    "tallies",
    _TABLES,
    Column("tally", BigInteger, primary_key=True, autoincrement=False),
    Column("leaves", String, nullable=False),
)
_LAYOUT = Layout("income", _TABLES)


@dataclass(frozen=True, slots=True)
class Served:
    """One session, as this worker knows it."""

    voucher: Voucher
    opens: int = 0
    used: int = 0
    signed: int = 0
    fed: int = 0


class IncomeBook:
    """One worker's, of one run.

    Args:
        where: a file or a database's URL; `schema` is the name-space in it.

    Raises: Invalid for a damaged file, named; after `close`, every call raises Unavailable.
    """

    def __init__(self, terms: Terms, where: str | Path, *, schema: str = "") -> None:
        self._terms = terms
        self._db: Database = open_database(where, _LAYOUT, schema=schema)

    def session(self, name: str) -> Served | None:
        with self._db.read() as db:
            row = db.execute(select(_SESSIONS).where(_SESSIONS.c.session == name)).one_or_none()
        return None if row is None else self._served(row)

    def save(self, served: Served) -> None:
        voucher = served.voucher
        row = {
            "session": voucher.session,
            "gateway": voucher.gateway,
            "purchase": voucher.purchase.name,
            "expires": voucher.expires,
            "opens": served.opens,
            "used": served.used,
            "fed": served.fed,
            "signed": served.signed,
            "voucher": json.dumps(voucher.to_value()),
        }
        self._db.apply(lambda db: db.put(_SESSIONS, [row]))

    def drawn(self, purchase: str) -> list[Served]:
        """The sessions of one purchase."""
        with self._db.read() as db:
            rows = db.execute(select(_SESSIONS).where(_SESSIONS.c.purchase == purchase)).all()
        return [self._served(row) for row in rows]

    def metered(self, payer: Account) -> list[Served]:
        """The sessions under this payer's metered purchases."""
        names = _SESSIONS.c.purchase.startswith(f"{payer}/permit2:", autoescape=True)
        with self._db.read() as db:
            rows = db.execute(select(_SESSIONS).where(names)).all()
        return [self._served(row) for row in rows]

    def sums(self, gateway: PeerId) -> tuple[int, int]:
        """Tokens that we computed for `gateway`, and those of them for which it has signed."""
        used, signed = _SESSIONS.c.used, _SESSIONS.c.signed
        both = case((used < signed, used), else_=signed)
        query = select(func.coalesce(func.sum(used), 0), func.coalesce(func.sum(both), 0))
        with self._db.read() as db:
            found = list(db.execute(query.where(_SESSIONS.c.gateway == gateway)).one())
        return int(found[0]), int(found[1])

    def ended(self, after: int, until: int) -> list[Voucher]:
        """Vouchers that ended in (after, until], seconds since 1970, by session."""
        when = (_SESSIONS.c.expires > after, _SESSIONS.c.expires <= until)
        with self._db.read() as db:
            rows = db.execute(select(_SESSIONS).where(*when).order_by(_SESSIONS.c.session)).all()
        return [self._served(row).voucher for row in rows]

    def add_receipts(self, receipts: Iterable[Receipt]) -> None:
        """Of several for one session, worker and signer, the largest stays."""
        rows = list(receipts)

        def work(db: Transaction) -> None:
            for receipt in rows:
                key = (
                    _RECEIPTS.c.session == receipt.session,
                    _RECEIPTS.c.worker == receipt.worker,
                    _RECEIPTS.c.signer == receipt.signer,
                )
                db.execute(delete(_RECEIPTS).where(*key, _RECEIPTS.c.tokens < receipt.tokens))
                session, worker, signer, tokens, signature = receipt.to_row()
                db.add(
                    _RECEIPTS,
                    [
                        {
                            "session": session,
                            "worker": worker,
                            "signer": signer,
                            "tokens": tokens,
                            "signature": signature,
                        }
                    ],
                )

        self._db.apply(work)

    def receipts(self, sessions: Iterable[str]) -> list[Receipt]:
        """In order of session, worker and signer."""
        wanted = sorted(set(sessions))
        order = (_RECEIPTS.c.session, _RECEIPTS.c.worker, _RECEIPTS.c.signer)
        found: list[Receipt] = []
        with self._db.read() as db:
            for start in range(0, len(wanted), 500):
                few = select(_RECEIPTS).where(_RECEIPTS.c.session.in_(wanted[start : start + 500])).order_by(*order)
                found += [Receipt.from_row(self._terms.run_id, list(row)) for row in db.execute(few)]
        return found

    def tally(self, number: int) -> str | None:
        """The leaves of a tally, as text."""
        with self._db.read() as db:
            text = db.execute(select(_TALLIES.c.leaves).where(_TALLIES.c.tally == number)).scalar()
        return None if text is None else str(text)

    def save_tally(self, number: int, leaves: str) -> None:
        self._db.apply(lambda db: db.put(_TALLIES, [{"tally": number, "leaves": leaves}]))

    def close(self) -> None:
        self._db.close()

    def _served(self, row: object) -> Served:
        fields = row._mapping  # type: ignore[attr-defined]
        voucher = Voucher.from_value(self._terms, json.loads(fields["voucher"]))
        return Served(voucher, fields["opens"], fields["used"], fields["signed"], fields["fed"])
