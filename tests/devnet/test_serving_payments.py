"""The official openai and x402 clients buy from the gateway, with coins on an embedded chain."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest
from eth_account import Account as EthAccount
from openai import APIStatusError, AsyncOpenAI

from serving_stack import MODEL, PAYEE, PRICE, Stack, completion, open_stack, other_account
from tessera.core.errors import Invalid, PaymentRequired, Refused, Unavailable
from tessera.core.signing import AccountKey
from tessera.serving.buyer import Buyer
from tessera.serving.paying.payments import PaymentConfig, X402Payments

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stack() -> Stack:
    return await open_stack(api_keys=("operator",))


def official_transport(stack: Stack, key: AccountKey) -> httpx.AsyncBaseTransport:
    """x402's own client, set up as its documentation says."""
    from x402 import x402Client
    from x402.http.clients.httpx import x402AsyncTransport
    from x402.mechanisms.evm.exact import register_exact_evm_client
    from x402.mechanisms.evm.signers import EthAccountSigner

    client = x402Client()
    register_exact_evm_client(client, EthAccountSigner(EthAccount.from_key(key.secret)))
    cap = {"network": stack.payments.offer.network, "asset": stack.coin.address, "max_amount_per_payment": str(PRICE)}
    client.set_spend_controls({"allowed_assets": [cap]})  # type: ignore[list-item]
    return x402AsyncTransport(client, httpx.ASGITransport(stack.app))


async def test_the_official_x402_client_pays_and_is_served(stack: Stack) -> None:
    key = await stack.buyer()
    async with httpx.AsyncClient(transport=official_transport(stack, key), base_url="http://gateway") as client:
        response = await client.post("/v1/completions", json=completion())
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "hello world"
    receipt = json.loads(base64.b64decode(response.headers["payment-response"]))
    assert receipt["success"] is True
    assert receipt["payer"].lower() == key.account.lower()
    found = await stack.chain.receipt(receipt["transaction"])
    assert found is not None
    assert found.ok
    assert await stack.income() == PRICE
    assert await stack.coin.balanceOf(key.account) == 9 * PRICE
    assert [(s.transaction, s.payer, s.units) for s in stack.settled] == [(receipt["transaction"], key.account, PRICE)]


async def test_the_official_openai_client_pays_whole_and_streamed(stack: Stack) -> None:
    key = await stack.buyer()
    http = httpx.AsyncClient(transport=official_transport(stack, key))
    client = AsyncOpenAI(api_key="unused", base_url="http://gateway/v1", http_client=http, max_retries=0)
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = await client.chat.completions.create(model=MODEL, messages=messages)
    assert whole.choices[0].message.content == "hello world"
    stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "hello world"
    text = await client.completions.create(model=MODEL, prompt="abc", max_tokens=5)
    assert (text.choices[0].text, text.usage.completion_tokens if text.usage else 0) == ("hello", 5)
    assert await stack.income() == 3 * PRICE
    assert [model.id async for model in client.models.list()] == [MODEL]
    with pytest.raises(APIStatusError) as caught:
        await client.completions.create(model=MODEL, prompt="abc", max_tokens=100_000)
    assert (caught.value.status_code, caught.value.code) == (400, "context_length_exceeded")
    assert await stack.income() == 3 * PRICE
    await client.close()


async def test_an_unpaid_request_is_told_what_to_pay(stack: Stack) -> None:
    response = await stack.post()
    assert response.status_code == 402
    offer = json.loads(base64.b64decode(response.headers["payment-required"]))
    assert offer["accepts"] == [stack.payments.offer.requirements()]
    assert offer["accepts"] == response.json()["accepts"]
    assert (offer["accepts"][0]["payTo"], offer["accepts"][0]["amount"]) == (PAYEE, str(PRICE))
    assert offer["resource"]["url"] == "http://gateway/v1/completions"
    assert response.json()["error"]["code"] == "payment_required"
    assert stack.engine.started == 0


