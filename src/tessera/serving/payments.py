"""x402 `exact` payments on an EVM chain, verified and settled by the gateway itself.

Invariants: one authorization pays for one request, however often and at once it is sent; nothing is served before its
transfer is on the chain; what was settled without an answer is served later for the same request without paying again,
also when the gateway was killed in between (`charging` says what a buyer can rely on). Amounts are integers of the
asset's smallest unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
import structlog
from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode

from tessera.core import encoding
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, TesseraError
from tessera.core.hashing import keccak, sha256
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.serving.charging import PAYMENT_HEADER, PaidRequest, Usage
from tessera.serving.facilitator import Facilitator, PaymentChain, load_x402
from tessera.serving.ledger import Lease, PaymentLedger
from tessera.serving.offers import Offer, Payment, encode_header, parse_payment
from tessera.storage.location import MEMORY

__all__ = ["PaymentConfig", "Settlement", "X402Payments"]

log = structlog.get_logger()

NONCE_USED = "invalid_exact_evm_nonce_already_used"
POOR = "invalid_exact_evm_insufficient_balance"
AUTHORIZATION_USED = keccak(b"AuthorizationUsed(address,bytes32)")
DOUBT_BLOCKS = 2_000  # how far back a settlement is looked for whose receipt did not come; an hour at 2 s a block
SIMULATION_FAILED = "invalid_exact_evm_transaction_simulation_failed"


@dataclass(frozen=True, slots=True)
class PaymentConfig:
    """The price list and its limits."""

    asset: Account  # the coin's contract; it must speak EIP-3009
    asset_name: str  # as in the coin's EIP-712 domain
    asset_version: str
    price_units: int  # for one request, in the coin's smallest unit
    pay_to: Account  # normally the model's share contract
    timeout_s: int = 120  # how long a signed authorization should stay valid
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
        database: str | Path = MEMORY,
        schema: str = "",
        clock: Clock | None = None,
        on_settled: Callable[[Settlement], None] | None = None,
    ) -> None:
        self._chain = chain
        self._clock = clock or SystemClock()
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
                config, chain, key, chain_id, database=database, schema=schema, clock=clock, on_settled=on_settled
            )

        return await anyio.to_thread.run_sync(make)

    @property
    def held(self) -> int:
        """Payments in flight."""
        return self._ledger.held

    async def hold(self, request: PaidRequest) -> X402Hold:
        """See `Payments.hold`; it refuses what does not pay. Cost: two or three reads of the chain."""
        header = request.headers.get(PAYMENT_HEADER)
        if header is None:
            raise self.offer.refuse(request.url)
        try:
            payment = parse_payment(header)
        except Invalid as error:
            raise self.offer.refuse(request.url, f"invalid_payload: {error.message}") from error
        if reason := self.offer.mismatch(payment.accepted):
            raise self.offer.refuse(request.url, reason)
        try:
            lease = await self._ledger.hold(payment.name)
        except Conflict as error:
            raise self.offer.refuse(request.url, NONCE_USED) from error
        hold = X402Hold(self, payment, request, lease)
        try:
            await hold.verify()
        except BaseException:
            await hold.release()
            raise
        return hold

    def close(self) -> None:
        """Let go of the database. Payments in flight stay leased until their leases end."""
        self._ledger.close()


class X402Hold:
    """One authorization, set aside for one request."""

    def __init__(self, owner: X402Payments, payment: Payment, request: PaidRequest, lease: Lease) -> None:
        from x402.schemas import PaymentPayload, PaymentRequirements

        terms = owner.offer.requirements()
        self._owner = owner
        self._requirements = PaymentRequirements.model_validate(terms)
        self._payload = PaymentPayload(payload=payment.payload, accepted=self._requirements)
        self._name, self._lease = payment.name, lease
        self._request = request
        # What was paid under other terms, at another gateway or before a new price, buys nothing under these.
        self._digest = sha256(encoding.encode(terms), request.digest)
        self._state: Literal["held", "paid", "released"] = "held"
        self._outcome: Literal["owed", "forget", "keep"] = "keep"

    @property
    def caller(self) -> str:
        return self._name.payer

    async def verify(self) -> None:
        """Raises: PaymentRequired with the reason; Unavailable or Late when the chain cannot be asked."""
        if await self._owed():
            self._state = "paid"
            return
        verdict = await self._owner._facilitator.verify(self._payload, self._requirements)
        if not verdict.is_valid:
            reason = verdict.invalid_reason or "invalid_payment"
            raise self._refuse(await self._diagnose() if reason == SIMULATION_FAILED else reason)

    async def start(self) -> dict[str, str]:
        """See `Hold.start`. An owed payment is not settled again."""
        if self._state == "paid":
            self._outcome = "forget"
            return {}
        try:
            fresh = await self._owner._ledger.intend(self._lease, self._digest)
        except Conflict as error:
            raise self._refuse(NONCE_USED) from error
        # From here on the payment is in doubt, whatever happens to this process, until its release says otherwise.
        result = await self._owner._facilitator.settle(self._payload, self._requirements)
        header = {"PAYMENT-RESPONSE": encode_header(result.model_dump(by_alias=True, exclude_none=True))}
        if not result.success:
            reason = result.error_reason or "settlement_failed"
            if fresh and reason != "settlement_pending":
                self._outcome = "forget"  # it did not move, and no earlier try is in doubt
            raise self._refuse(reason, header)
        self._state, self._outcome = "paid", "forget"
        self._announce(result.transaction)
        return header

    async def finish(self, usage: Usage) -> dict[str, str]:
        """See `Hold.finish`: the price does not depend on the answer's length."""
        return {}

    def owe(self) -> None:
        """See `Hold.owe`. Written down by `release`; until then, and if that never comes, it is in doubt."""
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
            log.warning("payment_not_released", payer=self._name.payer, outcome=self._outcome, reason=error.message)

    async def _owed(self) -> bool:
        """Whether this payment was settled for this very request, which got no answer."""
        memory = await self._owner._ledger.recall(self._name, self._digest)
        if memory == "doubtful":
            return await self._used() and await self._arrived()
        return memory == "owed"

    async def _diagnose(self) -> str:
        """Why the chain would refuse the transfer."""
        if await self._used():
            return NONCE_USED
        payer = abi_encode(["address"], [self._name.payer])
        (balance,) = abi_decode(["uint256"], await self._read("balanceOf(address)", payer))
        return POOR if balance < self._owner.offer.units else SIMULATION_FAILED

    async def _used(self) -> bool:
        nonce = bytes.fromhex(self._name.nonce[2:])
        arguments = abi_encode(["address", "bytes32"], [self._name.payer, nonce])
        (used,) = abi_decode(["bool"], await self._read("authorizationState(address,bytes32)", arguments))
        return bool(used)

    async def _arrived(self) -> bool:
        """Whether the used authorization moved money, rather than being cancelled by its payer."""
        chain = self._owner._chain
        topics = [AUTHORIZATION_USED, _word(self._name.payer), _word(self._name.nonce)]
        since = max(0, await chain.block_number() - DOUBT_BLOCKS)
        return bool(await chain.logs(self._owner.offer.asset, topics, since))

    async def _read(self, signature: str, arguments: bytes) -> bytes:
        return await self._owner._chain.call(self._owner.offer.asset, keccak(signature.encode())[:4] + arguments)

    def _refuse(self, reason: str, headers: dict[str, str] | None = None) -> Exception:
        log.info("payment_refused", reason=reason, payer=self._name.payer)
        return self._owner.offer.refuse(self._request.url, reason, headers)

    def _announce(self, transaction: str) -> None:
        units = self._owner.offer.units
        payer = parse_account(self._name.payer)
        log.info("payment_settled", transaction=transaction, payer=payer, units=units)
        if self._owner._on_settled is not None:
            self._owner._on_settled(Settlement(transaction, payer, units, self._owner._clock.time()))


def _word(text: str) -> bytes:
    return bytes.fromhex(text[2:]).rjust(32, b"\0")
