"""What a share contract says (contracts/model_share.vy): epochs, shares, income."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.chain.faces import ModelShare
from tessera.chain.indexer.coin import PaymentsView, payments_to
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.facts import Reducer, Said, item_id
from tessera.chain.indexer.queries import NOTHING, Figure, Queries
from tessera.chain.types import Chain
from tessera.core.ids import Account

__all__ = ["MODEL_SHARE", "Claim", "Posting", "ShareView", "share_index"]

_NOBODY = "0x" + "00" * 20


def _posted(event: ModelShare.Posted) -> Iterator[Said]:
    detail = {"root": item_id(event.root)}
    yield Said("posted", item=item_id(event.epoch), amount=event.shares, detail=detail)


def _redeemed(event: ModelShare.Redeemed) -> Iterator[Said]:
    yield Said("redeemed", account=event.holder, item=item_id(event.epoch), amount=event.shares)


def _distributed(event: ModelShare.Distributed) -> Iterator[Said]:
    yield Said("distributed", amount=event.income)


def _claimed(event: ModelShare.Claimed) -> Iterator[Said]:
    yield Said("claimed", account=event.holder, amount=event.amount)


def _moved(event: ModelShare.Transfer) -> Iterator[Said]:
    if event.sender != _NOBODY:  # else it is a redemption, told by Redeemed
        yield Said("sent", account=event.sender, amount=event.value)
        yield Said("received", account=event.receiver, amount=event.value)


MODEL_SHARE = Reducer(
    "model_share",
    says={
        ModelShare.Posted: _posted,
        ModelShare.Redeemed: _redeemed,
        ModelShare.Distributed: _distributed,
        ModelShare.Claimed: _claimed,
        ModelShare.Transfer: _moved,
    },
    silent=(ModelShare.Approval,),
)


@dataclass(frozen=True, slots=True)
class Posting:
    """An epoch that was admitted."""

    epoch: int
    root: str  # 0x and 64 hex digits
    shares: int
    redeemed: int  # of its shares, so far
    block: int
    time: int  # seconds since 1970
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Income that was paid out."""

    holder: Account
    amount: int
    block: int
    time: int  # seconds since 1970
    tx_hash: str


class ShareView:
    """One share contract, and what was paid to it."""

    def __init__(self, queries: Queries, source: str = "model_share", coin: str = "coin") -> None:
        self._queries, self._source = queries, source
        self.payments = PaymentsView(queries, coin)

    def postings(self) -> dict[int, Posting]:
        """By epoch."""
        facts = self._queries.facts(self._source, "posted", limit=1_000_000)
        (redeemed,) = self._queries.by_item(self._source, "redeemed")
        return {
            int(f.item): Posting(
                int(f.item), f.detail["root"], f.amount, redeemed.get(f.item, NOTHING).amount,
                f.block, f.time, f.tx_hash,
            )
            for f in reversed(facts)
        }  # fmt: skip

    def balances(self) -> dict[Account, Figure]:
        """Shares in hand: redeemed + received - sent. An account that has given all away is still told."""
        redeemed, received, sent = self._queries.by_account(self._source, "redeemed", "received", "sent")
        return {
            Account(who): redeemed.get(who, NOTHING).plus(received.get(who, NOTHING)).plus(sent.get(who, NOTHING), -1)
            for who in sorted({*redeemed, *received})
        }

    def redeemed(self) -> dict[Account, Figure]:
        """Shares by who earned them."""
        return self._accounts("redeemed")

    def claimed(self) -> dict[Account, Figure]:
        """Income by who was paid."""
        return self._accounts("claimed")

    def claims(self, holder: Account | None = None, *, limit: int = 100) -> list[Claim]:
        """The newest first."""
        found = self._queries.facts(self._source, "claimed", holder or "", limit=limit)
        return [Claim(Account(f.account), f.amount, f.block, f.time, f.tx_hash) for f in found]

    def distributed(self) -> Figure:
        return self._queries.figure(self._source, "distributed")

    def revenue(self) -> Figure:
        """What was paid in; `count` is the number of payments."""
        return self.payments.total()

    def _accounts(self, kind: str) -> dict[Account, Figure]:
        (figures,) = self._queries.by_account(self._source, kind)
        return {Account(who): figure for who, figure in figures.items()}


def share_index(where: str | Path | None, chain: Chain, share: Account, coin: Account, **options: Any) -> Indexer:
    """An index of one share contract and what its coin pays to it; `options` are `Indexer`'s."""
    return Indexer(where, chain, [MODEL_SHARE.at(share), payments_to(coin, share)], **options)
