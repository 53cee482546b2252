"""What an income split says (contracts/income_split.vy): what it divided, tallies and their proposals, and claims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tessera.chain.faces import IncomeSplit
from tessera.chain.indexer.facts import Reducer, Said, Value, item_id
from tessera.chain.indexer.model_share import Claim
from tessera.chain.indexer.queries import NOTHING, Figure, Queries
from tessera.core.ids import Account

__all__ = ["INCOME_SPLIT", "SplitView", "Tally"]

ALL = 1_000_000


def _began(event: IncomeSplit.Began) -> Iterator[Said]:
    yield Said("began", event.run, detail={"share": event.share})


def _distributed(event: IncomeSplit.Distributed) -> Iterator[Said]:
    yield Said("divided", amount=event.income)
    yield Said("passed", amount=event.to_shares)


def _proposed(event: IncomeSplit.Proposed) -> Iterator[Said]:
    detail: dict[str, Value] = {
        "attempt": event.attempt,
        "root": item_id(event.root),
        "amount": str(event.amount),
        "opens_at": event.opens_at,
        "signers": event.signers,
    }
    yield Said("proposed", item=item_id(event.tally), detail=detail)


def _struck(event: IncomeSplit.Struck) -> Iterator[Said]:
    detail: dict[str, Value] = {"attempt": event.attempt, "evidence": item_id(event.evidence), "signers": event.signers}
    yield Said("struck", item=item_id(event.tally), detail=detail)


def _posted(event: IncomeSplit.Posted) -> Iterator[Said]:
    yield Said("posted", item=item_id(event.tally), amount=event.amount, detail={"root": item_id(event.root)})


def _claimed(event: IncomeSplit.Claimed) -> Iterator[Said]:
    yield Said("claimed", event.worker, item_id(event.tally), event.amount)


INCOME_SPLIT = Reducer(
    "income_split",
    says={
        IncomeSplit.Began: _began,
        IncomeSplit.Distributed: _distributed,
        IncomeSplit.Proposed: _proposed,
        IncomeSplit.Struck: _struck,
        IncomeSplit.Posted: _posted,
        IncomeSplit.Claimed: _claimed,
    },
)


@dataclass(frozen=True, slots=True)
class Tally:
    """A part of the workers' income that was given out."""

    number: int
    root: str  # 0x and 64 hex digits
    amount: int
    claimed: int  # of it, so far
    strikes: int  # proposals of this number that were struck out
    block: int
    time: int  # seconds since 1970
    tx_hash: str


class SplitView:
    """One split."""

    def __init__(self, queries: Queries, source: str = "income_split") -> None:
        self._queries, self._source = queries, source

    def tallies(self) -> dict[int, Tally]:
        """By number."""
        facts = self._queries.facts(self._source, "posted", limit=ALL)
        claimed, struck = self._queries.by_item(self._source, "claimed", "struck")
        return {
            int(f.item): Tally(
                int(f.item), f.detail["root"], f.amount, claimed.get(f.item, NOTHING).amount,
                struck.get(f.item, NOTHING).count, f.block, f.time, f.tx_hash,
            )
            for f in reversed(facts)
        }  # fmt: skip

    def claimed(self) -> dict[Account, Figure]:
        """By worker."""
        (figures,) = self._queries.by_account(self._source, "claimed")
        return {Account(who): figure for who, figure in figures.items()}

    def claims(self, worker: Account | None = None, *, limit: int = 100) -> list[Claim]:
        """The newest first."""
        found = self._queries.facts(self._source, "claimed", worker or "", limit=limit)
        return [Claim(Account(f.account), f.amount, f.block, f.time, f.tx_hash) for f in found]

    def divided(self) -> Figure:
        """Income of shares and workers together."""
        return self._queries.figure(self._source, "divided")

    def passed(self) -> Figure:
        """To the shares."""
        return self._queries.figure(self._source, "passed")
