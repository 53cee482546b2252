"""What a spending policy says (contracts/spend_policy.vy): mandates, their limits, and what was paid under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tessera.chain.faces import SpendPolicy
from tessera.chain.indexer.facts import Fact, Reducer, Said, Value, item_id
from tessera.chain.indexer.queries import Figure, Queries
from tessera.core.ids import Account

__all__ = ["SPEND_POLICY", "Mandate", "MandateView", "Period", "Spending"]

_TERMS = ("opened", "entrusted", "limited", "listed", "unlisted", "proposed", "revoked")
_NONE = "0x" + "00" * 32


def _opened(event: SpendPolicy.Opened) -> Iterator[Said]:
    mandate, parent = item_id(event.mandate), item_id(event.parent)
    detail: dict[str, Value] = {
        "parent": parent,
        "operator": event.operator,
        "cosigner": event.cosigner,
        "asset": event.asset,
        "period": event.period,
        "delay": event.delay,
    }
    yield Said("opened", account=event.owner, item=mandate, detail=detail)
    yield Said("entrusted", account=event.agent, item=mandate)
    if parent != _NONE:
        yield Said("handed_down", item=parent, detail={"child": mandate})


def _limited(event: SpendPolicy.Limited) -> Iterator[Said]:
    yield Said("limited", item=item_id(event.mandate), detail=_limits(event))


def _listed(event: SpendPolicy.Listed) -> Iterator[Said]:
    yield Said("listed" if event.allowed else "unlisted", account=event.payee, item=item_id(event.mandate))


def _proposed(event: SpendPolicy.Proposed) -> Iterator[Said]:
    detail = {**_limits(event), "due": event.due, "payees": list(event.payees)}
    yield Said("proposed", item=item_id(event.mandate), detail=detail)


def _spent(event: SpendPolicy.Spent) -> Iterator[Said]:
    detail = {"intent": item_id(event.intent), "purpose": item_id(event.purpose)}
    yield Said("spent", account=event.payee, item=item_id(event.mandate), amount=event.amount, detail=detail)


def _revoked(event: SpendPolicy.Revoked) -> Iterator[Said]:
    yield Said("revoked", account=event.sender, item=item_id(event.mandate))


def _limits(event: SpendPolicy.Limited | SpendPolicy.Proposed) -> dict[str, Value]:
    names = ("per_payment", "per_period", "cosign_above", "expires_at", "any_payee")
    return {name: getattr(event, name) for name in names}


SPEND_POLICY = Reducer(
    "spend_policy",
    says={
        SpendPolicy.Opened: _opened,
        SpendPolicy.Limited: _limited,
        SpendPolicy.Listed: _listed,
        SpendPolicy.Proposed: _proposed,
        SpendPolicy.Spent: _spent,
        SpendPolicy.Revoked: _revoked,
    },
)


@dataclass(frozen=True, slots=True)
class Mandate:
    """One mandate as its events tell it; money in the smallest unit of `asset`, times in seconds."""

    id: str  # 0x and 64 hex digits, as `parent`
    parent: str  # empty for what the owner has opened
    owner: Account
    agent: Account
    operator: Account
    cosigner: Account
    asset: Account
    period_s: int
    delay_s: int
    per_payment: int
    per_period: int
    cosign_above: int
    expires_at: int  # since 1970
    any_payee: bool
    payees: tuple[Account, ...]  # on the list
    revoked: bool  # itself; a mandate whose parent is revoked pays nothing either
    spent: Figure  # under this mandate, without its children
    proofs: Mapping[str, str]  # what happened ("opened", "limited", ...) -> its newest transaction


@dataclass(frozen=True, slots=True)
class Spending:
    """One payment under a mandate."""

    mandate: str
    payee: Account
    amount: int
    intent: str
    purpose: str
    time: int  # seconds since 1970
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Period:
    """What was paid from `start` until one period later."""

    start: int  # seconds since 1970
    amount: int
    payments: tuple[Spending, ...]  # the oldest first


class MandateView:
    """The mandates of one policy contract."""

    def __init__(self, queries: Queries, source: str = "spend_policy") -> None:
        self._queries, self._source = queries, source

    def mandate(self, mandate: str) -> Mandate | None:
        return next(iter(self._mandates([mandate])), None)

    def mandates(
        self, *, owner: Account | None = None, agent: Account | None = None, limit: int = 100
    ) -> list[Mandate]:
        """Those of an owner, or those entrusted to an agent; the newest first."""
        kind, account = ("entrusted", agent) if agent else ("opened", owner)
        facts = self._queries.facts(self._source, kind, account or "", limit=limit)
        found = self._mandates([fact.item for fact in facts])
        return [mandate for mandate in found if owner in (None, mandate.owner)]

    def children(self, mandate: str) -> list[str]:
        """The ids of the mandates handed down from this one, the oldest first."""
        history = self._queries.histories(self._source, [mandate], ["handed_down"])[mandate]
        return [fact.detail["child"] for fact in history]

    def payments(self, mandate: str, *, limit: int = 100, before: Fact | None = None) -> list[Spending]:
        """Under one mandate, without its children; the newest first."""
        return [
            _spending(f) for f in self._queries.facts(self._source, "spent", item=mandate, limit=limit, before=before)
        ]

    def periods(self, mandate: str) -> list[Period]:
        """What was paid under a mandate and its children, by periods of its length that begin at multiples of it.

        The contract's cap is stricter: it holds wherever a period begins.
        """
        told = self.mandate(mandate)
        if told is None:
            return []
        family = [mandate]
        for member in family:
            family += self.children(member)
        histories = self._queries.histories(self._source, family, ["spent"])
        facts = sorted((fact for history in histories.values() for fact in history), key=lambda fact: fact.place)
        periods: dict[int, list[Spending]] = {}
        for fact in facts:
            periods.setdefault(fact.time - fact.time % told.period_s, []).append(_spending(fact))
        return [Period(start, sum(p.amount for p in paid), tuple(paid)) for start, paid in sorted(periods.items())]

    def received(self, payee: Account) -> Figure:
        """What a payee has got under all mandates."""
        return self._queries.figure(self._source, "spent", account=payee)

    def _mandates(self, mandates: Sequence[str]) -> list[Mandate]:
        histories = self._queries.histories(self._source, mandates, _TERMS)
        return [
            _mandate(history, self._queries.figure(self._source, "spent", item=mandate))
            for mandate, history in histories.items()
            if history
        ]


def _spending(fact: Fact) -> Spending:
    detail = fact.detail
    payee = Account(fact.account)
    return Spending(fact.item, payee, fact.amount, detail["intent"], detail["purpose"], fact.time, fact.tx_hash)


def _mandate(history: Sequence[Fact], spent: Figure) -> Mandate:
    newest = {fact.kind: fact for fact in history}
    opened, limits = newest["opened"], newest["limited"].detail
    allowed = {fact.account: fact.kind == "listed" for fact in history if fact.kind in ("listed", "unlisted")}
    terms = opened.detail
    return Mandate(
        id=opened.item,
        parent="" if terms["parent"] == _NONE else terms["parent"],
        owner=Account(opened.account),
        agent=Account(newest["entrusted"].account),
        operator=Account(terms["operator"]),
        cosigner=Account(terms["cosigner"]),
        asset=Account(terms["asset"]),
        period_s=terms["period"],
        delay_s=terms["delay"],
        per_payment=limits["per_payment"],
        per_period=limits["per_period"],
        cosign_above=limits["cosign_above"],
        expires_at=limits["expires_at"],
        any_payee=limits["any_payee"],
        payees=tuple(Account(payee) for payee, is_allowed in allowed.items() if is_allowed),
        revoked="revoked" in newest,
        spent=spent,
        proofs={kind: fact.tx_hash for kind, fact in newest.items()},
    )
