"""`upto` with the official client and the official resource server, our facilitator: on a LocalChain, and on anvil."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from eth_account import Account as EthAccount
from fastapi import FastAPI, Request, Response
from x402 import x402Client
from x402.http.clients.httpx import x402AsyncTransport
from x402.http.middleware.fastapi import payment_middleware, set_settlement_overrides
from x402.http.types import PaymentOption, RouteConfig
from x402.mechanisms.evm.exact import ExactEvmClientScheme
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.mechanisms.evm.upto import UptoEvmClientScheme, UptoEvmServerScheme
from x402.schemas import AssetAmount, PaymentPayload, PaymentRequirements
from x402.server import x402ResourceServer

from chain_support import CHAIN_ID, anvil, fund_on_anvil, key
from permit2_support import coin_for_permit2
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.genesis import PERMIT2, standard_contracts
from tessera.chain.local import LocalChain
from tessera.chain.rpc import HttpRpc
from tessera.core.signing import AccountKey
from tessera.serving.paying.facilitator import Facilitator

pytestmark = pytest.mark.anyio
MOST, UNITS_A_WORD = 10_000, 700
NETWORK = f"eip155:{CHAIN_ID}"
PAYER, SELLER, OPERATOR = key("payer"), key("seller").account, key("operator")


@dataclass
class Market:
    """A seller of words: each costs `UNITS_A_WORD`, and a buyer signs for at most `MOST`."""

    chain: RpcChain
    coin: Coin
    facilitator: Facilitator
    app: FastAPI

    def buyer(self, person: AccountKey = PAYER) -> httpx.AsyncClient:
        """x402's own client, set up as its documentation says."""
        client = x402Client()
        client.register(NETWORK, UptoEvmClientScheme(EthAccountSigner(EthAccount.from_key(person.secret))))
        cap = {"network": NETWORK, "asset": self.coin.address, "max_amount_per_payment": str(MOST)}
        client.set_spend_controls({"allowed_assets": [cap]})  # type: ignore[list-item]
        transport = x402AsyncTransport(client, httpx.ASGITransport(self.app))
        return httpx.AsyncClient(transport=transport, base_url="http://seller")

    def offer(self) -> PaymentRequirements:
        return PaymentRequirements(
            scheme="upto", network=NETWORK, asset=self.coin.address, amount=str(MOST), pay_to=SELLER,
            max_timeout_seconds=120, extra={"facilitatorAddress": OPERATOR.account},
        )  # fmt: skip

    def sign(self) -> PaymentPayload:
        scheme = UptoEvmClientScheme(EthAccountSigner(EthAccount.from_key(PAYER.secret)))
        inner = scheme.create_payment_payload(self.offer())
        return PaymentPayload(x402_version=2, payload=inner, accepted=self.offer())


@pytest.fixture
async def market() -> Market:
    return await open_market(LocalChain(None, chain_id=CHAIN_ID).client())


async def open_market(chain: RpcChain) -> Market:
    """Its chain must go by the machine's clock: x402's client asks it too."""
    coin = await coin_for_permit2(chain, PAYER, 5 * MOST)
    facilitator = Facilitator(chain, OPERATOR, CHAIN_ID)
    server = x402ResourceServer(facilitator)
    server.register(NETWORK, UptoEvmServerScheme())
    price = AssetAmount(amount=str(MOST), asset=coin.address, extra={})
    option = PaymentOption(scheme="upto", pay_to=SELLER, price=price, network=NETWORK, max_timeout_seconds=120)
    app = FastAPI()
    pay = payment_middleware({"GET /words": RouteConfig(accepts=option)}, server)

    @app.middleware("http")
    async def paid(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await pay(request, call_next)

    @app.get("/words")
    async def words(count: int, response: Response) -> dict[str, Any]:
        set_settlement_overrides(response, {"amount": str(count * UNITS_A_WORD)})
        return {"words": ["word"] * count}

    return Market(chain, coin, facilitator, app)


async def test_a_buyer_signs_for_the_most_and_is_charged_what_it_used(market: Market) -> None:
    await check_what_is_charged(market)


async def test_the_same_on_an_evm_network() -> None:
    with anvil() as url:
        fund_on_anvil(url, [PAYER.account, OPERATOR.account])
        rpc = HttpRpc(url)
        for account, code in standard_contracts().items():
            await rpc.request("anvil_setCode", [account, "0x" + code.hex()])
        await check_what_is_charged(await open_market(RpcChain(rpc)))
        await rpc.aclose()


async def check_what_is_charged(market: Market) -> None:
    async with market.buyer() as buyer:
        for count in (3, 1):
            response = await buyer.get(f"/words?count={count}")
            assert (response.status_code, len(response.json()["words"])) == (200, count)
            receipt = json.loads(base64.b64decode(response.headers["payment-response"]))
            assert (receipt["success"], receipt["amount"]) == (True, str(count * UNITS_A_WORD))
            found = await market.chain.receipt(receipt["transaction"])
            assert found is not None
            assert (found.ok, found.sender) == (True, OPERATOR.account)
    assert await market.coin.balanceOf(SELLER) == 4 * UNITS_A_WORD
    assert await market.coin.balanceOf(PAYER.account) == 5 * MOST - 4 * UNITS_A_WORD


async def test_an_unpaid_request_is_told_the_most_it_can_cost(market: Market) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(market.app), base_url="http://seller") as client:
        response = await client.get("/words?count=3")
    assert response.status_code == 402
    (offer,) = json.loads(base64.b64decode(response.headers["payment-required"]))["accepts"]
    assert (offer["scheme"], offer["amount"], offer["payTo"]) == ("upto", str(MOST), SELLER)
    assert offer["extra"]["facilitatorAddress"] == OPERATOR.account


