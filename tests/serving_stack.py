"""A paid gateway on an embedded chain, for tests: coin, payee, operator, buyers with money."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from eth_account import Account as EthAccount
from eth_account.messages import encode_defunct

from permit2_support import signed
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.genesis import PERMIT2, UPTO_PROXY
from tessera.chain.local import LocalChain
from tessera.core.clock import Clock, SystemClock
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import PaidRequest
from tessera.serving.paying.credit import CreditConfig
from tessera.serving.paying.holdings import HoldingsConfig
from tessera.serving.paying.keys import OperatorKeys
from tessera.serving.paying.owners import Tokens
from tessera.serving.paying.payments import PaymentConfig, Settlement, X402Payments, credit_name
from tessera.serving.paying.prices import TokenPrice
from tessera.serving.paying.till import Tables, Till, TillConfig, in_memory
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
    till: Till | None = None
    settled: list[Settlement] = field(default_factory=list)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway")

    async def buyer(self, units: int = 10 * PRICE, *, metered: bool = False) -> AccountKey:
        """Somebody with coins; Permit2 may move them for a `metered` one."""
        key = AccountKey.generate()
        if units:
            await self.coin.mint(key, key.account, units)
        if metered:
            await self.coin.approve(key, PERMIT2, 2**256 - 1)
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

    async def post(
        self,
        body: dict[str, Any] | None = None,
        payment: str | None = None,
        *,
        api_key: str | None = None,
        path: str = "/v1/completions",
    ) -> httpx.Response:
        headers = {} if payment is None else {"PAYMENT-SIGNATURE": payment}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        async with self.client() as client:
            return await client.post(path, json=body or completion(), headers=headers)

    async def buy_credit(
        self, key: AccountKey, units: int, *, payment: str | None = None, api_key: str | None = None, **body: Any
    ) -> httpx.Response:
        terms = {"accepted": {"amount": str(units)}, "authorization": {"value": str(units)}}
        payment = payment or self.sign(key, **terms)
        return await self.post({"units": str(units)} | body, payment, api_key=api_key, path="/v1/credit")

    async def sign_in(self, key: AccountKey) -> str:
        """A session's API key."""
        async with self.client() as client:
            text = (await client.get("/v1/sign-in", params={"account": key.account})).json()["text"]
            opened = await client.post("/v1/sign-in", json={"text": text, "signature": sign_text(key, text)})
        return str(opened.json()["api_key"])

    @property
    def balances(self) -> Balances:
        assert self.till is not None
        return self.till.balances

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

    def sign_metered(self, key: AccountKey, body: dict[str, Any] | None = None, **changes: Any) -> str:
        """A payment by `upto` for a completion, as an official client makes it, with `changes` by a cheat."""
        body = body or completion()
        request = PaidRequest("", b"", {}, MODEL, len(body["prompt"]), body["max_tokens"])
        offer = self.payments.offers(request)[1].requirements()
        accepted = offer | changes.pop("accepted", {})
        signing = {"amount": int(accepted["amount"]), "nonce": secrets.randbits(256),
                   "deadline": int(time.time()) + offer["maxTimeoutSeconds"], "to": offer["payTo"],
                   "facilitator": offer["extra"]["facilitatorAddress"], "chainId": self.chain_id}  # fmt: skip
        signer = changes.pop("signer", key)
        made = signed(changes.pop("token", self.coin.address), "upto", signer=signer, **(signing | changes))
        (token, amount), nonce, deadline = made.permit
        to, facilitator, after = made.witness
        authorization = {
            "from": key.account, "permitted": {"token": token, "amount": str(amount)}, "spender": UPTO_PROXY,
            "nonce": str(nonce), "deadline": str(deadline),
            "witness": {"to": to, "facilitator": facilitator, "validAfter": str(after)},
        }  # fmt: skip
        payload = {"permit2Authorization": authorization, "signature": "0x" + made.signature.hex()}
        payment = {"x402Version": 2, "accepted": accepted, "payload": payload}
        return base64.b64encode(json.dumps(payment).encode()).decode()

    async def credit(self, key: AccountKey) -> int:
        offer = self.payments.offer
        return (await self.balances.read(credit_name(offer.network, offer.asset, key.account))).units

    @property
    def chain_id(self) -> int:
        return int(self.payments.offer.network.split(":")[1])


async def open_stack(
    engine: FakeEngine | None = None,
    *,
    price: int = PRICE,
    tokens: TokenPrice | None = None,
    chain: RpcChain | None = None,
    api_keys: Sequence[str] = (),
    clock: Clock | None = None,
    holdings: HoldingsConfig | None = None,
    rights: Sequence[Tokens] = (),
    tables: Tables | None = None,
    **settings: Any,
) -> Stack:
    """With a price for `tokens` it has all the ways to pay, else `exact` alone."""
    chain = chain or open_chain()
    operator = AccountKey(b"\x07" * 32)
    coin = await Coin.deploy(chain, operator)
    settled: list[Settlement] = []
    config = PaymentConfig(coin.address, await coin.name(), await coin.version(), price, PAYEE, tokens=tokens)
    engine = engine or FakeEngine(lambda prompt, sampling: list(b"hello world"))
    model = LocalModel(MODEL, engine, CharTokenizer())
    if tokens is None:
        payments = await X402Payments.open(config, chain, operator, on_settled=settled.append)
        app = create_app(GatewayConfig(**settings), [model], [OperatorKeys(api_keys), payments])
        return Stack(chain, coin, engine, payments, app, settled=settled)
    till = await Till.open(
        TillConfig(config, CreditConfig(least_units=1_000), "http://gateway", holdings, rights),
        chain, operator, clock or SystemClock(), tables=tables or in_memory, on_settled=settled.append,
    )  # fmt: skip
    app = create_app(GatewayConfig(**settings), [model], till.ways)
    till.mount(app)
    return Stack(chain, coin, engine, till.payments, app, till, settled)


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "abc", "max_tokens": 20} | changes


def sign_authorization(key: AccountKey, domain: dict[str, Any], authorization: dict[str, Any]) -> str:
    fields = {"from": "address", "to": "address", "value": "uint256", "validAfter": "uint256",
              "validBefore": "uint256", "nonce": "bytes32"}  # fmt: skip
    types = {"TransferWithAuthorization": [{"name": name, "type": kind} for name, kind in fields.items()]}
    message = authorization | {name: int(authorization[name]) for name in ("value", "validAfter", "validBefore")}
    signed = EthAccount.sign_typed_data(key.secret, domain, types, message)
    return "0x" + bytes(signed.signature).hex()


def sign_text(key: AccountKey, text: str) -> str:
    """As a wallet signs a text (EIP-191)."""
    return "0x" + bytes(EthAccount.sign_message(encode_defunct(text=text), key.secret).signature).hex()


def other_account() -> Account:
    return AccountKey(b"\x09" * 32).account