async def test_a_buyer_buys_and_keeps_its_budget(stack: Stack) -> None:
    key = await stack.buyer()
    async with Buyer(
        "http://gateway", key, chain_id=stack.chain_id, asset=stack.coin.address, pay_to=PAYEE,
        max_units_each=PRICE, max_units=2 * PRICE, transport=httpx.ASGITransport(stack.app),
    ) as buyer:  # fmt: skip
        answers = await buyer.buy(2, "abc", model=MODEL)
        assert [answer["choices"][0]["text"] for answer in answers] == ["hello world"] * 2
        assert (buyer.paid_requests, buyer.signed_units) == (2, 2 * PRICE)
        with pytest.raises(Refused) as caught:
            await buyer.complete("abc", model=MODEL)
        assert caught.value.rule == "budget"
    assert await stack.income() == 2 * PRICE


@pytest.mark.parametrize(("change", "rule"), [({"max_units_each": PRICE - 1}, "price"),
                                              ({"asset": other_account()}, "spend_controls"),
                                              ({"pay_to": other_account()}, "pay_to")])  # fmt: skip
async def test_a_buyer_refuses_what_its_limits_do_not_cover(stack: Stack, change: dict[str, Any], rule: str) -> None:
    key = await stack.buyer()
    limits: dict[str, Any] = {"asset": stack.coin.address, "max_units_each": PRICE, "max_units": 10 * PRICE} | change
    transport = httpx.ASGITransport(stack.app)
    async with Buyer("http://gateway", key, chain_id=stack.chain_id, transport=transport, **limits) as buyer:
        with pytest.raises(Refused) as caught:
            await buyer.complete("abc", model=MODEL)
    assert (caught.value.rule, buyer.signed_units) == (rule, 0)
    assert await stack.income() == 0


async def test_a_buyer_streams_a_chat_and_an_operator_key_pays_nothing(stack: Stack) -> None:
    key = await stack.buyer()
    limits: dict[str, Any] = {"asset": stack.coin.address, "max_units_each": PRICE, "max_units": 10 * PRICE}
    for api_key, income in ((None, PRICE), ("operator", PRICE)):
        transport = httpx.ASGITransport(stack.app)
        async with Buyer(
            "http://gateway", key, chain_id=stack.chain_id, transport=transport, api_key=api_key, **limits
        ) as buyer:
            pieces = [piece async for piece in buyer.stream_chat([{"role": "user", "content": "hi"}], model=MODEL)]
        assert ("".join(pieces), len(pieces)) == ("hello world", 11)
        assert await stack.income() == income


async def test_a_broken_stream_is_unavailable_to_its_buyer(stack: Stack) -> None:
    stack.engine.fail_after, stack.engine.error = 3, Unavailable("stage 1 is gone")
    limits: dict[str, Any] = {"asset": stack.coin.address, "max_units_each": PRICE, "max_units": 10 * PRICE}
    transport = httpx.ASGITransport(stack.app)
    seen: list[str] = []

    async def listen(buyer: Buyer) -> None:
        async for piece in buyer.stream_chat([{"role": "user", "content": "hi"}], model=MODEL):
            seen.append(piece)

    async with Buyer(
        "http://gateway", await stack.buyer(), chain_id=stack.chain_id, transport=transport, **limits
    ) as buyer:
        with pytest.raises(Unavailable, match="stage 1 is gone"):
            await listen(buyer)
    assert "".join(seen) == "hel"


async def test_a_poor_buyer_learns_why(stack: Stack) -> None:
    key = await stack.buyer(PRICE - 1)
    async with Buyer(
        "http://gateway", key, chain_id=stack.chain_id, asset=stack.coin.address,
        max_units_each=PRICE, max_units=PRICE, transport=httpx.ASGITransport(stack.app),
    ) as buyer:  # fmt: skip
        with pytest.raises(PaymentRequired, match="balance is too small"):
            await buyer.complete("abc", model=MODEL)


async def test_an_asset_that_is_no_contract_is_refused_at_the_start(stack: Stack) -> None:
    config = PaymentConfig(other_account(), "Test USD", "2", PRICE, PAYEE)
    with pytest.raises(Invalid, match="no contract"):
        await X402Payments.open(config, stack.chain, AccountKey.generate())
