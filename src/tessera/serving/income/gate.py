"""A worker's gate: which sessions it opens, and how far each may go.

What the gateway's operator cannot do: have a closed run's workers decode what nobody has paid for. A session needs a
voucher (`vouchers`) of a gateway that the worker knows, whose purchase the worker looks up itself; it draws on the
purchase at each worker, and stops at its tokens. What is left open, and how far:

- Each replica counts for itself: a gateway can draw a purchase once at each replica of a stage. The vouchers show it
  afterwards, under its signature (`receipts.overdrawn`), and a tally pays a purchase's tokens once.
- A purchase that was settled is known to everybody: of two gateways, the first to draw on it has it.
- A session is begun again when a stage was lost, by the same voucher: each worker computes `REPLAYS` times its tokens
  at most, and a gateway can spend the second time on another prompt.
- A purchase that is not on the chain when its session ends is put there by the worker (`collect`). What its payer has
  moved away meanwhile is lost. A metered one is the gateway's to settle, for what was used at least: until it is, and
  for ever when it never is, its tokens count as unpaid. A gateway with more than `unpaid_tokens` is refused.
- Who signs no receipts gets at most `unsigned_tokens` and a sixteenth of what it signed for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Misbehaviour, PaymentRequired, Refused, TesseraError
from tessera.core.ids import PeerId
from tessera.serving.income.book import IncomeBook, Served
from tessera.serving.income.purchases import Purchases
from tessera.serving.income.receipts import Receipt
from tessera.serving.income.vouchers import Purchase, Terms, Voucher

__all__ = ["Budget", "Gate", "GateLimits", "OpenGate", "PaidGate"]

log = structlog.get_logger()

MAX_OPENS = 64
REPLAYS = 2
REMEMBERED = 10_000  # purchases that have arrived
GRACE_PART = (
    16  # of what a gateway signed for, one part may stay unsigned: answers that were cancelled, stages that fell
)


class Budget(Protocol):
    """How far one session may go."""

    def reach(self, start: int, final: int, end: int) -> None:
        """Before tokens from `start` are computed: those up to `final` are the text, those up to `end` may be guesses.

        Raises: Refused beyond what was bought, or after its end; Misbehaviour for a step that goes back.
        """
        ...

    def close(self) -> None:
        """The session is over here. Safe to call twice."""
        ...


class Gate(Protocol):
    """Says whether a session may begin."""

    async def admit(self, peer: PeerId, voucher: object) -> Budget:
        """Args:
            peer: who opens it here: the gateway at stage 0, a worker of the stage before elsewhere.
            voucher: as it came with the first frame; None when none came.

        Raises: PaymentRequired without a voucher; Refused with the broken rule; Misbehaviour for what is no voucher;
            Unavailable or Late when the chain cannot be asked.
        """
        ...


class OpenGate:
    """Lets every session pass, as far as it likes: of a run that serves for nothing. It is its own budget."""

    async def admit(self, peer: PeerId, voucher: object) -> OpenGate:
        return self

    def reach(self, start: int, final: int, end: int) -> None:
        """Nothing was bought."""

    def close(self) -> None:
        """Nothing is counted."""


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What a worker risks for a gateway."""

    unsigned_tokens: int = 65_536  # computed, and not signed for
    unpaid_tokens: int = 65_536  # whose purchase can never be paid any more
    grace_s: float = 5.0  # after a session, before its purchase is put on the chain by us


