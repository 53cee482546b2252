"""The x402 buyer: pays once for an intent, whatever the seller, its facilitator, the network or a crash does.

    ask ──▶ 402 ──▶ reserve ──▶ write that we sign ──▶ sign ──▶ send ──▶ look at the chain ──▶ consume

Invariants: one intent has one nonce, so its second settlement is refused by the asset's contract itself; no terms but
those reserved are ever signed, whatever a later 402 says; redirects are not followed; only the chain says that money
moved, never a seller; an intent is given up only when the chain says that its authorization is unused and can never be
used. After a crash at any point `reconcile` brings the ledger to what the chain says, and `buy` with the same intent
goes on where it stopped.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
import httpx
import structlog
from eth_abi.abi import encode as abi_encode

from tessera.agents.approvals import Approval
from tessera.agents.intents import Authorization, Coin, Intent, authorize, resource_name
from tessera.agents.ledger import Entry, IntentLedger, Signing
from tessera.agents.mandates import FULL_BPS, parse_asset
from tessera.agents.settlements import Settlements
from tessera.core.amount import Amount
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, Late, PaymentRequired, Refused, TesseraError, Unavailable
from tessera.core.hashing import keccak
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

__all__ = ["Bought", "Payer", "PayerConfig", "Purchase", "SendingChain", "parse_offer"]

log = structlog.get_logger()
T = TypeVar("T")

_TRANSFER_TYPES = ("address", "address", "uint256", "uint256", "uint256", "bytes32", "uint8", "bytes32", "bytes32")
_TRANSFER = f"transferWithAuthorization({','.join(_TRANSFER_TYPES)})"
HEADER_LIMIT = 16_384  # characters of an offer
BUSY = (408, 425, 429)  # not now: the same payment may come again
RENEW_S = 10  # an authorization with less time than this left is signed anew, with the same nonce


class SendingChain(Protocol):
    """A chain that takes transactions; see `chain.types.Chain`."""

    async def send(self, key: AccountKey, to: Account | None, data: bytes) -> Any: ...


@dataclass(frozen=True, slots=True)
class PayerConfig:
    """Patience and limits."""

    valid_s: int = 120  # how long a signed authorization is good
    tries: int = 3  # of one call of `buy`; all send the same payment
    pause_s: float = 0.5  # before the second try; doubles
    timeout_s: float = 330.0  # of one request
    answer_limit_bytes: int = 16 * 2**20
    margin_s: int = 120  # after an authorization ended, before its intent is given up
    lease_s: float = 900.0  # a reservation that nobody signs for so long is given up


@dataclass(frozen=True, slots=True)
class Purchase:
    """What is to be bought.

    Args:
        intent: its name; see `intent_id`. The same name is the same purchase for ever.
        most: the highest price that is accepted.
        payee: the only one who may be paid, beside what the mandate says; None = whoever the mandate allows.
    """

    intent: str
    mandate: str
    url: str
    most: Amount
    method: str = "GET"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    purpose: str = ""
    payee: Account | None = None

    @property
    def resource(self) -> str:
        return resource_name(self.method, self.url, self.body)


@dataclass(frozen=True, slots=True)
class Bought:
    """The answer. `entry` is None when the seller asked for no money."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    entry: Entry | None


def parse_offer(response_headers: Mapping[str, str], coin: Coin) -> tuple[Account, Amount]:
    """Payee and price in a 402, for our coin. Raises: Invalid for what cannot be read; Refused for other terms."""
    text = response_headers.get("payment-required", "")
    if not 0 < len(text) <= HEADER_LIMIT:
        raise Invalid(f"the 402 has an offer of {len(text)} characters, expected 1 to {HEADER_LIMIT}")
    try:
        data = json.loads(base64.b64decode(text, validate=True))
        offers = [dict(offer) for offer in data["accepts"]]
    except (binascii.Error, ValueError, RecursionError, KeyError, TypeError) as error:
        raise Invalid("the 402's offer is not base64 of x402's JSON") from error
    chain_id, contract = parse_asset(coin.asset)
    for offer in offers:
        if offer.get("scheme") == "exact" and offer.get("network") == f"eip155:{chain_id}":
            price = offer.get("amount")
            if str(offer.get("asset")).lower() != contract.lower():
                continue
            if not isinstance(price, str) or not (price.isascii() and price.isdigit() and len(price) <= 39):
                raise Invalid("the price is no integer in a string")
            return parse_account(offer.get("payTo")), Amount(int(price), coin.asset)
    raise Refused(f"the seller does not take {coin.asset}", rule="asset")


