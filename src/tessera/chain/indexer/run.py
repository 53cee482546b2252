"""What a run's contract says (contracts/run.vy): members and their stakes, epochs and their proposals, and disputes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tessera.chain.faces import Run
from tessera.chain.indexer.facts import Fact, Reducer, Said, Value, item_id
from tessera.chain.indexer.model_share import Posting, ShareView
from tessera.chain.indexer.queries import Figure, Queries
from tessera.core.ids import Account

__all__ = ["RUN", "Epoch", "Member", "Proposal", "RunView", "Slash", "Strike"]

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
    """One account's way through the run."""

    account: Account
    peer: str  # 0x and 64 hex digits
    stage: int | None
    status: Status
    stake: int  # at risk now
    free_at: int | None  # when the bond of who has left is free, seconds since 1970
    proofs: Mapping[str, str]  # what happened -> its newest transaction


@dataclass(frozen=True, slots=True)
class Strike:
    """A third of the workers spoke against a proposal."""

    evidence: str  # 0x and 64 hex digits
    signers: int
    time: int  # seconds since 1970
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """What workers proposed to make of an epoch."""

    epoch: int
    attempt: int
    root: str  # 0x and 64 hex digits
    shares: int
    opens_at: int  # when it can be posted, seconds since 1970
    signers: int
    strike: Strike | None
    time: int  # seconds since 1970
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch that was proposed: once, and once more for each strike."""

    number: int
    proposals: tuple[Proposal, ...]  # the oldest first
    posting: Posting | None  # of the last one


@dataclass(frozen=True, slots=True)
class Slash:
    """A bond that was taken."""

    worker: Account
    challenger: Account
    evidence: str  # 0x and 64 hex digits
    amount: int
    reward: int  # of it, to the challenger; the rest is income of the shares
    time: int  # seconds since 1970
    tx_hash: str


class RunView:
    """One run. Postings are told by its share contract: an index that does not follow it has none."""

    def __init__(self, queries: Queries, source: str = "run", share: str = "model_share") -> None:
        self._queries, self._source = queries, source
        self.shares = ShareView(queries, share)

    def member(self, account: Account) -> Member | None:
        return next(iter(self._members([account])), None)

    def members(self, *, limit: int = 1_000) -> list[Member]:
        """Who bonded last comes first."""
        return self._members([fact.item for fact in self._queries.facts(self._source, "bonded", limit=limit)])

    def stake(self) -> Figure:
        """All bonds at risk: bonded - withdrawn - slashed."""
        bonded, withdrawn, slashed = (self._queries.figure(self._source, k) for k in ("bonded", "withdrawn", "slashed"))
        return bonded.plus(withdrawn, -1).plus(slashed, -1)

    def rewarded(self, challenger: Account) -> Figure:
        """What proofs of others' faults have brought somebody."""
        return self._queries.figure(self._source, "rewarded", account=challenger)

    def epoch(self, number: int) -> Epoch | None:
        return next(iter(self._epochs(f"epoch {number}")), None)

    def epochs(self) -> list[Epoch]:
        """The newest first."""
        return self._epochs("")

    def slashes(self, worker: Account | None = None, *, limit: int = 100) -> list[Slash]:
        """The newest first."""
        return [
            Slash(Account(f.account), Account(f.detail["challenger"]), f.detail["evidence"], f.amount,
                  f.detail["reward"], f.time, f.tx_hash)
            for f in self._queries.facts(self._source, "slashed", worker or "", limit=limit)
        ]  # fmt: skip

    def _members(self, accounts: Sequence[str]) -> list[Member]:
        founders = self._founders()
        histories = self._queries.histories(self._source, accounts)
        return [_member(history, founders) for history in histories.values() if history]

    def _founders(self) -> dict[str, str]:
        """Who began the run, and the transaction in which they did. `Began` counts them and does not name them.

        They are those who had a stage by then, and were not candidates afterwards: taken in by a change, or given up.
        While more remain than the run began with, only those are told who have left, or are leaving, as workers do.
        """
        began = self._queries.facts(self._source, "began", limit=1)
        if not began:
            return {}
        drawn = [f.item for f in self._queries.facts(self._source, "drawn", limit=ALL) if f.place < began[0].place]
        histories = self._queries.histories(self._source, drawn)
        maybe = [account for account, history in histories.items() if history and _may_have_founded(history)]
        known = [account for account in maybe if _has_worked(histories[account])]
        return dict.fromkeys(maybe if len(maybe) == began[0].detail["workers"] else known, began[0].tx_hash)

    def _epochs(self, item: str) -> list[Epoch]:
        struck = self._queries.facts(self._source, "struck", item=item, limit=ALL)
        strikes = {(f.item, f.detail["attempt"]): f for f in struck}
        found: dict[int, list[Proposal]] = {}
        for fact in self._queries.facts(self._source, "proposed", item=item, limit=ALL):
            proposal = _proposal(fact, strikes.get((fact.item, fact.detail["attempt"])))
            found.setdefault(proposal.epoch, []).append(proposal)
        postings = self.shares.postings()
        return [Epoch(n, tuple(reversed(proposals)), postings.get(n)) for n, proposals in found.items()]


def _has_worked(history: Sequence[Fact]) -> bool:
    return any(fact.kind in ("leaving", "removed") for fact in history)


def _may_have_founded(history: Sequence[Fact]) -> bool:
    kinds = {fact.kind for fact in history}
    return "joined" not in kinds and ("left" not in kinds or _has_worked(history))


def _member(history: Sequence[Fact], founders: Mapping[str, str]) -> Member:
    newest = {fact.kind: fact for fact in history}
    bonded, drawn, left = newest["bonded"], newest.get("drawn"), newest.get("left")
    proofs = {kind: fact.tx_hash for kind, fact in newest.items()}
    if bonded.account in founders:
        proofs["joined"] = founders[bonded.account]
    return Member(
        account=Account(bonded.account),
        peer=bonded.detail["peer"],
        stage=drawn.detail["stage"] if drawn else None,
        status=[status for status in _STATUS if status in proofs][-1],
        stake=bonded.amount - sum(fact.amount for fact in history if fact.kind in ("withdrawn", "slashed")),
        free_at=left.detail["free_at"] if left else None,
        proofs=proofs,
    )


def _proposal(fact: Fact, struck: Fact | None) -> Proposal:
    detail, strike = fact.detail, None
    if struck is not None:
        strike = Strike(struck.detail["evidence"], struck.detail["signers"], struck.time, struck.tx_hash)
    return Proposal(
        int(fact.item.removeprefix("epoch ")), detail["attempt"], detail["root"], detail["shares"], detail["opens_at"],
        detail["signers"], strike, fact.time, fact.tx_hash,
    )  # fmt: skip
