"""A paid gateway on an embedded chain, for tests: coin, payee, operator, buyers with money."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from eth_account import Account as EthAccount

from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.core.clock import SystemClock
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.keys import OperatorKeys
from tessera.serving.payments import PaymentConfig, Settlement, X402Payments
from tessera.serving.text import CharTokenizer

MODEL = "tessera-test"
PRICE = 40_000
PAYEE = AccountKey(b"\x05" * 32).account
CHAIN_ID = 31_337


def open_chain() -> RpcChain:
    return LocalChain(None, chain_id=CHAIN_ID, clock=SystemClock()).client()


@dataclass
class Stack:
    """`app` sells completions of `engine` for `PRICE` units each."""

    chain: RpcChain
    coin: Coin
    engine: FakeEngine
    payments: X402Payments
    app: Any
    settled: list[Settlement] = field(default_factory=list)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway")

    async def buyer(self, units: int = 10 * PRICE) -> AccountKey:
        key = AccountKey.generate()
        if units:
            await self.coin.mint(key, key.account, units)
        return key

    async def income(self) -> int:
        return await self.coin.balanceOf(PAYEE)

    async def cancel(self, key: AccountKey, payment: str) -> None:
        """The payer cancels what it has signed."""
        authorization = json.loads(base64.b64decode(payment))["payload"]["authorization"]
        nonce = bytes.fromhex(authorization["nonce"][2:])
        types = {
            "CancelAuthorization": [{"name": "authorizer", "type": "address"}, {"name": "nonce", "type": "bytes32"}]
        }
        domain = {"name": "Test USD", "version": "2", "chainId": self.chain_id, "verifyingContract": self.coin.address}
        message = {"authorizer": key.account, "nonce": nonce}
        signed = EthAccount.sign_typed_data(key.secret, domain, types, message)
        signature = bytes(signed.signature)
        await self.coin.cancelAuthorization(key, key.account, nonce, signature[64], signature[:32], signature[32:64])

    async def post(self, body: dict[str, Any] | None = None, payment: str | None = None) -> httpx.Response:
        headers = {} if payment is None else {"PAYMENT-SIGNATURE": payment}
        async with self.client() as client:
            return await client.post("/v1/completions", json=body or completion(), headers=headers)

    def sign(self, key: AccountKey, *, signer: AccountKey | None = None, **changes: Any) -> str:
        """A payment header for the offer, as an official client makes it, with `changes` by a cheat."""
        offer = self.payments.offer.requirements()
        accepted = offer | changes.pop("accepted", {})
        now = int(time.time())
        authorization: dict[str, Any] = {
            "from": key.account, "to": offer["payTo"], "value": offer["amount"], "validAfter": "0",
            "validBefore": str(now + 600), "nonce": "0x" + AccountKey.generate().secret.hex(),
        }  # fmt: skip
        authorization |= changes.pop("authorization", {})
        domain = {"name": "Test USD", "version": "2", "chainId": self.chain_id, "verifyingContract": self.coin.address}
        domain |= changes.pop("domain", {})
        assert not changes, changes
        signature = sign_authorization(signer or key, domain, authorization)
        payment = {"x402Version": 2, "accepted": accepted, "payload": {"authorization": authorization}}
        payment["payload"]["signature"] = signature  # type: ignore[index]
        return base64.b64encode(json.dumps(payment).encode()).decode()

    @property
    def chain_id(self) -> int:
        return int(self.payments.offer.network.split(":")[1])


async def open_stack(
    engine: FakeEngine | None = None,
    *,
    price: int = PRICE,
    chain: RpcChain | None = None,
    api_keys: Sequence[str] = (),
    **settings: Any,
) -> Stack:
    chain = chain or open_chain()
    operator = AccountKey(b"\x07" * 32)
    coin = await Coin.deploy(chain, operator)
    settled: list[Settlement] = []
    config = PaymentConfig(coin.address, await coin.name(), await coin.version(), price, PAYEE)
    payments = await X402Payments.open(config, chain, operator, on_settled=settled.append)
    engine = engine or FakeEngine(lambda prompt, sampling: list(b"hello world"))
    app = create_app(
        GatewayConfig(model=MODEL, **settings), engine, CharTokenizer(), [OperatorKeys(api_keys), payments]
    )
    return Stack(chain, coin, engine, payments, app, settled)


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "abc", "max_tokens": 20} | changes


def sign_authorization(key: AccountKey, domain: dict[str, Any], authorization: dict[str, Any]) -> str:
    fields = {"from": "address", "to": "address", "value": "uint256", "validAfter": "uint256",
              "validBefore": "uint256", "nonce": "bytes32"}  # fmt: skip
    types = {"TransferWithAuthorization": [{"name": name, "type": kind} for name, kind in fields.items()]}
    message = authorization | {name: int(authorization[name]) for name in ("value", "validAfter", "validBefore")}
    signed = EthAccount.sign_typed_data(key.secret, domain, types, message)
    return "0x" + bytes(signed.signature).hex()


def other_account() -> Account:
    return AccountKey(b"\x09" * 32).account
