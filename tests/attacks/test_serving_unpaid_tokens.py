"""Every way to get tokens by `upto` and not to pay for them."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import anyio
import pytest

from serving_stack import PRICE, Stack, completion, open_stack, other_account
from tessera.chain.faces import Permit2
from tessera.chain.genesis import PERMIT2
from tessera.core.errors import Late
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine
from tessera.serving.paying.prices import TokenPrice

pytestmark = pytest.mark.anyio
TOKENS = TokenPrice(prompt_units=100_000, completion_units=300_000)
MOST = 3 * 100 + 20 * 300
USED = 3 * 100 + 11 * 300
NONCE_USED = "invalid_exact_evm_nonce_already_used"


@pytest.fixture
async def stack() -> Stack:
    return await open_stack(tokens=TOKENS, max_concurrent=64)


async def refused(stack: Stack, payment: str, body: dict[str, Any] | None = None) -> str:
    """The reason of the 402 that `payment` gets; checks that nothing was served, charged or kept."""
    income, started = await stack.income(), stack.engine.started
    response = await stack.post(body, payment)
    assert response.status_code == 402, response.text
    assert (await stack.income(), stack.engine.started, stack.payments.held) == (income, started, 0)
    return str(response.json()["error"]["code"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"amount": MOST - 1}, "permit2_amount_mismatch"),
    ({"accepted": {"amount": "1"}}, "amount_mismatch"),
    ({"accepted": {"payTo": other_account()}}, "recipient_mismatch"),
    ({"to": other_account()}, "invalid_permit2_recipient_mismatch"),
    ({"facilitator": other_account()}, "upto_facilitator_mismatch"),
    ({"token": other_account()}, "permit2_token_mismatch"),
    ({"deadline": int(time.time()) + 60}, "permit2_deadline_expired"),
    ({"deadline": 1}, "permit2_deadline_expired"),
    ({"chainId": 1}, "invalid_permit2_signature"),
    ({"signer": AccountKey(b"\x21" * 32)}, "invalid_permit2_signature"),
    ({"accepted": {"scheme": "exact", "amount": str(PRICE)}}, "unsupported_scheme"),
]


async def test_a_signature_that_does_not_bind_the_payer_is_refused(stack: Stack) -> None:
    key = await stack.buyer(metered=True)
    for changes, reason in BAD:
        assert await refused(stack, stack.sign_metered(key, **changes)) == reason, changes


async def test_a_payer_without_allowance_or_coins_is_refused_before_any_work(stack: Stack) -> None:
    assert await refused(stack, stack.sign_metered(await stack.buyer())) == "permit2_allowance_required"
    poor = await stack.buyer(MOST - 1, metered=True)
    assert await refused(stack, stack.sign_metered(poor)) == "invalid_exact_evm_insufficient_balance"


async def test_a_replayed_payment_is_refused_also_under_another_spelling_of_its_nonce(stack: Stack) -> None:
    payment = stack.sign_metered(await stack.buyer(metered=True), nonce=77)
    assert (await stack.post(payment=payment)).status_code == 200
    spelled = json.loads(base64.b64decode(payment))
    spelled["payload"]["permit2Authorization"]["nonce"] = "0077"
    for again in (payment, base64.b64encode(json.dumps(spelled).encode()).decode()):
        assert await refused(stack, again) == NONCE_USED
    assert await stack.income() == USED


async def test_a_payment_for_a_short_answer_does_not_buy_a_long_one(stack: Stack) -> None:
    payment = stack.sign_metered(await stack.buyer(metered=True), completion(max_tokens=1))
    assert await refused(stack, payment, completion(max_tokens=400)) == "amount_mismatch"


async def test_one_balance_does_not_back_many_answers_at_once() -> None:
    stack = await open_stack(FakeEngine(delay_s=0.004), tokens=TOKENS, max_concurrent=64)
    key = await stack.buyer(2 * MOST, metered=True)
    statuses: list[int] = []

    async def ask() -> None:
        body = completion(stream=True, max_tokens=20)
        statuses.append((await stack.post(body, stack.sign_metered(key, body))).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(ask)
    assert sorted(statuses) == [200] * 2 + [402] * 4
    assert (await stack.income(), await stack.credit(key)) == (2 * MOST, 0)


async def cheat(stack: Stack, key: AccountKey, takes_back: Any) -> str:
    """A stream whose payer takes back what it signed while it reads. Returns the payment."""
    body = completion(stream=True)
    payment = stack.sign_metered(key, body, nonce=0x305)
    texts: list[str] = []

    async def ask() -> None:
        texts.append((await stack.post(body, payment)).text)

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        while not stack.engine.produced:
            await anyio.sleep(0.001)
        await takes_back()
    assert '"error"' in texts[0]
    assert "[DONE]" not in texts[0]
    return payment


@pytest.mark.parametrize(
    "way", ["coins", pytest.param("allowance", marks=pytest.mark.slow), pytest.param("nonce", marks=pytest.mark.slow)]
)
async def test_who_takes_the_money_back_in_mid_stream_is_refused_until_it_is_made_good(way: str) -> None:
    stack = await open_stack(FakeEngine(delay_s=0.008), tokens=TOKENS, max_concurrent=64)
    key = await stack.buyer(metered=True)

    async def takes_back() -> None:
        if way == "coins":
            await stack.coin.transfer(key, other_account(), 10 * PRICE)
        elif way == "allowance":
            await stack.coin.approve(key, PERMIT2, 0)
        else:
            await Permit2(stack.chain, PERMIT2).invalidateUnorderedNonces(key, 3, 1 << 5)

    payment = await cheat(stack, key, takes_back)
    assert (await stack.income(), await stack.credit(key)) == (0, -MOST)
    await stack.coin.mint(key, key.account, 10 * PRICE)
    await stack.coin.approve(key, PERMIT2, 2**256 - 1)
    assert await refused(stack, stack.sign_metered(key)) == "debt"
    assert await refused(stack, stack.sign(key)) == "debt"
    assert await refused(stack, payment, completion(stream=True)) == NONCE_USED
    offer = stack.payments.offer
    name = f"credit/{offer.network}/{offer.asset.lower()}/{key.account.lower()}"
    assert await stack.balances.add(name, "bought", MOST, "a transaction")
    assert (await stack.post(payment=stack.sign(key))).status_code == 200
    assert await refused(stack, payment, completion(stream=True)) == NONCE_USED


async def test_a_settlement_whose_answer_got_lost_is_no_debt_once_the_chain_shows_it(stack: Stack) -> None:
    key = await stack.buyer(metered=True)
    body = completion(stream=True)
    send = stack.chain.send

    async def lossy(*args: Any, **kwargs: Any) -> Any:
        await send(*args, **kwargs)
        raise Late("the node went away before it answered")

    stack.chain.send = lossy  # type: ignore[method-assign]
    text = (await stack.post(body, stack.sign_metered(key, body))).text
    assert '"error"' in text
    assert (await stack.income(), await stack.credit(key)) == (USED, -USED)
    stack.chain.send = send  # type: ignore[method-assign]
    assert (await stack.post(body, stack.sign_metered(key, body))).status_code == 200
    assert (await stack.income(), await stack.credit(key)) == (2 * USED, 0)


async def test_a_whole_answer_whose_settlement_got_lost_is_served_again_for_the_same_payment(stack: Stack) -> None:
    key = await stack.buyer(metered=True)
    payment = stack.sign_metered(key)
    send = stack.chain.send

    async def lossy(*args: Any, **kwargs: Any) -> Any:
        await send(*args, **kwargs)
        raise Late("the node went away before it answered")

    stack.chain.send = lossy  # type: ignore[method-assign]
    assert (await stack.post(payment=payment)).status_code == 504
    stack.chain.send = send  # type: ignore[method-assign]
    assert await refused(stack, payment, completion(prompt="xyz")) == NONCE_USED
    assert (await stack.post(payment=payment)).status_code == 200
    assert await refused(stack, payment) == NONCE_USED
    assert (await stack.income(), await stack.credit(key)) == (USED, 0)


async def test_money_taken_away_before_a_whole_answer_left_is_no_debt_and_no_answer() -> None:
    stack = await open_stack(FakeEngine(delay_s=0.008), tokens=TOKENS)
    key = await stack.buyer(MOST, metered=True)
    responses = []

    async def ask() -> None:
        responses.append(await stack.post(payment=stack.sign_metered(key)))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        while not stack.engine.produced:
            await anyio.sleep(0.001)
        await stack.coin.transfer(key, other_account(), MOST)
    assert responses[0].status_code == 402
    assert "choices" not in responses[0].json()
    assert (await stack.income(), await stack.credit(key)) == (0, 0)
