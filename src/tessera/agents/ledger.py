"""The agent's books: which purchases were intended, signed, paid or given up, and what each mandate has left.

    reserve ──▶ signed ──▶ consumed          the money moved
       └──────────┴──────▶ released          it did not, and never can

Invariants: rows are only added. An intent has one set of terms for ever and ends once. What is reserved counts against
its mandate and each above it until it is released, or a period after it was paid; sums are taken in the transaction
that adds to them, so that any number of payers in any number of processes never exceed a cap by one unit. That a
signature exists is written down before it exists. A stop is for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select

from tessera.agents import approvals
from tessera.agents.intents import Intent
from tessera.agents.mandates import Mandate, SignedMandate, Spent, check_payment, tick_of, verify_chain
from tessera.agents.tables import CHARGES, ENDS, EVENTS, INTENTS, LAYOUT, MANDATES, STOPS
from tessera.core import encoding
from tessera.core.amount import Amount
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Missing, Refused
from tessera.storage.database import Transaction, open_database
from tessera.storage.location import MEMORY

__all__ = ["Entry", "IntentLedger", "Signing", "State"]

State = Literal["reserved", "signed", "consumed", "released"]
TERMS_LIMIT = 16_384  # bytes
PATIENCE_S = 30.0  # for a turn: a hundred payers may come at once


@dataclass(frozen=True, slots=True)
class Signing:
    """A signature that exists, or is about to."""

    valid_before: int  # seconds since 1970
    block: int  # the chain's, before it was sent: where to start looking for it


@dataclass(frozen=True, slots=True)
class Entry:
    """An intent and what became of it. `signing` is the latest one, which is valid longest."""

    intent: Intent
    state: State
    reserved_at: float  # seconds since 1970
    signing: Signing | None = None
    note: str = ""  # the transaction, or why it was released

    @property
    def is_over(self) -> bool:
        return self.state in ("consumed", "released")


class IntentLedger:
    """Made with a file or a database's URL; any number of processes may share it.

    Args:
        schema: the name-space in a shared database.
    """

    def __init__(self, where: str | Path = MEMORY, *, clock: Clock | None = None, schema: str = "") -> None:
        self._clock = clock or SystemClock()
        self._db = open_database(where, LAYOUT, schema=schema, durability="full", patience_s=PATIENCE_S)
        self._chains: dict[str, tuple[Mandate, ...]] = {}  # mandates never change

    # --- mandates ---------------------------------------------------------------------------------------------------

    def open(self, signed: SignedMandate) -> Mandate:
        """Take a mandate into force, once the one above it is.

        Raises: Invalid for a wrong signature; Refused when it is wider than its parent, or when the children of one
            parent could together pay more than the parent may; Missing without its parent.
        """
        mandate = signed.mandate
        with self._db.read() as db:
            above = self._signed_chain_in(db, mandate.parent)
        verify_chain([signed, *above])

        def work(db: Transaction) -> None:
            if db.execute(select(MANDATES.c.id).where(MANDATES.c.id == mandate.id)).first() is not None:
                return
            self._check_stops(db, [mandate, *(one.mandate for one in above)])
            if above:
                self._check_siblings(db, mandate, above[0].mandate)
            row = {"id": mandate.id, "parent": mandate.parent, "signed": signed.encode(), "at_ms": self._now_ms()}
            db.add(MANDATES, [row])

        self._db.apply(work)
        return mandate

    def mandate(self, mandate: str) -> Mandate:
        """Raises: Missing."""
        return self.chain(mandate)[0]

    def chain(self, mandate: str) -> tuple[Mandate, ...]:
        """A mandate and those above it, the root last. Raises: Missing."""
        if mandate not in self._chains:
            with self._db.read() as db:
                return self._chain_in(db, mandate)
        return self._chains[mandate]

    def mandates(self) -> list[Mandate]:
        """All of them, oldest first."""
        with self._db.read() as db:
            rows = db.execute(select(MANDATES.c.signed).order_by(MANDATES.c.at_ms, MANDATES.c.id)).all()
        return [SignedMandate.decode(row.signed).mandate for row in rows]

    def stop(self, mandate: str = "", reason: str = "") -> None:
        """End a mandate and its children, or with "" everything, at once and for good. Anyone who gets here may."""
        row = {"mandate": mandate, "reason": reason[:500], "at_ms": self._now_ms()}
        self._db.apply(lambda db: db.add(STOPS, [row]))

    def check_running(self, mandate: str) -> None:
        """Raises: Refused with the rule "stopped"."""
        chain = self.chain(mandate)
        with self._db.read() as db:
            self._check_stops(db, chain)

    def is_stopped(self, mandate: str) -> bool:
        """For a guard's `stopped`. Raises: Missing for a mandate that is not here."""
        try:
            self.check_running(mandate)
        except Refused:
            return True
        return False

    def spent(self, mandate: str) -> Spent:
        """What counts under it now."""
        found = self.mandate(mandate)
        with self._db.read() as db:
            return self._spent(db, found)

    # --- intents ----------------------------------------------------------------------------------------------------

    def reserve(
        self, intent: Intent, *, balance: Amount | None = None, approval: approvals.Approval | None = None
    ) -> Entry:
        """Set its amount aside under its mandate and each above it. The same intent again is not counted again.

        Args:
            balance: of the paying account, where a mandate caps the share of it.
            approval: the approver's, for this payment; see `approvals.payment_call`.

        Raises: Refused with the limit as its rule, "changed_terms" for a known intent with other terms, "stopped";
            Conflict when the intent was released, or the approval is used.
        """
        chain, terms = self.chain(intent.mandate), encoding.encode(intent.to_dict())
        now_ms = self._now_ms()

        def work(db: Transaction) -> Entry:
            known = self._find(db, intent.id)
            if known is not None:
                return _same(known, intent)
            self._check_stops(db, chain)
            approved = approval is not None and approvals.use_for(db, approval, intent, chain[0], now_ms)
            for node in chain:
                spent = self._spent(db, node, now_ms)
                check_payment(
                    node, intent.payee, intent.amount, intent.purpose,
                    spent=spent, now=now_ms / 1000, balance=balance, approved=approved,
                )  # fmt: skip
            db.add(INTENTS, [{"id": intent.id, "mandate": intent.mandate, "terms": terms, "at_ms": now_ms}])
            units = str(intent.amount.units)
            db.add(CHARGES, [{"mandate": node.id, "intent": intent.id, "units": units} for node in chain])
            return Entry(intent, "reserved", now_ms / 1000)

        return self._db.apply(work)

    def sign(self, intent: str, signing: Signing) -> Signing:
        """Before a signature is made: write down that it may exist. What was written before is kept while it is good.

        Returns: what to sign with, so that a second try makes the same bytes.

        Raises: Conflict when the intent is over; Refused when its mandate was stopped since.
        """
        now_ms = self._now_ms()

        def work(db: Transaction) -> Signing:
            entry = self._need(db, intent)
            if entry.is_over:
                raise Conflict(f"the intent is over: {entry.state}")
            self._check_stops(db, self._chain_in(db, entry.intent.mandate))
            if entry.signing is not None and entry.signing.valid_before >= signing.valid_before:
                return entry.signing
            turn = 0 if entry.signing is None else _turns(db, intent)
            first = signing.block if entry.signing is None else entry.signing.block
            detail = {"valid_before": signing.valid_before, "block": first}
            _add_event(db, intent, "signed", turn, detail, now_ms)
            return Signing(signing.valid_before, first)

        return self._db.apply(work)

    def consume(self, intent: str, transaction: str = "") -> Entry:
        """The money moved. Twice is once. Raises: Conflict when it was released; Missing."""
        return self._end(intent, "consumed", transaction)

    def release(self, intent: str, reason: str, *, seen: Signing | None) -> Entry:
        """Give it up, for good. The caller makes sure that no signature can still be used: see `Payer.reconcile`.

        Args:
            seen: the latest signature that the caller knows of, None for none.

        Raises: Conflict when it was consumed, or signed anew since; Missing.
        """
        return self._end(intent, "released", reason, seen)

    def find(self, intent: str) -> Entry | None:
        with self._db.read() as db:
            return self._find(db, intent)

    def entries(self, *, open_only: bool = False) -> list[Entry]:
        """Oldest first."""
        query = select(INTENTS.c.id).order_by(INTENTS.c.at_ms, INTENTS.c.id)
        if open_only:
            query = query.where(INTENTS.c.id.not_in(select(ENDS.c.intent)))
        with self._db.read() as db:
            found = [self._find(db, row.id) for row in db.execute(query).all()]
        return [entry for entry in found if entry is not None]

    def close(self) -> None:
        self._db.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _end(self, intent: str, kind: Literal["consumed", "released"], note: str, seen: Signing | None = None) -> Entry:
        now_ms = self._now_ms()

        def work(db: Transaction) -> Entry:
            entry = self._need(db, intent)
            if entry.state == kind:
                return entry
            if entry.is_over:
                raise Conflict(f"the intent is {entry.state} already, it cannot be {kind}")
            if kind == "released" and entry.signing != seen:
                raise Conflict("the intent was signed since")
            _add_event(db, intent, kind, 0, {"note": note[:500]}, now_ms)
            db.add(ENDS, [{"intent": intent, "kind": kind, "at_ms": now_ms}])
            return Entry(entry.intent, kind, entry.reserved_at, entry.signing, note[:500])

        return self._db.apply(work)

    def _spent(self, db: Transaction, mandate: Mandate, now_ms: int | None = None) -> Spent:
        """Cost: one query over what is open, and one over what was paid within the period."""
        now = (self._now_ms() if now_ms is None else now_ms) / 1000
        first = tick_of(now, mandate.period_s) - 6
        tick_ms = -(-mandate.period_s // 6) * 1000
        joined = CHARGES.outerjoin(ENDS, CHARGES.c.intent == ENDS.c.intent)
        ours = select(CHARGES.c.units).select_from(joined).where(CHARGES.c.mandate == mandate.id)
        pending = db.execute(ours.where(ENDS.c.intent.is_(None)))
        paid = db.execute(ours.where(ENDS.c.kind == "consumed", ENDS.c.at_ms >= first * tick_ms))
        return Spent(paid=sum(int(row.units) for row in paid), pending=sum(int(row.units) for row in pending))

    def _check_stops(self, db: Transaction, chain: Sequence[Mandate]) -> None:
        names = ["", *(mandate.id for mandate in chain)]
        stop = db.execute(select(STOPS.c.reason).where(STOPS.c.mandate.in_(names))).first()
        if stop is not None:
            raise Refused(f"the mandate was stopped: {stop.reason or 'no reason given'}", rule="stopped")

    def _check_siblings(self, db: Transaction, mandate: Mandate, parent: Mandate) -> None:
        """The children that are in force can never pay more together than their parent may."""
        rows = db.execute(select(MANDATES.c.signed).where(MANDATES.c.parent == parent.id)).all()
        stopped = set(db.execute(select(STOPS.c.mandate)).scalars())
        now = self._now_ms() / 1000
        siblings = (SignedMandate.decode(row.signed).mandate for row in rows)
        promised = sum(m.per_period.units for m in siblings if m.id not in stopped and now < m.expires_at)
        if promised + mandate.per_period.units > parent.per_period.units:
            left = parent.per_period.units - promised
            raise Refused(
                f"the children's budgets exceed their parent's: {left} units are left to hand down", rule="child_sum"
            )

    def _chain_in(self, db: Transaction, mandate: str) -> tuple[Mandate, ...]:
        if mandate not in self._chains:
            self._chains[mandate] = tuple(signed.mandate for signed in self._signed_chain_in(db, mandate))
        return self._chains[mandate]

    def _signed_chain_in(self, db: Transaction, mandate: str) -> list[SignedMandate]:
        chain: list[SignedMandate] = []
        while mandate:
            row = db.execute(select(MANDATES.c.signed).where(MANDATES.c.id == mandate)).first()
            if row is None:
                raise Missing(f"mandate {mandate[:16]}… is not in this ledger")
            chain.append(SignedMandate.decode(row.signed))
            mandate = chain[-1].mandate.parent
        if chain:
            verify_chain(chain)  # also what was read back: whoever writes to the database writes no mandates
        return chain

    def _need(self, db: Transaction, intent: str) -> Entry:
        entry = self._find(db, intent)
        if entry is None:
            raise Missing(f"intent {intent[:16]}… is not in this ledger")
        return entry

    def _find(self, db: Transaction, intent: str) -> Entry | None:
        row = db.execute(select(INTENTS).where(INTENTS.c.id == intent)).first()
        if row is None:
            return None
        terms = Intent.from_dict(encoding.decode(row.terms, TERMS_LIMIT))
        state, signing, note = "reserved", None, ""
        events = db.execute(select(EVENTS).where(EVENTS.c.intent == intent).order_by(EVENTS.c.turn)).all()
        for event in sorted(events, key=lambda event: event.kind != "signed"):
            detail: dict[str, Any] = encoding.decode(event.detail, TERMS_LIMIT)
            state = event.kind
            if state == "signed":
                signing = Signing(**detail)
            else:
                note = detail["note"]
        return Entry(terms, state, row.at_ms / 1000, signing, note)  # type: ignore[arg-type]

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)


def _same(entry: Entry, intent: Intent) -> Entry:
    if entry.intent != intent:
        raise Refused("this intent is known with another payee, price, resource or mandate", rule="changed_terms")
    if entry.state == "released":
        raise Conflict(f"this intent was given up ({entry.note}): a new purchase needs a new one")
    return entry


def _turns(db: Transaction, intent: str) -> int:
    rows = db.execute(select(EVENTS.c.turn).where(EVENTS.c.intent == intent, EVENTS.c.kind == "signed"))
    return max(rows.scalars()) + 1


def _add_event(db: Transaction, intent: str, kind: str, turn: int, detail: dict[str, Any], now_ms: int) -> None:
    row = {"intent": intent, "kind": kind, "turn": turn, "detail": encoding.encode(detail), "at_ms": now_ms}
    db.add(EVENTS, [row])
