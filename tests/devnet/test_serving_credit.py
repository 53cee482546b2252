"""Prepaid credit: bought by one x402 payment, spent by the token with a key, told, and paid back."""

from __future__ import annotations

import pytest

from serving_stack import PRICE, Stack, completion, open_stack
from tessera.core.errors import Invalid, Late, PaymentRequired
from tessera.core.signing import AccountKey
from tessera.serving.paying.credit import refund
from tessera.serving.paying.prices import TokenPrice

pytestmark = pytest.mark.anyio
TOKENS = TokenPrice(prompt_units=100_000, completion_units=300_000)
MOST = 3 * 100 + 20 * 300
USED = 3 * 100 + 11 * 300
UNITS = 2 * MOST


@pytest.fixture
async def stack() -> Stack:
    return await open_stack(tokens=TOKENS)


async def test_one_payment_buys_a_key_that_spends_what_the_tokens_cost(stack: Stack) -> None:
    key = await stack.buyer()
    bought = await stack.buy_credit(key, UNITS)
    assert bought.status_code == 200, bought.text
    assert (bought.json()["account"], bought.json()["units"]) == (key.account, str(UNITS))
    assert "payment-response" in bought.headers
    assert await stack.income() == UNITS
    api_key = bought.json()["api_key"]
    whole = await stack.post(api_key=api_key)
    assert whole.json()["choices"][0]["text"] == "hello world"
    assert (whole.headers["tessera-cost"], whole.headers["tessera-left"]) == (str(USED), str(UNITS - USED))
    streamed = await stack.post(completion(stream=True), api_key=api_key)
    assert f'"tessera-left":"{UNITS - 2 * USED}"' in streamed.text
    assert await stack.credit(key) == UNITS - 2 * USED
    assert await stack.income() == UNITS
    refused = await stack.post(api_key=api_key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "insufficient_credit")
    assert "payment-required" in refused.headers
    alone = await stack.post(payment=stack.sign(key), api_key=api_key)
    assert (alone.status_code, alone.headers["tessera-cost"]) == (200, str(PRICE))
    async with stack.client() as client:
        told = (await client.get("/v1/credit", headers={"Authorization": f"Bearer {api_key}"})).json()
        assert (await client.get("/v1/credit")).status_code == 401
    assert (told["account"], told["units"], told["held"]) == (key.account, str(UNITS - 2 * USED), "0")
    assert [entry["kind"] for entry in told["entries"]] == ["returned", "held", "returned", "held", "bought"]


async def test_a_failed_answer_costs_nothing(stack: Stack) -> None:
    key = await stack.buyer()
    api_key = (await stack.buy_credit(key, UNITS)).json()["api_key"]
    stack.engine.fail_after = 4
    for stream in (False, True):
        assert '"error"' in (await stack.post(completion(stream=stream), api_key=api_key)).text
    assert await stack.credit(key) == UNITS


async def test_more_credit_with_the_same_key_makes_no_new_key(stack: Stack) -> None:
    key, friend = await stack.buyer(), await stack.buyer()
    api_key = (await stack.buy_credit(key, UNITS)).json()["api_key"]
    more = await stack.buy_credit(key, UNITS, api_key=api_key)
    assert (more.json()["units"], "api_key" in more.json()) == (str(2 * UNITS), False)
    theirs = (await stack.buy_credit(friend, UNITS, api_key=api_key)).json()
    assert (theirs["account"], theirs["units"], "api_key" in theirs) == (friend.account, str(UNITS), True)


async def test_credit_pays_a_debt_first(stack: Stack) -> None:
    key = await stack.buyer()
    offer = stack.payments.offer
    name = f"credit/{offer.network}/{offer.asset.lower()}/{key.account.lower()}"
    await stack.balances.add(name, "debt", -MOST, "permit2:1")
    assert (await stack.buy_credit(key, UNITS)).json()["units"] == str(UNITS - MOST)


NOT_SOLD: list[dict[str, object]] = [
    {"units": "999"},
    {"units": "1000000001"},
    {"units": "-5"},
    {"units": "1e6"},
    {"units": 10_000},
    {"units": "0010000"},
    {"more": 1},
    {"retry_secret": "short"},
    {"units": "9" * 30},
]


async def test_amounts_that_are_not_sold_are_refused_before_any_payment(stack: Stack) -> None:
    key = await stack.buyer()
    for body in NOT_SOLD:
        payment = stack.sign(key, accepted={"amount": str(UNITS)}, authorization={"value": str(UNITS)})
        answer = await stack.post({"units": str(UNITS)} | body, payment, path="/v1/credit")
        assert answer.status_code == 400, body
    assert await stack.income() == 0


async def test_a_lost_answer_is_asked_for_again_with_the_secret_and_credited_once(stack: Stack) -> None:
    key = await stack.buyer()
    terms = {"accepted": {"amount": str(UNITS)}, "authorization": {"value": str(UNITS)}}
    payment = stack.sign(key, **terms)
    first = await stack.buy_credit(key, UNITS, payment=payment, retry_secret="s" * 16)
    again = await stack.buy_credit(key, UNITS, payment=payment, retry_secret="s" * 16)
    assert (first.status_code, again.status_code, again.json()["units"]) == (200, 200, str(UNITS))
    assert (await stack.post(api_key=again.json()["api_key"])).status_code == 200
    assert await stack.income() == UNITS


async def test_a_settlement_without_an_answer_is_credited_when_the_same_payment_comes_again(stack: Stack) -> None:
    key = await stack.buyer()
    payment = stack.sign(key, accepted={"amount": str(UNITS)}, authorization={"value": str(UNITS)})
    send = stack.chain.send

    async def lossy(*args: object, **kwargs: object) -> object:
        await send(*args, **kwargs)  # type: ignore[arg-type]
        raise Late("the node went away before it answered")

    stack.chain.send = lossy  # type: ignore[method-assign, assignment]
    assert (await stack.buy_credit(key, UNITS, payment=payment, retry_secret="s" * 16)).status_code == 504
    stack.chain.send = send  # type: ignore[method-assign]
    assert (await stack.buy_credit(key, UNITS, payment=payment, retry_secret="s" * 16)).json()["units"] == str(UNITS)
    assert (await stack.income(), await stack.credit(key)) == (UNITS, UNITS)


async def test_the_operator_pays_credit_back_out_of_its_own_pocket(stack: Stack) -> None:
    assert stack.till is not None
    key, operator = await stack.buyer(), AccountKey(b"\x07" * 32)
    await stack.buy_credit(key, UNITS)
    name = stack.till.credit.name(key.account)
    pay_back = (stack.balances, stack.chain, operator, stack.coin.address, name, key.account)
    with pytest.raises(PaymentRequired):
        await refund(*pay_back, 5_000)  # it has no coins
    assert await stack.credit(key) == UNITS
    await stack.coin.mint(operator, operator.account, UNITS)
    for units in (0, -1, UNITS + 1):
        with pytest.raises(Invalid):
            await refund(*pay_back, units)
    before = await stack.coin.balanceOf(key.account)
    assert (await refund(*pay_back, 5_000)).startswith("0x")
    assert await stack.coin.balanceOf(key.account) - before == 5_000
    assert await stack.credit(key) == UNITS - 5_000