class PaidGate:
    """The gate of a run whose serving is paid.

    Args:
        first: whether this worker's stage is the first, where gateways come themselves.
        gateways: whose vouchers count; None = anybody's.
    """

    def __init__(
        self,
        terms: Terms,
        purchases: Purchases,
        book: IncomeBook,
        clock: Clock,
        *,
        first: bool,
        gateways: frozenset[PeerId] | None = None,
        limits: GateLimits | None = None,
    ) -> None:
        self.terms, self.book = terms, book
        self._purchases, self._clock = purchases, clock
        self._first, self._gateways = first, gateways
        self._limits = limits or GateLimits()
        self._running: dict[str, PaidBudget] = {}
        self._arrived: set[str] = set()  # purchases that are on the chain
        self._open: dict[str, _Open] = {}  # purchases that are not on the chain
        self._lost: dict[PeerId, int] = {}  # tokens that will never be paid
        self._sums: dict[PeerId, tuple[int, int]] = {}  # by gateway: tokens computed, and those it signed for
        self.ended: list[tuple[PeerId, str, int]] = []  # peer who sent, session and tokens: for whom to sign

    async def admit(self, peer: PeerId, voucher: object) -> PaidBudget:
        """See `Gate.admit`. What is drawn is drawn before the chain is asked: two sessions at once cannot share it.

        A session that is begun again ends what is left of it here from before.
        """
        paper = self._read(peer, voucher)
        if (old := self._running.get(paper.session)) is not None and old.voucher == paper:
            old.close()
        self._check_gateway(paper.gateway)
        before = self._draw(paper)
        budget = PaidBudget(self, peer, paper, before.fed if before is not None else 0)
        self._running[paper.session] = budget
        try:
            paid = await self._has_paid(paper.purchase)
        except BaseException:
            if self._running.get(paper.session) is budget:
                self._running.pop(paper.session)
                self._undraw(paper, before)
            raise
        if not paid:
            self._open[paper.purchase.name] = _Open(paper, paper.expires + self._limits.grace_s)
        return budget

    def take(self, receipt: Receipt) -> None:
        """A gateway's receipt for a session that we served; others are kept for the tally alone."""
        served = self.book.session(receipt.session)
        if served is not None and receipt.signer == served.voucher.gateway:
            self.book.add_receipts([receipt])
            mine = [r.tokens for r in self.book.receipts([receipt.session]) if r.signer == receipt.signer]
            self._save(served, replace(served, signed=min(sum(mine), served.voucher.tokens)))
        else:
            self.book.add_receipts([receipt])

    async def collect(self) -> None:
        """Put on the chain what the gateways have left unsent. Call it now and then; one that is away costs nothing."""
        now = self._clock.time()
        for name, waiting in list(self._open.items()):
            if now < waiting.look_at:
                continue
            try:
                if await self._is_settled(waiting.voucher.purchase, now):
                    del self._open[name]
                else:
                    waiting.overdue, waiting.look_at = True, now + self._limits.grace_s
            except (Refused, Invalid, PaymentRequired) as error:
                self._lose(waiting.voucher, error)
                del self._open[name]
            except TesseraError as error:  # the chain is away: it stays open
                log.info("purchase_not_looked_up", payer=waiting.voucher.purchase.payer, code=error.code)

    async def _is_settled(self, purchase: Purchase, now: float) -> bool:
        """After its session. Raises `Refused` when it will never be; what the coin says when it does not pay."""
        if purchase.facilitator is None:
            if not await self._purchases.paid(purchase, now):
                await self._purchases.collect(purchase)
                log.warning("purchase_collected", payer=purchase.payer, units=str(purchase.value))
            return True
        sessions = self.book.metered(purchase.payer)
        due = sum(self.terms.cost_down(served.used) for served in sessions)
        if await self._purchases.metered(purchase.payer) >= due:
            return True
        if now > purchase.valid_before:
            raise Refused("a metered purchase was settled for less than was served, or never", rule="purchase")
        return False

    # --- admission --------------------------------------------------------------------------------------------------

    async def _has_paid(self, purchase: Purchase) -> bool:
        """What has arrived stays: credit is drawn on often, and looked up once."""
        if purchase.name in self._arrived:
            return True
        paid = await self._purchases.paid(purchase, self._clock.time())
        if paid:
            if len(self._arrived) >= REMEMBERED:
                self._arrived.clear()
            self._arrived.add(purchase.name)
        return paid

    def _read(self, peer: PeerId, value: object) -> Voucher:
        if value is None:
            raise PaymentRequired("this run's workers serve what was paid for: the session has no voucher")
        try:
            voucher = Voucher.from_value(self.terms, value)
        except Invalid as error:
            raise Misbehaviour(f"not a voucher: {error.message}", evidence=str(value)[:200]) from error
        voucher.check(self.terms, self._clock.time())
        if self._first and voucher.gateway != peer:
            raise Refused("the voucher is another gateway's", rule="gateway")
        return voucher

    def _check_gateway(self, gateway: PeerId) -> None:
        if self._gateways is not None and gateway not in self._gateways:
            raise Refused("the voucher's gateway is none of this run's", rule="gateways")
        used, signed = self._sums_of(gateway)
        used += sum(b.used for b in self._running.values() if b.voucher.gateway == gateway)
        allowed = self._limits.unsigned_tokens + signed // GRACE_PART
        if used - signed > allowed:
            raise Refused(f"this gateway has signed for {signed} of {used} tokens", rule="unsigned")
        overdue = sum(
            self._used_of(w.voucher) for w in self._open.values() if w.overdue and w.voucher.gateway == gateway
        )
        if self._lost.get(gateway, 0) + overdue > self._limits.unpaid_tokens:
            raise Refused("purchases of this gateway were never paid", rule="unpaid")

    def _draw(self, voucher: Voucher) -> Served | None:
        """Book the voucher's tokens as drawn. Returns what was there of the session before."""
        before = self.book.session(voucher.session)
        if before is not None and (before.voucher != voucher or before.opens >= MAX_OPENS or before.signed):
            raise Refused("this session was served already", rule="single_use")
        others = [s for s in self.book.drawn(voucher.purchase.name) if s.voucher.session != voucher.session]
        if any(s.voucher.gateway != voucher.gateway for s in others):
            raise Refused("another gateway draws on this purchase", rule="gateway")
        drawn = sum(self._drawn_by(s) for s in others)
        if self.terms.cost_up(drawn + voucher.tokens) > voucher.purchase.value:
            bought = voucher.purchase.value
            raise Refused(
                f"{drawn} tokens are drawn of {bought} units, {voucher.tokens} more asked for", rule="overdrawn"
            )
        opens = 1 if before is None else before.opens + 1
        self.book.save(replace(before or Served(voucher), opens=opens))
        return before

    def _sums_of(self, gateway: PeerId) -> tuple[int, int]:
        if gateway not in self._sums:
            self._sums[gateway] = self.book.sums(gateway)
        return self._sums[gateway]

    def _save(self, before: Served, after: Served) -> None:
        used, signed = self._sums_of(after.voucher.gateway)
        more = min(after.used, after.signed) - min(before.used, before.signed)
        self.book.save(after)
        self._sums[after.voucher.gateway] = (used + after.used - before.used, signed + more)

    def _drawn_by(self, served: Served) -> int:
        """A session that runs, or may go on elsewhere, holds all its tokens; one that is over what it used."""
        over = served.voucher.session not in self._running and (served.signed or served.opens >= MAX_OPENS)
        return max(served.used, served.signed) if over else served.voucher.tokens

    def _undraw(self, voucher: Voucher, before: Served | None) -> None:
        """The chain did not confirm the purchase: nothing was served."""
        self.book.save(before or Served(voucher, opens=MAX_OPENS))

    def _used_of(self, voucher: Voucher) -> int:
        return sum(served.used for served in self.book.drawn(voucher.purchase.name))

    def _lose(self, voucher: Voucher, error: TesseraError) -> None:
        lost = self._used_of(voucher)
        self._lost[voucher.gateway] = self._lost.get(voucher.gateway, 0) + lost
        log.warning("purchase_lost", gateway=voucher.gateway, tokens=lost, reason=error.message)

    def _end(self, budget: PaidBudget) -> None:
        voucher = budget.voucher
        if self._running.get(voucher.session) is not budget:
            return
        del self._running[voucher.session]
        served = self.book.session(voucher.session) or Served(voucher)
        self._save(served, replace(served, used=max(served.used, budget.used), fed=budget.fed))
        if budget.used and not self._first:
            self.ended.append((budget.peer, voucher.session, budget.used))
        if (waiting := self._open.get(voucher.purchase.name)) is not None:
            waiting.look_at = self._clock.time() + self._limits.grace_s


