"""x402 payments on an EVM chain, verified and settled by the gateway itself: `exact`, and metered by `upto`.

An `exact` payment is settled before a byte of the answer leaves. By `upto` a buyer signs for the most that its request
can cost, and what the tokens really cost is settled when the answer ends. When that fails after the answer left, its
price is a debt: the payer is refused until credit that it buys, or the chain, has made it good. So a payer costs us at
most what its requests in flight can cost, once.

Invariants: one authorization pays for one request, however often and at once it is sent; nothing leaves before its
price has moved, or is bound by a signature that only this gateway can use; what was settled without an answer is
served later for the same request without paying again, also when the gateway was killed in between (`charging` says
what a buyer can rely on). Amounts are integers of the asset's smallest unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
import structlog

from tessera.core import encoding
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.serving.income.vouchers import Purchase
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import PAYMENT_HEADER, PaidRequest, Usage, cost_headers
from tessera.serving.paying.evidence import balance_of, has_moved, is_used
from tessera.serving.paying.facilitator import Facilitator, PaymentChain, load_x402
from tessera.serving.paying.ledger import REMEMBER_S, Lease, PaymentLedger
from tessera.serving.paying.offers import Offer, Payment, encode_header, parse_payment, refuse
from tessera.serving.paying.prices import TokenPrice
from tessera.storage.location import MEMORY

__all__ = ["PaymentConfig", "Settlement", "X402Hold", "X402Payments", "credit_name"]

log = structlog.get_logger()

NONCE_USED = "invalid_exact_evm_nonce_already_used"
POOR = "invalid_exact_evm_insufficient_balance"
EXPIRES = "permit2_deadline_expired"
UNEXPLAINED = ("invalid_exact_evm_transaction_simulation_failed", "invalid_upto_evm_transaction_failed")
SLACK_S = 60  # of the time for which a metered payment must be good, what may pass on its way to us


@dataclass(frozen=True, slots=True)
class PaymentConfig:
    """The price list and its limits."""

    asset: Account  # the coin's contract; it must speak EIP-3009
    asset_name: str  # as in the coin's EIP-712 domain
    asset_version: str
    price_units: int  # for one request, in the coin's smallest unit
    pay_to: Account  # normally the model's share contract
    timeout_s: int = 120  # how long a signed authorization should stay valid
    tokens: TokenPrice | None = None  # what is metered costs so much; None = nothing is
    metered_timeout_s: int = 600  # the same for a metered one: above an answer's time limit and a settlement's
    max_held_per_payer: int = 16  # payments of one payer in flight
    description: str = "one completion"


@dataclass(frozen=True, slots=True)
class Settlement:
    """A payment that arrived. `time` in seconds since 1970."""

    transaction: str
    payer: Account
    units: int
    time: float


class X402Payments:
    """The gateway's `Payments`, over a chain.

    Args:
        key: sends the settlements and pays their gas; it never holds the buyers' money.
        balances: where debts are; credit that their payers buy pays for them.
        database: where payments in flight and owed ones are kept: a file, or the URL that several gateways share.
        schema: the name-space there.
        on_settled: told of each settlement, for pages and tables.
    """

    def __init__(
        self,
        config: PaymentConfig,
        chain: PaymentChain,
        key: AccountKey,
        chain_id: int,
        *,
        balances: Balances | None = None,
        database: str | Path = MEMORY,
        schema: str = "",
        clock: Clock | None = None,
        on_settled: Callable[[Settlement], None] | None = None,
    ) -> None:
        self._chain = chain
        self._clock = clock or SystemClock()
        self._balances = balances or Balances(self._clock)
        self._config, self._operator = config, key.account
        self._facilitator = Facilitator(chain, key, chain_id)
        self._on_settled = on_settled
        self.offer = Offer(
            network=f"eip155:{chain_id}",
            asset=parse_account(config.asset),
            asset_name=config.asset_name,
            asset_version=config.asset_version,
            units=config.price_units,
            pay_to=parse_account(config.pay_to),
            timeout_s=config.timeout_s,
            description=config.description,
        )
        self._ledger = PaymentLedger(
            self._clock,
            max_held_per_payer=config.max_held_per_payer,
            asset=f"{self.offer.network}/{self.offer.asset}",
            where=database,
            schema=schema,
        )

    @classmethod
    async def open(
        cls,
        config: PaymentConfig,
        chain: PaymentChain,
        key: AccountKey,
        *,
        balances: Balances | None = None,
        database: str | Path = MEMORY,
        schema: str = "",
        clock: Clock | None = None,
        on_settled: Callable[[Settlement], None] | None = None,
    ) -> X402Payments:
        """Reads the chain's id and checks that the asset is a contract. Raises: Invalid when it is not."""
        if not await chain.code(parse_account(config.asset)):
            raise Invalid(f"the asset {config.asset} is no contract on this chain")
        await anyio.to_thread.run_sync(load_x402)
        chain_id = await chain.chain_id()

        def make() -> X402Payments:
            return cls(
                config, chain, key, chain_id,
                balances=balances, database=database, schema=schema, clock=clock, on_settled=on_settled,
            )  # fmt: skip

        return await anyio.to_thread.run_sync(make)

    @property
    def held(self) -> int:
        """Payments in flight."""
        return self._ledger.held

    def offers(self, request: PaidRequest) -> tuple[Offer, ...]:
        """What `request` costs, by each scheme. By `exact`, never less than its tokens can cost: it may ask for many
        choices, which together are more than one context."""
        if self._config.tokens is None:
            return (self.offer,)
        most = self._config.tokens.most_up(request)
        return (replace(self.offer, units=max(self.offer.units, most)), self._metered(most))

    async def hold(self, request: PaidRequest) -> X402Hold:
        """See `Payments.hold`; it refuses what does not pay. Cost: two or three reads of the chain."""
        return await self._hold(request, self.offers(request))

    async def hold_units(self, request: PaidRequest, units: int, description: str) -> X402Hold:
        """As `hold`, for what costs exactly `units`. Debts are no hindrance: this may be how they are paid."""
        offer = replace(self.offer, units=units, description=description)
        return await self._hold(request, (offer,), indebted=True)

    async def _hold(self, request: PaidRequest, offers: Sequence[Offer], *, indebted: bool = False) -> X402Hold:
        header = request.headers.get(PAYMENT_HEADER)
        if header is None:
            raise refuse(offers, request.url)
        try:
            payment = parse_payment(header)
        except Invalid as error:
            raise refuse(offers, request.url, f"invalid_payload: {error.message}") from error
        offer = next((offer for offer in offers if offer.scheme == payment.scheme), offers[0])
        if reason := offer.mismatch(payment.accepted):
            raise refuse(offers, request.url, reason)
        if payment.scheme != offer.scheme:
            raise refuse(offers, request.url, f"invalid_payload: it is no payment of scheme {offer.scheme}")
        try:
            lease = await self._ledger.hold(payment.name, offer.units if offer.scheme == "upto" else 0)
        except Conflict as error:
            raise refuse(offers, request.url, NONCE_USED) from error
        hold = X402Hold(self, offers, offer, payment, request, lease)
        try:
            await hold.verify(indebted=indebted)
        except BaseException:
            await hold.release()
            raise
        return hold

    def _metered(self, units: int) -> Offer:
        return replace(
            self.offer, units=units, timeout_s=self._config.metered_timeout_s, facilitator=self._operator,
            description=f"{self._config.description}, charged by its tokens",
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the database. Payments in flight stay leased until their leases end."""
        self._ledger.close()


class X402Hold:
    """One authorization, set aside for one request."""

    def __init__(
        self,
        owner: X402Payments,
        offers: Sequence[Offer],
        offer: Offer,
        payment: Payment,
        request: PaidRequest,
        lease: Lease,
    ) -> None:
        from x402.schemas import PaymentPayload, PaymentRequirements

        terms = offer.requirements()
        self._owner, self._offers, self._offer = owner, offers, offer
        self._requirements = PaymentRequirements.model_validate(terms)
        self._payload = PaymentPayload(payload=payment.payload, accepted=self._requirements)
        self._payment, self._lease = payment, lease
        self._request = request
        # What was paid under other terms, at another gateway or before a new price, buys nothing under these.
        self._digest = sha256(encoding.encode(terms), request.digest)
        self._state: Literal["held", "paid", "released"] = "held"
        self._outcome: Literal["owed", "forget", "keep"] = "keep"

    @property
    def caller(self) -> str:
        return self._payment.name.payer

    @property
    def payer(self) -> Account:
        return parse_account(self._payment.name.payer)

    @property
    def nonce(self) -> str:
        """With the payer, what this payment is called for ever."""
        return self._payment.name.nonce

    @property
    def purchase(self) -> Purchase | None:
        """What workers can check for themselves."""
        return Purchase.from_x402(self._payment.payload)

    async def verify(self, *, indebted: bool) -> None:
        """Raises: PaymentRequired with the reason; Unavailable or Late when the chain cannot be asked."""
        if await self._owed():
            self._state = "paid"
            return
        if not indebted and await self._debt() > 0:
            raise self._refuse("debt")
        if self._offer.scheme == "upto":
            await self._check_metered()
        verdict = await self._owner._facilitator.verify(self._payload, self._requirements)
        if not verdict.is_valid:
            reason = verdict.invalid_reason or "invalid_payment"
            raise self._refuse(await self._diagnose(reason) if reason in UNEXPLAINED else reason)

    async def start(self) -> dict[str, str]:
        """See `Hold.start`. An owed payment is not settled again."""
        if self._state == "paid":
            self._outcome = "forget"
            return {}
        return await self._settle(self._offer.units) if self._offer.scheme == "exact" else {}

    async def finish(self, usage: Usage, *, delivered: bool = True) -> dict[str, str]:
        """See `Hold.finish`: by `exact` the price does not depend on the answer's length."""
        price = self._owner._config.tokens
        if self._offer.scheme == "exact" or self._state == "paid" or price is None:
            return {}
        units = min(price.cost_down(usage), self._offer.units)
        if not delivered:
            return await self._settle(units)
        # A debt until the money has moved: so it is one too when we are killed here, or the chain gives no answer.
        balances, name = self._owner._balances, self._credit
        await balances.add(name, "debt", -units, self.nonce)
        headers = await self._settle(units)
        await balances.add(name, "paid", units, self.nonce)
        return headers

    def owe(self) -> None:
        """See `Hold.owe`. Written down by `release`; until then, and if that never comes, it is in doubt."""
        if self._state == "paid":
            self._outcome = "owed"

    async def release(self) -> None:
        """See `Hold.release`."""
        if self._state == "released":
            return
        self._state = "released"
        try:
            with anyio.CancelScope(shield=True):
                await self._owner._ledger.release(self._lease, self._outcome, self._digest)
        except TesseraError as error:  # the answer stands, and the lease ends by itself
            log.warning("payment_not_released", payer=self.payer, outcome=self._outcome, reason=error.message)

    async def _settle(self, units: int) -> dict[str, str]:
        try:
            fresh = await self._owner._ledger.intend(self._lease, self._digest)
        except Conflict as error:
            raise self._refuse(NONCE_USED) from error
        # From here on the payment is in doubt, whatever happens to this process, until its release says otherwise.
        charge = self._requirements.model_copy(update={"amount": str(units)})
        result = await self._owner._facilitator.settle(self._payload, charge)
        header = {"PAYMENT-RESPONSE": encode_header(result.model_dump(by_alias=True, exclude_none=True))}
        if not result.success:
            reason = result.error_reason or "settlement_failed"
            if fresh and reason != "settlement_pending":
                self._outcome = "forget"  # it did not move, and no earlier try is in doubt
            raise self._refuse(reason, header)
        self._state, self._outcome = "paid", "forget"
        self._announce(result.transaction, units)
        return header | cost_headers(units, f"{self._offer.network}/{self._offer.asset}")

    async def _owed(self) -> bool:
        """Whether this payment was settled for this very request, which got no answer."""
        memory = await self._owner._ledger.recall(self._payment.name, self._digest)
        if memory == "doubtful":
            return await self._used() and await self._moved(self.nonce)
        return memory == "owed"

    async def _debt(self) -> int:
        """What the payer owes, once the chain has said which settlements without an answer did arrive."""
        balances, since = self._owner._balances, self._owner._clock.time() - REMEMBER_S
        balance, debts = await balances.debts(self._credit, since)
        if self.nonce in debts:
            raise self._refuse(NONCE_USED)
        for nonce, units in debts.items():
            if await self._used(nonce) and await self._moved(nonce):
                await balances.add(self._credit, "paid", units, nonce)
                balance += units
        return max(0, -balance)

    async def _check_metered(self) -> None:
        """What is settled later must be good until then: in time, and beside the payer's others in flight."""
        deadline = int(self._payment.payload["permit2Authorization"]["deadline"])
        if deadline < self._owner._clock.time() + self._offer.timeout_s - SLACK_S:
            raise self._refuse(EXPIRES)
        balance = await balance_of(self._owner._chain, self._offer.asset, self._payment.name.payer)
        if balance < self._lease.payers_units:
            raise self._refuse(POOR)

    async def _diagnose(self, reason: str) -> str:
        """Why the chain would refuse the transfer."""
        if await self._used():
            return NONCE_USED
        balance = await balance_of(self._owner._chain, self._offer.asset, self._payment.name.payer)
        return POOR if balance < self._offer.units else reason

    async def _used(self, nonce: str | None = None) -> bool:
        name = self._payment.name if nonce is None else replace(self._payment.name, nonce=nonce)
        return await is_used(self._owner._chain, self._offer.asset, name)

    async def _moved(self, nonce: str) -> bool:
        return await has_moved(self._owner._chain, self._offer.asset, replace(self._payment.name, nonce=nonce))

    @property
    def _credit(self) -> str:
        return credit_name(self._offer.network, self._offer.asset, self.payer)

    def _refuse(self, reason: str, headers: dict[str, str] | None = None) -> Exception:
        log.info("payment_refused", reason=reason, payer=self.payer)
        return refuse(self._offers, self._request.url, reason, headers)

    def _announce(self, transaction: str, units: int) -> None:
        log.info("payment_settled", transaction=transaction, payer=self.payer, units=units)
        if self._owner._on_settled is not None:
            self._owner._on_settled(Settlement(transaction, self.payer, units, self._owner._clock.time()))


def credit_name(network: str, asset: Account, payer: Account) -> str:
    """The balance of a payer's credit and debts in one coin."""
    return f"credit/{network}/{asset.lower()}/{payer.lower()}"