async def test_a_buyer_without_allowance_or_coins_gets_nothing(market: Market) -> None:
    await market.coin.approve(PAYER, PERMIT2, 0)
    async with market.buyer() as buyer, market.buyer(key("poor")) as poor:
        for somebody in (buyer, poor):
            assert (await somebody.get("/words?count=3")).status_code == 402
    verdict = await market.facilitator.verify(market.sign(), market.offer())
    assert (verdict.is_valid, verdict.invalid_reason) == (False, "permit2_allowance_required")
    assert await market.coin.balanceOf(SELLER) == 0


async def test_one_signature_is_charged_once(market: Market) -> None:
    payment = market.sign()
    assert (await market.facilitator.verify(payment, market.offer())).is_valid
    charge = market.offer().model_copy(update={"amount": "700"})
    assert (await market.facilitator.settle(payment, charge)).success
    assert not (await market.facilitator.verify(payment, market.offer())).is_valid
    again = await market.facilitator.settle(payment, charge)
    assert (again.success, again.error_reason) == (False, "permit2_invalid_nonce")
    assert await market.coin.balanceOf(SELLER) == 700


async def test_more_than_was_signed_is_never_charged(market: Market) -> None:
    charge = market.offer().model_copy(update={"amount": str(MOST + 1)})
    refused = await market.facilitator.settle(market.sign(), charge)
    assert (refused.success, refused.error_reason) == (False, "invalid_upto_evm_payload_settlement_exceeds_amount")
    assert await market.coin.balanceOf(SELLER) == 0


async def test_another_facilitator_cannot_charge(market: Market) -> None:
    thief = Facilitator(market.chain, key("thief"), CHAIN_ID)
    verdict = await thief.verify(market.sign(), market.offer())
    assert (verdict.is_valid, verdict.invalid_reason) == (False, "upto_facilitator_mismatch")


async def test_what_used_nothing_costs_nothing_and_needs_no_transaction(market: Market) -> None:
    height = await market.chain.block_number()
    settled = await market.facilitator.settle(market.sign(), market.offer().model_copy(update={"amount": "0"}))
    assert (settled.success, settled.transaction, await market.chain.block_number()) == (True, "", height)


async def test_exact_goes_through_permit2_too_for_coins_without_eip_3009(market: Market) -> None:
    extra = {"assetTransferMethod": "permit2", "name": "Test USD", "version": "2"}
    offer = market.offer().model_copy(update={"scheme": "exact", "amount": "900", "extra": extra})
    scheme = ExactEvmClientScheme(EthAccountSigner(EthAccount.from_key(PAYER.secret)))
    payment = PaymentPayload(x402_version=2, payload=scheme.create_payment_payload(offer), accepted=offer)
    assert (await market.facilitator.verify(payment, offer)).is_valid
    assert (await market.facilitator.settle(payment, offer)).success
    assert not (await market.facilitator.settle(payment, offer)).success
    assert await market.coin.balanceOf(SELLER) == 900
