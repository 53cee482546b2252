"""One payment is shown many times at once, and its settlement is raced: one transfer, one resource."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from agents_world import close_ledgers, make_intent, make_mandate, open_ledger, units  # noqa: F401
from serving_stack import CHAIN_ID, PAYEE, PRICE, Stack, completion, open_stack
from tessera.agents.intents import Coin, authorize
from tessera.agents.mandates import asset_id
from tessera.agents.paying import _header
from tessera.core.amount import Amount
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine

pytestmark = pytest.mark.anyio


async def open_gateway() -> tuple[Stack, AccountKey, str]:
    """A gateway, a buyer, and the buyer's payment, made by our own payer."""
    stack = await open_stack(FakeEngine(delay_s=0.002), max_concurrent=64)
    buyer = await stack.buyer()
    asset = asset_id(CHAIN_ID, stack.coin.address)
    mandate = make_mandate(asset=asset, agent=buyer.account, per_payment=PRICE, per_period=PRICE, payees=(PAYEE,))
    intent = make_intent(mandate, amount=PRICE, payee=PAYEE)
    coin = Coin(asset, "Test USD", "2")
    payment = _header(authorize(intent, coin, buyer, 2**40), intent, coin)
    assert intent.amount == Amount(PRICE, asset) != units(PRICE)
    return stack, buyer, payment


async def test_the_gateway_serves_one_of_many_that_show_the_same_payment() -> None:
    stack, buyer, payment = await open_gateway()
    answers: list[int] = []

    async def show(body: dict[str, Any]) -> None:
        answers.append((await stack.post(body, payment)).status_code)

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(show, completion(max_tokens=5, prompt=f"question {number % 2}"))
    assert sorted(answers) == [200] + [402] * 9
    assert (await stack.income(), stack.engine.started) == (PRICE, 1)
    assert await stack.coin.balanceOf(buyer.account) == 9 * PRICE


async def test_a_settlement_of_somebody_who_runs_ahead_is_the_same_settlement() -> None:
    """Whoever sees the authorization may send it; the gateway's own settlement then fails, and money moved once."""
    stack, buyer, payment = await open_gateway()
    import base64
    import json

    payload = json.loads(base64.b64decode(payment))["payload"]
    terms, signature = payload["authorization"], bytes.fromhex(payload["signature"][2:])
    await stack.coin.transferWithAuthorization(
        AccountKey.generate(), buyer.account, PAYEE, PRICE, 0, int(terms["validBefore"]),
        bytes.fromhex(terms["nonce"][2:]), signature[64], signature[:32], signature[32:64],
    )  # fmt: skip
    response = await stack.post(completion(max_tokens=5), payment)
    assert response.status_code == 402
    assert (await stack.income(), stack.engine.started) == (PRICE, 0)
