"""What the tests of agents share: a mandate, a ledger, a chain with a coin, sellers honest and hostile."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tessera.agents.intents import Coin, Intent, intent_id
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import Mandate, asset_id, parse_asset, sign_mandate
from tessera.agents.paying import Payer, PayerConfig, Purchase
from tessera.agents.settlements import FakeSettlements
from tessera.core.amount import Amount
from tessera.core.clock import FakeClock
from tessera.core.hashing import keccak
from tessera.core.ids import Account, account_from_bytes
from tessera.core.signing import AccountKey

NOW = 1_800_000_000
CONTRACT = account_from_bytes(b"\x0c" * 20)
ASSET = asset_id(31_337, CONTRACT)
COIN = Coin(ASSET, "Test USD", "2")
QUICK = PayerConfig(pause_s=0.0, tries=3)
OPENED: list[IntentLedger] = []


@pytest.fixture(autouse=True)
def close_ledgers() -> Iterator[None]:
    """Those of `open_ledger`, after each test of a module that imports this."""
    yield
    while OPENED:
        OPENED.pop().close()


def key(name: str) -> AccountKey:
    """An account for a role: always the same."""
    return AccountKey(keccak(name.encode()))


PAYER, AGENT, APPROVER, ATTACKER = key("payer"), key("agent"), key("approver"), key("attacker")
SELLER = key("seller").account


def units(amount: int, asset: str = ASSET) -> Amount:
    return Amount(amount, asset)


def make_mandate(**changes: Any) -> Mandate:
    """Pays the seller up to 100 at once and 250 a day, and asks above 50."""
    asset = changes.pop("asset", ASSET)
    fields: dict[str, Any] = {
        "payer": PAYER.account, "agent": AGENT.account, "approver": APPROVER.account, "per_payment": 100,
        "per_period": 250, "approve_above": 100, "expires_at": NOW + 30 * 86_400, "payees": (SELLER,),
    }  # fmt: skip
    fields |= changes
    for name in ("per_payment", "per_period", "approve_above"):
        fields[name] = Amount(fields[name], asset)
    return Mandate(**fields)


def open_ledger(
    *mandates: Mandate, where: Any = ":memory:", clock: Any = None, signer: AccountKey = PAYER
) -> IntentLedger:
    ledger = IntentLedger(where, clock=clock or FakeClock(NOW))
    OPENED.append(ledger)
    for mandate in mandates:
        ledger.open(sign_mandate(mandate, signer))
    return ledger


def make_intent(mandate: Mandate, name: str | int = "purchase", amount: int = 40, **changes: Any) -> Intent:
    fields: dict[str, Any] = {"payee": SELLER, "resource": "GET https://seller/data"} | changes
    return Intent(intent_id(name), mandate.id, amount=Amount(amount, mandate.asset), **fields)


@dataclass
class Seller:
    """Sells `prices` over x402 and settles on `chain`, as an honest gateway does. `habit` turns it hostile.

    A habit gets the request and the payment (None: there is none), and answers itself or returns None.
    """

    chain: FakeSettlements
    prices: dict[str, int] = field(default_factory=lambda: {"/data": 40})
    pay_to: Account = SELLER
    habit: Callable[[httpx.Request, dict[str, Any] | None], httpx.Response | None] | None = None
    delivered: list[str] = field(default_factory=list)
    payments: list[dict[str, Any]] = field(default_factory=list)
    served: dict[tuple[str, str], str] = field(default_factory=dict)  # what a settled nonce has paid for

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.answer)

    def answer(self, request: httpx.Request) -> httpx.Response:
        payment = self.read(request)
        if payment is not None:
            self.payments.append(payment)
        if self.habit is not None and (response := self.habit(request, payment)) is not None:
            return response
        return self.honest(request, payment)

    def honest(self, request: httpx.Request, payment: dict[str, Any] | None) -> httpx.Response:
        path = request.url.path
        if payment is None:
            return self.offer(path)
        name = (payment["from"], payment["nonce"])
        if self.served.get(name) != path:
            if name in self.served or not self.settle(payment, path):
                return self.offer(path, error="payment refused")
            self.served[name] = path
        self.delivered.append(path)
        return httpx.Response(200, json={"data": path}, headers={"PAYMENT-RESPONSE": "e30="})

    def settle(self, payment: dict[str, Any], path: str) -> bool:
        if payment["to"] != self.pay_to or int(payment["value"]) != self.prices[path]:
            return False
        nonce = bytes.fromhex(payment["nonce"][2:])
        before = int(payment["validBefore"])
        return self.chain.settle(payment["from"], payment["to"], int(payment["value"]), before, nonce) is not None

    def offer(self, path: str, **changes: Any) -> httpx.Response:
        chain_id, contract = parse_asset(self.chain.asset)
        terms: dict[str, Any] = {
            "scheme": "exact", "network": f"eip155:{chain_id}", "asset": contract, "amount": str(self.prices[path]),
            "payTo": self.pay_to, "maxTimeoutSeconds": 60, "extra": {"name": "Test USD", "version": "2"},
        }  # fmt: skip
        error = changes.pop("error", "payment required")
        body = {"x402Version": 2, "resource": {"url": path}, "accepts": [terms | changes], "error": error}
        header = base64.b64encode(json.dumps(body).encode()).decode()
        return httpx.Response(402, headers={"PAYMENT-REQUIRED": header})

    @staticmethod
    def read(request: httpx.Request) -> dict[str, Any] | None:
        text = request.headers.get("payment-signature")
        return None if text is None else json.loads(base64.b64decode(text))["payload"]["authorization"]


@dataclass
class Shop:
    """A payer with 1,000 units in its purse, and one seller."""

    mandate: Mandate
    ledger: IntentLedger
    chain: FakeSettlements
    seller: Seller
    clock: FakeClock

    def payer(self, **settings: Any) -> Payer:
        settings = {"config": QUICK, "clock": self.clock, "transport": self.seller.transport()} | settings
        return Payer(self.ledger, AGENT, COIN, self.chain, **settings)

    def purchase(self, name: str | int = "purchase", path: str = "/data", **changes: Any) -> Purchase:
        fields: dict[str, Any] = {"most": units(100)} | changes
        return Purchase(intent_id(name), self.mandate.id, f"https://seller{path}", **fields)

    def pass_time(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.chain.now += seconds


def open_shop(where: Any = ":memory:", **changes: Any) -> Shop:
    clock, mandate = FakeClock(NOW), make_mandate(**changes)
    chain = FakeSettlements(ASSET, {AGENT.account: 1_000}, NOW)
    return Shop(mandate, open_ledger(mandate, where=where, clock=clock), chain, Seller(chain), clock)
