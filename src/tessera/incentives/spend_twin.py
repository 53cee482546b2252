"""The Python twin of `contracts/spend_policy.vy`: mandates in plain lists of payments, without the contract's storage.

Tests run both side by side. A guard may ask the twin first, because it refuses what the contract would refuse, with the
same reason. `Terms`, `Limits` and `Payment` have the contract's fields in the contract's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tessera.core.errors import Conflict, Invalid, Missing, Refused, TesseraError
from tessera.core.ids import Account

__all__ = ["LEVELS", "NO_ONE", "TICKS", "Limits", "Mandate", "Payment", "SpendTwin", "Terms", "tick_s"]

NO_ONE = Account("0x" + "00" * 20)  # as operator or co-signer: there is none
LEVELS = 3  # a mandate, its children and their children
TICKS = 6  # a payment counts in its own tick and this many more
MAX_CAP = 2**128 - 1
MIN_PERIOD_S, MIN_DELAY_S, MAX_TIME_S = 60, 3_600, 366 * 86_400
PROPOSAL_LIFE_S = 7 * 86_400


class Terms(NamedTuple):
    """What stays as it is while a mandate lives."""

    agent: Account
    operator: Account
    cosigner: Account
    asset: Account
    period: int  # seconds
    delay: int  # seconds that a looser limit waits


class Limits(NamedTuple):
    """Amounts in the asset's smallest unit."""

    per_payment: int
    per_period: int
    cosign_above: int
    expires_at: int  # seconds since 1970, exclusive
    any_payee: bool = False

    def within(self, other: Limits) -> bool:
        """Whether nothing here is looser than there."""
        return all(mine <= theirs for mine, theirs in zip(self, other, strict=True))


class Payment(NamedTuple):
    """What an agent signs. `intent` names what is paid for, `purpose` is the hash of why."""

    mandate: bytes
    payee: Account
    amount: int
    intent: bytes
    purpose: bytes
    valid_after: int  # seconds since 1970, exclusive, as is the next
    valid_before: int


