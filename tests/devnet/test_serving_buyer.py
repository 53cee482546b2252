"""Our own buyer: by `upto` where it is offered, and with credit that it buys; within its budget."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serving_stack import MODEL, PAYEE, PRICE, Stack, open_stack
from tessera.core.errors import Refused
from tessera.core.signing import AccountKey
from tessera.serving.asking import ServedName
from tessera.serving.buyer import Buyer
from tessera.serving.paying.prices import TokenPrice

pytestmark = pytest.mark.anyio
TOKENS = TokenPrice(prompt_units=100_000, completion_units=300_000)
MOST = 3 * 100 + 20 * 300
USED = 3 * 100 + 11 * 300


@pytest.fixture
async def stack() -> Stack:
    return await open_stack(tokens=TOKENS)


def buyer_of(stack: Stack, key: AccountKey, **limits: Any) -> Buyer:
    limits = {"max_units_each": PRICE, "max_units": 10 * PRICE} | limits
    transport = httpx.ASGITransport(stack.app)
    return Buyer(
        "http://gateway", key, chain_id=stack.chain_id, asset=stack.coin.address, pay_to=PAYEE, transport=transport,
        **limits,
    )  # fmt: skip


async def test_a_metered_buyer_pays_by_the_token_and_learns_the_price(stack: Stack) -> None:
    async with buyer_of(stack, await stack.buyer(metered=True), metered=True) as buyer:
        assert await buyer.models() == [ServedName(MODEL, 512)]
        await buyer.complete("abc", model=MODEL, max_tokens=20)
        assert buyer.paid is not None
        assert (buyer.paid.units, buyer.paid.unit) == (USED, f"eip155:{stack.chain_id}/{stack.coin.address}")
        asked = [{"role": "user", "content": "abc"}]
        text = "".join([piece async for piece in buyer.stream_chat(asked, model=MODEL, max_tokens=20)])
        assert (text, buyer.paid.units) == ("hello world", USED)
        assert buyer.paid.transaction.startswith("0x")
        assert (buyer.paid_requests, buyer.signed_units) == (2, 2 * MOST)
    assert await stack.income() == 2 * USED


async def test_a_metered_buyer_pays_exactly_where_nothing_else_is_offered() -> None:
    stack = await open_stack()
    async with buyer_of(stack, await stack.buyer(metered=True), metered=True) as buyer:
        await buyer.complete("abc", model=MODEL)
        assert buyer.paid is not None
        assert buyer.paid.units == PRICE
    assert await stack.income() == PRICE


async def test_the_budget_counts_the_most_that_was_signed(stack: Stack) -> None:
    key = await stack.buyer(metered=True)
    async with buyer_of(stack, key, metered=True, max_units_each=MOST, max_units=2 * MOST - 1) as buyer:
        await buyer.complete("abc", model=MODEL, max_tokens=20)
        with pytest.raises(Refused) as caught:
            await buyer.complete("abc", model=MODEL, max_tokens=20)
    assert caught.value.rule == "budget"


async def test_bought_credit_pays_for_what_is_asked_from_then_on(stack: Stack) -> None:
    key = await stack.buyer(4 * PRICE)
    async with buyer_of(stack, key, max_units_each=1, max_units=3 * PRICE) as buyer:
        with pytest.raises(Refused):
            await buyer.complete("abc", model=MODEL)
        assert await buyer.buy_credit(2 * PRICE) == 2 * PRICE
        await buyer.complete("abc", model=MODEL, max_tokens=20)
        assert buyer.paid is not None
        assert (buyer.paid.units, buyer.paid.left, buyer.paid.transaction) == (USED, 2 * PRICE - USED, "")
        assert await buyer.buy_credit(PRICE) == 3 * PRICE - USED
        with pytest.raises(Refused):  # beyond the budget
            await buyer.buy_credit(PRICE)
        with pytest.raises(Refused) as caught:  # the credit does not cover it, and the limit for a request neither
            await buyer.complete("abc", model=MODEL, max_tokens=390)
        assert caught.value.rule == "price"
    assert await stack.income() == 3 * PRICE