class Payer:
    """Buys with one purse, under mandates whose agent it is.

    Args:
        key: the purse's, whose account is the mandates' agent.
        coin: the one asset it pays with.
        transport: how to reach sellers; None = over the network.
    """

    def __init__(
        self,
        ledger: IntentLedger,
        key: AccountKey,
        coin: Coin,
        settlements: Settlements,
        *,
        config: PayerConfig | None = None,
        clock: Clock | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.config = config or PayerConfig()
        self._ledger, self._key, self._coin, self._settlements = ledger, key, coin, settlements
        self._clock = clock or SystemClock()
        self._http = httpx.AsyncClient(transport=transport, timeout=self.config.timeout_s, follow_redirects=False)

    async def buy(self, purchase: Purchase, approval: Approval | None = None) -> Bought:
        """Buy it, or go on with it, or fetch again what was paid for.

        Raises: Refused with the limit, "changed_terms" or "redirect" as its rule, and with no more money moved;
            Conflict for an intent that was given up; Unavailable when it is paid but not delivered, or in doubt: the
            same purchase may be tried again at any time.
        """
        entry = await _thread(lambda: self._ledger.find(purchase.intent))
        if entry is None:
            answer, _ = await self._request(purchase, None)
            if answer is None:
                raise Unavailable("the seller does not answer; nothing was signed")
            if answer.status != 402:
                return _free(answer)
            payee, price = parse_offer(answer.headers, self._coin)
            entry = await self._reserve(purchase, payee, price, approval)
        self._check_same(purchase, entry)
        return await self._present(purchase, entry)

    async def pay(self, intent: Intent, chain: SendingChain, approval: Approval | None = None) -> Entry:
        """Pay an account that sells nothing over HTTP: the coin's own transfer by authorization, which the purse sends.

        Raises: as `buy`; what the chain says when it refuses, with the intent left open: it may be tried again.
        """
        entry = await _thread(lambda: self._ledger.find(intent.id))
        if entry is None:
            entry = await self._set_aside(intent, approval)
        if entry.intent != intent:
            raise Refused("this intent is known for another payment", rule="changed_terms")
        if entry.is_over:
            return entry
        signed = await self._sign(entry)
        _, contract = parse_asset(self._coin.asset)
        r, s, v = signed.signature[:32], signed.signature[32:64], signed.signature[64]
        words = (signed.payer, signed.payee, signed.units, 0, signed.valid_before, signed.nonce, v, r, s)
        try:
            await chain.send(self._key, contract, keccak(_TRANSFER.encode())[:4] + abi_encode(_TRANSFER_TYPES, words))
        except TesseraError:
            entry = await self._look(entry)  # the answer may be lost, or somebody else has sent it
            if entry.state != "consumed":
                raise
            return entry
        return await self._look(entry)

    async def reconcile(self) -> list[Entry]:
        """Bring every open intent to what the chain says; what is still in doubt stays open.

        Returns: those that ended. Raises: Unavailable or Late when the chain cannot be asked.
        """
        ended = []
        for entry in await _thread(lambda: self._ledger.entries(open_only=True)):
            if self._is_ours(entry) and (settled := await self._settle(entry)).is_over:
                ended.append(settled)
        return ended

    async def aclose(self) -> None:
        await self._http.aclose()

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _reserve(self, purchase: Purchase, payee: Account, price: Amount, approval: Approval | None) -> Entry:
        if price > purchase.most:
            raise Refused(f"the price is {price.units} units, at most {purchase.most.units}", rule="price")
        if purchase.payee is not None and payee != parse_account(purchase.payee):
            raise Refused(f"the seller wants {payee} to be paid, expected {purchase.payee}", rule="payee")
        intent = Intent(purchase.intent, purchase.mandate, payee, price, purchase.resource, purchase.purpose)
        return await self._set_aside(intent, approval)

    async def _set_aside(self, intent: Intent, approval: Approval | None) -> Entry:
        chain = await _thread(lambda: self._ledger.chain(intent.mandate))
        if chain[0].agent != self._key.account:
            raise Refused(f"the mandate's agent is {chain[0].agent}, not {self._key.account}", rule="agent")
        balance = None
        if any(node.balance_bps < FULL_BPS for node in chain):
            balance = await self._settlements.balance(self._coin.asset, self._key.account)
        try:
            return await _thread(lambda: self._ledger.reserve(intent, balance=balance, approval=approval))
        except Refused as error:
            error.fields["intent"] = intent.to_dict()  # what the approver would have to sign, see `payment_call`
            raise

    def _check_same(self, purchase: Purchase, entry: Entry) -> None:
        intent = entry.intent
        same = (intent.mandate, intent.resource, intent.purpose)
        if same != (purchase.mandate, purchase.resource, purchase.purpose) or intent.amount > purchase.most:
            raise Refused("this intent is known for another purchase", rule="changed_terms")
        if entry.state == "released":
            raise Conflict(f"this intent was given up ({entry.note}): a new purchase needs a new one")

    async def _present(self, purchase: Purchase, entry: Entry) -> Bought:
        """Send the one payment until there is an answer, a few times."""
        pause_s, why = self.config.pause_s, "no answer"
        for attempt in range(self.config.tries):
            if attempt:
                await anyio.sleep(pause_s)
                pause_s *= 2
            authorization = await self._sign(entry)
            answer, why = await self._request(purchase, _header(authorization, entry.intent, self._coin))
            entry = await self._look(entry)
            if answer is None:
                continue
            if 200 <= answer.status < 300:
                return Bought(answer.status, answer.headers, answer.body, entry)
            if 300 <= answer.status < 400:
                raise Refused("the seller sends the payment elsewhere", rule="redirect", state=entry.state)
            if answer.status == 402:
                self._check_terms(answer, entry)
            elif 400 <= answer.status < 500 and answer.status not in BUSY:
                raise Refused(f"the seller refuses the request: status {answer.status}", rule="seller",
                              state=entry.state)  # fmt: skip
            why = f"status {answer.status}"
        state = "it is paid" if entry.state == "consumed" else "whether it will be paid is in doubt"
        raise Unavailable(f"the seller does not deliver ({why}), {state}; the same intent can be tried again",
                          state=entry.state)  # fmt: skip

    async def _sign(self, entry: Entry) -> Authorization:
        """The authorization of this intent: the same bytes while they are good, and always the same nonce."""
        now, signing = int(self._clock.time()), entry.signing
        if entry.state != "consumed" and (signing is None or signing.valid_before < now + RENEW_S):
            block = await self._settlements.head()
            wanted = Signing(now + self.config.valid_s, block)
            signing = await _thread(lambda: self._ledger.sign(entry.intent.id, wanted))
        assert signing is not None, "a consumed intent was signed"
        return authorize(entry.intent, self._coin, self._key, signing.valid_before)

    async def _look(self, entry: Entry) -> Entry:
        """What the chain says after a request. A chain that does not answer leaves the entry as it is."""
        current = await _thread(lambda: self._ledger.find(entry.intent.id))
        assert current is not None
        if current.state != "signed":
            return current
        try:
            return await self._settle(current)
        except (Unavailable, Late) as error:
            log.warning("settlement_not_seen", intent=entry.intent.id, code=error.code)
            return current

    async def _settle(self, entry: Entry) -> Entry:
        """The entry as the chain has it, and the ledger with it."""
        intent, ledger, now = entry.intent, self._ledger, self._clock.time()
        if entry.signing is None:
            if entry.state == "reserved" and now >= entry.reserved_at + self.config.lease_s:
                return await _ended(lambda: ledger.release(intent.id, "never signed", seen=None), entry, ledger)
            return entry
        nonce = intent.nonce(self._key.account)
        fate = await self._settlements.fate(intent.amount.asset, self._key.account, nonce, entry.signing.block)
        if fate.state == "paid":
            return await _thread(lambda: ledger.consume(intent.id, fate.transaction))
        if fate.state == "cancelled":
            return await _ended(lambda: ledger.release(intent.id, "cancelled", seen=entry.signing), entry, ledger)
        if fate.time >= entry.signing.valid_before + self.config.margin_s:
            return await self._give_up(entry)
        return entry

    async def _give_up(self, entry: Entry) -> Entry:
        """Unless it was signed anew meanwhile, by a process beside ours."""
        seen = entry.signing

        def work() -> Entry:
            return self._ledger.release(entry.intent.id, "expired unused", seen=seen)

        return await _ended(work, entry, self._ledger)

    def _check_terms(self, answer: Bought, entry: Entry) -> None:
        """A second 402 with other terms is no reason to sign again."""
        try:
            payee, price = parse_offer(answer.headers, self._coin)
        except TesseraError as error:
            raise Refused(f"a 402 after the payment: {error.message}", rule="changed_terms",
                          state=entry.state) from error  # fmt: skip
        if (payee, price) != (entry.intent.payee, entry.intent.amount):
            raise Refused("after the payment the seller wants another payee or price", rule="changed_terms",
                          state=entry.state)  # fmt: skip

    async def _request(self, purchase: Purchase, payment: str | None) -> tuple[Bought | None, str]:
        """One request. None when no whole answer came: anything may have happened."""
        headers = dict(purchase.headers) | ({} if payment is None else {"PAYMENT-SIGNATURE": payment})
        try:
            with anyio.fail_after(self.config.timeout_s):
                async with self._http.stream(
                    purchase.method, purchase.url, content=purchase.body or None, headers=headers
                ) as response:
                    body = bytearray()
                    async for piece in response.aiter_bytes():
                        body += piece
                        if len(body) > self.config.answer_limit_bytes:
                            return None, "an answer that is too long"
                    return Bought(response.status_code, response.headers, bytes(body), None), ""
        except (httpx.HTTPError, TimeoutError) as error:
            return None, type(error).__name__
        except httpx.InvalidURL as error:
            raise Invalid(f"the URL cannot be read: {error}") from error

    def _is_ours(self, entry: Entry) -> bool:
        mandate = self._ledger.mandate(entry.intent.mandate)
        paid_here = entry.intent.amount.asset == self._coin.asset and not entry.intent.is_job
        return mandate.agent == self._key.account and paid_here


def _free(answer: Bought) -> Bought:
    if 200 <= answer.status < 300:
        return answer
    if answer.status in (*BUSY, 500, 502, 503, 504):
        raise Unavailable(f"the seller answers with status {answer.status}; nothing was signed")
    if 300 <= answer.status < 400:
        raise Refused("the seller sends us elsewhere", rule="redirect")
    raise PaymentRequired(f"the seller answers with status {answer.status} and no offer", status=answer.status)


def _header(authorization: Authorization, intent: Intent, coin: Coin) -> str:
    chain_id, contract = parse_asset(coin.asset)
    accepted = {
        "scheme": "exact", "network": f"eip155:{chain_id}", "asset": contract, "amount": str(authorization.units),
        "payTo": authorization.payee, "maxTimeoutSeconds": 120,
        "extra": {"name": coin.name, "version": coin.version},
    }  # fmt: skip
    payment: dict[str, Any] = {
        "x402Version": 2, "payload": authorization.to_x402(), "accepted": accepted,
        "extensions": {"payment-identifier": {"info": {"required": False, "id": intent.id}}},
    }  # fmt: skip
    return base64.b64encode(json.dumps(payment, separators=(",", ":")).encode()).decode()


async def _ended(work: Callable[[], Entry], entry: Entry, ledger: IntentLedger) -> Entry:
    """End an intent; when somebody was first, what he made of it."""
    try:
        return await _thread(work)
    except Conflict:
        return await _thread(lambda: ledger.find(entry.intent.id)) or entry


async def _thread(work: Callable[[], T]) -> T:
    """In a thread: neither a far server nor a slow disk holds up the event loop."""
    return await anyio.to_thread.run_sync(work)