@dataclass(slots=True)
class Mandate:
    """One mandate; a child knows its parent."""

    owner: Account
    terms: Terms
    limits: Limits
    payees: set[Account]
    parent: Mandate | None = None
    revoked: bool = False
    proposal: tuple[Limits, tuple[Account, ...], int] | None = None
    payments: list[tuple[int, int]] = field(default_factory=list)  # (when, amount), those that count
    paid: set[bytes] = field(default_factory=set)  # intents, at the root

    def upwards(self) -> Iterator[Mandate]:
        """This one, and each above it."""
        node: Mandate | None = self
        while node is not None:
            yield node
            node = node.parent

    @property
    def root(self) -> Mandate:
        return list(self.upwards())[-1]

    def spent(self, now: int) -> int:
        """What counts against the cap per period."""
        first = now // tick_s(self.terms.period) - TICKS
        self.payments = [(when, amount) for when, amount in self.payments if when // tick_s(self.terms.period) >= first]
        return sum(amount for _, amount in self.payments)


@dataclass(slots=True)
class SpendTwin:
    """All mandates of one contract, by id. Money is not here: who has it is the asset's affair.

    Every method raises what the contract's revert is mapped to, with the contract's reason as the message.
    """

    address: Account = NO_ONE  # the contract's own
    mandates: dict[bytes, Mandate] = field(default_factory=dict)

    def open(self, mandate: bytes, owner: Account, terms: Terms, limits: Limits, payees: Iterable[Account]) -> Mandate:
        """An owner gives a mandate."""
        _require(MIN_DELAY_S <= terms.delay <= MAX_TIME_S, "bad delay", Invalid)
        return self._create(mandate, Mandate(owner, terms, limits, set(payees)))

    def delegate(
        self,
        mandate: bytes,
        parent: bytes,
        sender: Account,
        agent: Account,
        period: int,
        limits: Limits,
        payees: Iterable[Account],
    ) -> Mandate:
        """An agent hands down a part of its own."""
        above = self.mandates.get(parent)
        _require(above is not None and sender == above.terms.agent, "not the agent")
        assert above is not None
        _require(len(list(above.upwards())) < LEVELS, "too many levels")
        terms = above.terms._replace(agent=agent, period=period)
        return self._create(mandate, Mandate(above.owner, terms, limits, set(payees), above))

    def spend(self, payment: Payment, signer: Account, cosigner: Account | None, now: int) -> None:
        """Book a payment that `check` lets pass."""
        self.check(payment, signer, cosigner, now)
        mandate = self.mandates[payment.mandate]
        mandate.root.paid.add(payment.intent)
        for node in mandate.upwards():
            node.payments.append((now, payment.amount))

    def check(self, payment: Payment, signer: Account, cosigner: Account | None, now: int) -> None:
        """Raises unless the contract would pay now, given these two signers.

        Raises: `Refused` for what a limit forbids, `Conflict` for an intent that is paid, `Invalid` for the rest.
        """
        _require(now > payment.valid_after, "payment is not yet valid")
        _require(now < payment.valid_before, "payment is expired", Invalid)
        mandate = self._find(payment.mandate)
        _require(payment.payee not in (NO_ONE, self.address), "bad payee", Invalid)
        _require(payment.amount > 0, "nothing to pay", Invalid)
        _require(signer == mandate.terms.agent, "not the agent's signature", Invalid)
        _require(payment.intent not in mandate.root.paid, "intent is already paid", Conflict)
        for node in mandate.upwards():
            _require(not node.revoked, "mandate is revoked")
            _require(now < node.limits.expires_at, "mandate is expired")
            _require(node.limits.any_payee or payment.payee in node.payees, "payee is not listed")
            _require(payment.amount <= node.limits.per_payment, "above the cap per payment")
            _require(node.spent(now) + payment.amount <= node.limits.per_period, "above the cap per period")
        if any(payment.amount > node.limits.cosign_above for node in mandate.upwards()):
            _require(cosigner == mandate.terms.cosigner != NO_ONE, "needs the co-signer")

    def available(self, mandate: bytes, now: int) -> int:
        """The largest payment that limits allow now, co-signer and funds aside."""
        nodes = list(self._find(mandate).upwards())
        if any(node.revoked or now >= node.limits.expires_at for node in nodes):
            return 0
        rooms = [min(node.limits.per_payment, node.limits.per_period - node.spent(now)) for node in nodes]
        return max(0, min(rooms))

    def revoke(self, mandate: bytes, who: Account) -> None:
        """End it and its children for good."""
        self._check_power(mandate, who)
        self.mandates[mandate].revoked = True

    def tighten(self, mandate: bytes, who: Account, limits: Limits, dropped: Iterable[Account]) -> None:
        """Narrower limits at once; what was proposed is dropped."""
        self._check_power(mandate, who)
        node = self.mandates[mandate]
        _require(limits.within(node.limits), "looser limits must be proposed")
        node.limits, node.proposal = limits, None
        node.payees -= set(dropped)

    def propose(self, mandate: bytes, who: Account, limits: Limits, payees: Iterable[Account], now: int) -> None:
        """Other limits and more payees, to come into force after the delay."""
        node = self.mandates.get(mandate)
        _require(node is not None and who in (node.owner, node.terms.operator), "not owner or operator")
        assert node is not None
        _require(node.parent is None, "a child cannot be loosened")
        node.proposal = (limits, tuple(payees), now + node.terms.delay)

    def loosen(self, mandate: bytes, limits: Limits, payees: Iterable[Account], now: int) -> None:
        """What was proposed comes into force."""
        node = self.mandates.get(mandate)
        proposal = node.proposal if node is not None else None
        _require(proposal is not None and proposal[:2] == (limits, tuple(payees)), "no such proposal", Missing)
        assert node is not None
        assert proposal is not None
        _require(now >= proposal[2], "proposal is not yet due")
        _require(now < proposal[2] + PROPOSAL_LIFE_S, "proposal has lapsed")
        _check_caps(limits)
        node.limits, node.proposal = limits, None
        node.payees |= set(payees)

    def _create(self, mandate: bytes, node: Mandate) -> Mandate:
        _require(mandate not in self.mandates, "label is taken", Conflict)
        others = (NO_ONE, node.owner, node.terms.operator, node.terms.cosigner)
        _require(node.terms.agent not in others, "bad agent", Invalid)
        _require(MIN_PERIOD_S <= node.terms.period <= MAX_TIME_S, "bad period", Invalid)
        _check_caps(node.limits)
        self.mandates[mandate] = node
        return node

    def _find(self, mandate: bytes) -> Mandate:
        node = self.mandates.get(mandate)
        if node is None:
            raise Missing("spend_policy: no such mandate")
        return node

    def _check_power(self, mandate: bytes, who: Account) -> None:
        node = self.mandates.get(mandate)
        powerful = (
            set() if node is None else {node.owner, node.terms.operator, *(n.terms.agent for n in node.upwards())}
        )
        _require(who != NO_ONE and who in powerful, "may not stop this")


def tick_s(period_s: int) -> int:
    """How finely a period is cut: a sixth, rounded up.

    >>> tick_s(86_400)
    14400
    """
    return -(-period_s // TICKS)


def _check_caps(limits: Limits) -> None:
    _require(max(limits.per_payment, limits.per_period) <= MAX_CAP, "cap too large", Invalid)


def _require(holds: bool, reason: str, cls: type[TesseraError] = Refused) -> None:
    if not holds:
        text = f"spend_policy: {reason}"
        raise Refused(text, rule=text) if cls is Refused else cls(text)
