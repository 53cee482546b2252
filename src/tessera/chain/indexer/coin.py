"""Payments in a coin (contracts/coin.vy, or any ERC-20): who paid whom.

Narrow it to a payee, as `payments_to` does: a public coin has more transfers than anybody wants to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tessera.chain.faces import Coin
from tessera.chain.indexer.facts import Reducer, Said, Source
from tessera.chain.indexer.queries import Figure, Queries
from tessera.core.ids import Account, parse_account

__all__ = ["COIN", "Payment", "PaymentsView", "payments_to"]


def _transfer(event: Coin.Transfer) -> Iterator[Said]:
    yield Said("paid", account=event.sender, item=event.receiver, amount=event.value)


COIN = Reducer(
    "coin",
    says={Coin.Transfer: _transfer},
    silent=(Coin.Approval, Coin.AuthorizationUsed, Coin.AuthorizationCanceled),  # a payment's Transfer tells it
)


def payments_to(coin: str, *payees: str, name: str = "coin") -> Source:
    """The coin's transfers to these accounts."""
    topics = tuple(bytes(12) + bytes.fromhex(parse_account(payee)[2:]) for payee in payees)
    return COIN.at(coin, narrow=(None, topics), name=name)


@dataclass(frozen=True, slots=True)
class Payment:
    """One transfer of the coin."""

    payer: Account
    payee: Account
    amount: int
    block: int
    time: int  # seconds since 1970
    tx_hash: str


class PaymentsView:
    """What was paid to whom."""

    def __init__(self, queries: Queries, source: str = "coin") -> None:
        self._queries, self._source = queries, source

    def payments(
        self, payer: Account | None = None, payee: Account | None = None, *, limit: int = 100
    ) -> list[Payment]:
        """The newest first."""
        found = self._queries.facts(self._source, "paid", payer or "", payee or "", limit=limit)
        return [Payment(Account(f.account), Account(f.item), f.amount, f.block, f.time, f.tx_hash) for f in found]

    def total(self) -> Figure:
        """All that this source reads; `count` is the number of payments."""
        return self._queries.figure(self._source, "paid")

    def paid_to(self, payee: Account) -> Figure:
        return self._queries.figure(self._source, "paid", item=payee)

    def by_payer(self) -> dict[Account, Figure]:
        (paid,) = self._queries.by_account(self._source, "paid")
        return {Account(payer): figure for payer, figure in paid.items()}