@dataclass
class _Open:
    """A purchase that is not on the chain: when to look again, and whether it should be there by now."""

    voucher: Voucher
    look_at: float
    overdue: bool = False


class PaidBudget:
    """One session's, at this worker, since it was begun last."""

    def __init__(self, gate: PaidGate, peer: PeerId, voucher: Voucher, fed: int) -> None:
        self._gate = gate
        self.peer, self.voucher = peer, voucher
        self.used = 0  # the position that it has reached
        self.fed = fed  # tokens of the text that were computed, every time that it was begun
        self._start = -1

    def reach(self, start: int, final: int, end: int) -> None:
        """See `Budget.reach`. A step begins after the one before: what is a guess once is not the text of another."""
        bought = self.voucher.tokens
        if end > bought:
            raise Refused(f"token {end} of {bought} that were bought", rule="budget")
        if start <= self._start:
            raise Misbehaviour(f"a step at {start} after one at {self._start}", evidence=f"{start} {self._start}")
        fed = self.fed + final - start
        if fed > REPLAYS * bought:
            raise Refused(f"{fed} tokens were computed for a session of {bought}", rule="budget")
        if self._gate._clock.time() >= self.voucher.expires:
            raise Refused("the voucher has ended", rule="expired")
        self._start, self.fed, self.used = start, fed, max(self.used, final)

    def close(self) -> None:
        """See `Budget.close`."""
        self._gate._end(self)
