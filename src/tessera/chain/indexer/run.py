"""What a run's contract says (contracts/run.vy): members and their stakes, proposals of epochs, and who was slashed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tessera.chain.faces import Run
from tessera.chain.indexer.facts import Fact, Reducer, Said, Value, item_id
from tessera.chain.indexer.queries import Figure, Queries
from tessera.core.ids import Account

__all__ = ["RUN", "Member", "Proposal", "RunView", "Slash"]

_NOBODY = "0x" + "00" * 20
Status = Literal["bonded", "drawn", "joined", "leaving", "left", "withdrawn", "slashed"]
_STATUS: tuple[Status, ...] = ("bonded", "drawn", "joined", "leaving", "left", "withdrawn", "slashed")  # forward only
ALL = 1_000_000


def _bonded(event: Run.Bonded) -> Iterator[Said]:
    yield Said("bonded", event.account, event.account, event.amount, {"peer": item_id(event.peer)})


def _drawn(event: Run.Drawn) -> Iterator[Said]:
    yield Said("drawn", event.account, event.account, detail={"stage": event.stage})


def _began(event: Run.Began) -> Iterator[Said]:
    yield Said("began", event.share, detail={"workers": event.workers})


def _changed(event: Run.Changed) -> Iterator[Said]:
    if event.joiner != _NOBODY:
        yield Said("joined", event.joiner, event.joiner, detail={"change": event.number})
    if event.leaver != _NOBODY:
        yield Said("removed", event.leaver, event.leaver, detail={"change": event.number})


def _leaving(event: Run.Leaving) -> Iterator[Said]:
    yield Said("leaving", event.account, event.account)


def _left(event: Run.Left) -> Iterator[Said]:
    yield Said("left", event.account, event.account, detail={"free_at": event.free_at})


def _withdrawn(event: Run.Withdrawn) -> Iterator[Said]:
    yield Said("withdrawn", event.account, event.account, event.amount)


def _proposed(event: Run.Proposed) -> Iterator[Said]:
    detail: dict[str, Value] = {
        "attempt": event.attempt,
        "root": item_id(event.root),
        "shares": event.shares,
        "opens_at": event.opens_at,
        "signers": event.signers,
    }
    yield Said("proposed", item=f"epoch {event.epoch}", detail=detail)


def _struck(event: Run.Struck) -> Iterator[Said]:
    detail: dict[str, Value] = {"attempt": event.attempt, "evidence": item_id(event.evidence), "signers": event.signers}
    yield Said("struck", item=f"epoch {event.epoch}", detail=detail)


def _slashed(event: Run.Slashed) -> Iterator[Said]:
    detail: dict[str, Value] = {
        "challenger": event.challenger,
        "evidence": item_id(event.evidence),
        "reward": event.reward,
    }
    yield Said("slashed", event.worker, event.worker, event.amount, detail)
    yield Said("rewarded", event.challenger, amount=event.reward)


RUN = Reducer(
    "run",
    says={
        Run.Bonded: _bonded,
        Run.Drawn: _drawn,
        Run.Began: _began,
        Run.Changed: _changed,
        Run.Leaving: _leaving,
        Run.Left: _left,
        Run.Withdrawn: _withdrawn,
        Run.Proposed: _proposed,
        Run.Struck: _struck,
        Run.Slashed: _slashed,
    },
)


@dataclass(frozen=True, slots=True)
class Member:
    """One account's way through the run. Founders are `drawn` here: `Began` counts them and does not name them."""

    account: Account
    peer: str  # 0x and 64 hex digits
    stage: int | None
    status: Status
    stake: int  # at risk now
    free_at: int | None  # when the bond of who has left is free, seconds since 1970
    proofs: Mapping[str, str]  # what happened -> its newest transaction


@dataclass(frozen=True, slots=True)
class Proposal:
    """An epoch that was proposed; `struck` when a third of the workers spoke against it."""

    epoch: int
    attempt: int
    root: str
    shares: int
    opens_at: int  # seconds since 1970
    signers: int
    struck: bool
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Slash:
    """A bond that was taken."""

    worker: Account
    challenger: Account
    evidence: str
    amount: int
    reward: int
    time: int  # seconds since 1970
    tx_hash: str


class RunView:
    """One run."""

    def __init__(self, queries: Queries, source: str = "run") -> None:
        self._queries, self._source = queries, source

    def member(self, account: Account) -> Member | None:
        history = self._queries.histories(self._source, [account])[account]
        return _member(history) if history else None

    def members(self, *, limit: int = 1_000) -> list[Member]:
        """Who bonded last comes first."""
        facts = self._queries.facts(self._source, "bonded", limit=limit)
        histories = self._queries.histories(self._source, [fact.item for fact in facts])
        return [_member(histories[fact.item]) for fact in facts]

    def stake(self) -> Figure:
        """All bonds at risk: bonded - withdrawn - slashed."""
        bonded, withdrawn, slashed = (self._queries.figure(self._source, k) for k in ("bonded", "withdrawn", "slashed"))
        return bonded.plus(withdrawn, -1).plus(slashed, -1)

    def proposals(self, epoch: int | None = None) -> list[Proposal]:
        """The newest first."""
        item = "" if epoch is None else f"epoch {epoch}"
        struck = self._queries.facts(self._source, "struck", item=item, limit=ALL)
        attempts = {(fact.item, fact.detail["attempt"]) for fact in struck}
        return [_proposal(f, attempts) for f in self._queries.facts(self._source, "proposed", item=item, limit=ALL)]

    def slashes(self, worker: Account | None = None, *, limit: int = 100) -> list[Slash]:
        """The newest first."""
        return [
            Slash(Account(f.account), Account(f.detail["challenger"]), f.detail["evidence"], f.amount,
                  f.detail["reward"], f.time, f.tx_hash)
            for f in self._queries.facts(self._source, "slashed", worker or "", limit=limit)
        ]  # fmt: skip


def _member(history: Sequence[Fact]) -> Member:
    newest = {fact.kind: fact for fact in history}
    bonded, drawn, left = newest["bonded"], newest.get("drawn"), newest.get("left")
    return Member(
        account=Account(bonded.account),
        peer=bonded.detail["peer"],
        stage=drawn.detail["stage"] if drawn else None,
        status=[status for status in _STATUS if status in newest][-1],
        stake=bonded.amount - sum(fact.amount for fact in history if fact.kind in ("withdrawn", "slashed")),
        free_at=left.detail["free_at"] if left else None,
        proofs={kind: fact.tx_hash for kind, fact in newest.items()},
    )


def _proposal(fact: Fact, struck: set[tuple[str, int]]) -> Proposal:
    detail, epoch = fact.detail, int(fact.item.removeprefix("epoch "))
    return Proposal(
        epoch, detail["attempt"], detail["root"], detail["shares"], detail["opens_at"], detail["signers"],
        (fact.item, detail["attempt"]) in struck, fact.tx_hash,
    )  # fmt: skip
