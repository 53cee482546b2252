"""What a gateway can show its workers for a session: the purchase that pays for it.

A request that is paid for by itself shows its own payment. One that is paid out of prepaid credit shows the payment
that bought the credit, as long as there is something left of it. For all others (the operator's own keys, tokens that
come with shares, what rounding leaves of a credit) the **house** pays: the operator signs a payment of the session's
price to the run's payee, out of his own account. So whatever a gateway gives away, the run is paid for.

Invariants: no more is drawn of a purchase than it buys, as workers count it; a purchase of credit pays for its buyer
alone; the house's payments are put on the chain by the house, and by the workers when it forgets.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import BigInteger, Column, MetaData, String, Table, select, update

from tessera.core.clock import Clock
from tessera.core.errors import TesseraError
from tessera.core.signing import AccountKey
from tessera.serving.income.purchases import Purchases
from tessera.serving.income.vouchers import Payer, Purchase, Terms
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.storage.location import MEMORY

__all__ = ["Purse"]

log = structlog.get_logger()

HOUSE_VALID_S = 3_600  # of a payment that the house signs
MAX_SIGNED = 1_024  # payments of the house for sessions that run, or have brought nothing

_TABLES = MetaData()
_BOUGHT = Table(
    "credit_purchases",
    _TABLES,
    Column("name", String, primary_key=True),
    Column("buyer", String, nullable=False, index=True),
    Column("left", BigInteger, nullable=False),  # units that no session has drawn
    Column("purchase", String, nullable=False),  # JSON
    sqlite_with_rowid=False,
)
_LAYOUT = Layout("purse", _TABLES)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What a session holds of a purchase of credit."""

    name: str
    units: int


class Purse:
    """One gateway's, or that of several on one database.

    Args:
        house: whose account pays for what nobody else pays for.
    """

    def __init__(
        self, terms: Terms, house: AccountKey, clock: Clock, *, where: str | Path = MEMORY, schema: str = ""
    ) -> None:
        self._terms, self._house, self._clock = terms, house, clock
        self._db = open_database(where, _LAYOUT, schema=schema)
        self._drawn: dict[str, _Drawn] = {}  # by session
        self._signed: dict[str, Purchase] = {}  # by the house, by session
        self._unsettled: dict[str, Purchase] = {}

    def add(self, purchase: Purchase) -> None:
        """Somebody has bought credit with it. Said again, nothing changes."""
        row = {
            "name": purchase.name,
            "buyer": purchase.payer,
            "left": purchase.value,
            "purchase": json.dumps(purchase.to_value()),
        }
        self._db.apply(lambda db: db.add(_BOUGHT, [row]))

    def take(self, payer: Payer, session: str, tokens: int) -> Purchase:
        """What pays for `tokens` of `session`."""
        return payer.purchase or self._draw(payer.caller, session, tokens) or self._sign(session, tokens)

    def give_back(self, session: str, tokens: int) -> None:
        """The session is over and took `tokens`. One that is never told of holds what it was given, as workers do.

        What the house signed is due from here on: for a session that brought nothing, nobody has to be paid.
        """
        if (purchase := self._signed.pop(session, None)) is not None:
            self._unsettled[purchase.name] = purchase
        if (drawn := self._drawn.pop(session, None)) is None:
            return
        rest = drawn.units - self._terms.cost_up(tokens)
        if rest > 0:
            left = _BOUGHT.c.left
            more = update(_BOUGHT).where(_BOUGHT.c.name == drawn.name).values(left=left + rest)
            self._db.apply(lambda db: db.execute(more))

    async def settle(self, purchases: Purchases) -> None:
        """Put the house's payments on the chain. What fails stays for the next time, or for the workers."""
        for name, purchase in list(self._unsettled.items()):
            try:
                await purchases.collect(purchase)
                del self._unsettled[name]
            except TesseraError as error:
                log.warning("house_payment_waits", units=str(purchase.value), reason=error.message)
                if self._clock.time() > purchase.valid_before:
                    del self._unsettled[name]

    def close(self) -> None:
        self._db.close()

    def _draw(self, caller: str, session: str, tokens: int) -> Purchase | None:
        """From the first purchase of this buyer that has enough left."""
        units = self._terms.cost_up(tokens)

        def work(db: Transaction) -> str | None:
            enough = (_BOUGHT.c.buyer == caller, _BOUGHT.c.left >= units)
            row = db.execute(select(_BOUGHT).where(*enough).order_by(_BOUGHT.c.name).limit(1)).one_or_none()
            if row is None:
                return None
            db.execute(update(_BOUGHT).where(_BOUGHT.c.name == row.name).values(left=row.left - units))
            return str(row.purchase)

        text = self._db.apply(work)
        if text is None:
            return None
        purchase = Purchase.from_value(json.loads(text))
        self._drawn[session] = _Drawn(purchase.name, units)
        return purchase

    def _sign(self, session: str, tokens: int) -> Purchase:
        """The house pays the session's price."""
        until, units = int(self._clock.time()) + HOUSE_VALID_S, self._terms.cost_up(tokens)
        plain = Purchase(self._house.account, units, 0, until, secrets.token_bytes(32), bytes(65))
        purchase = plain.signed_by(self._house, self._terms)
        while len(self._signed) >= MAX_SIGNED:
            self._signed.pop(next(iter(self._signed)))
        self._signed[session] = purchase
        return purchase
