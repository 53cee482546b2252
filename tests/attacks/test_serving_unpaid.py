"""Every way to be served without paying, or to make a buyer pay twice."""

from __future__ import annotations

import base64
import time
from typing import Any

import anyio
import pytest

from serving_stack import PRICE, Stack, completion, open_stack, other_account
from tessera.core.errors import Late, Unavailable
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine
from tessera.serving.paying.prices import TokenPrice

pytestmark = pytest.mark.anyio
USED = "invalid_exact_evm_nonce_already_used"


@pytest.fixture
async def stack() -> Stack:
    return await open_stack(max_concurrent=64)


async def refused(stack: Stack, payment: str, body: dict[str, Any] | None = None) -> str:
    """The reason of the 402 that `payment` gets; checks that nothing was served, charged or kept."""
    income, started = await stack.income(), stack.engine.started
    response = await stack.post(body, payment)
    assert response.status_code == 402, response.text
    assert "payment-required" in response.headers
    assert "choices" not in response.json()
    assert (await stack.income(), stack.engine.started, stack.payments.held) == (income, started, 0)
    return str(response.json()["error"]["code"])


async def test_a_replayed_payment_is_refused(stack: Stack) -> None:
    payment = stack.sign(await stack.buyer())
    assert (await stack.post(payment=payment)).status_code == 200
    assert await refused(stack, payment) == USED
    assert await refused(stack, payment, completion(prompt="other")) == USED
    assert await stack.income() == PRICE


async def test_many_replays_at_once_pay_once_and_are_served_once() -> None:
    stack = await open_stack(FakeEngine(delay_s=0.002), max_concurrent=64)
    payment = stack.sign(await stack.buyer())
    answers: list[tuple[int, str | None]] = []

    async def replay() -> None:
        response = await stack.post(completion(max_tokens=5), payment)
        answers.append((response.status_code, response.json().get("error", {}).get("code")))

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(replay)
    assert sorted(answers, key=str) == [(200, None)] + [(402, USED)] * 11
    assert (await stack.income(), stack.engine.started, stack.payments.held) == (PRICE, 1, 0)


async def test_spending_the_same_balance_many_times_at_once_buys_once() -> None:
    stack = await open_stack(FakeEngine(delay_s=0.002), max_concurrent=64)
    key = await stack.buyer(PRICE)
    statuses: list[int] = []

    async def spend() -> None:
        statuses.append((await stack.post(completion(max_tokens=5), stack.sign(key))).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(spend)
    assert sorted(statuses) == [200] + [402] * 5
    assert await stack.income() == PRICE


async def test_money_taken_away_during_the_work_means_no_answer() -> None:
    stack = await open_stack(FakeEngine(delay_s=0.02))
    key = await stack.buyer(PRICE)
    payment = stack.sign(key)
    responses = []

    async def ask() -> None:
        responses.append(await stack.post(completion(max_tokens=10), payment))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        while not stack.engine.open:
            await anyio.sleep(0.001)
        await stack.coin.transfer(key, other_account(), PRICE)
    assert responses[0].status_code == 402
    assert responses[0].json()["error"]["code"] == "invalid_exact_evm_insufficient_balance"
    assert "payment-response" in responses[0].headers
    assert await stack.income() == 0


@pytest.mark.parametrize(
    ("accepted", "reason"),
    [
        ({"amount": str(PRICE - 1)}, "amount_mismatch"),
        ({"amount": str(PRICE + 1)}, "amount_mismatch"),
        ({"amount": PRICE}, "amount_mismatch"),
        ({"payTo": None}, "recipient_mismatch"),
        ({"payTo": other_account()}, "recipient_mismatch"),
        ({"asset": other_account()}, "asset_mismatch"),
        ({"network": "eip155:1"}, "network_mismatch"),
        ({"scheme": "upto"}, "unsupported_scheme"),
    ],
)
async def test_terms_that_are_not_the_offer_are_refused(stack: Stack, accepted: dict[str, Any], reason: str) -> None:
    assert await refused(stack, stack.sign(await stack.buyer(), accepted=accepted)) == reason


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        ({"value": "1"}, "value_mismatch"),
        ({"value": str(PRICE + 1)}, "value_mismatch"),
        ({"to": other_account()}, "recipient_mismatch"),
        ({"validBefore": str(int(time.time()) - 5)}, "valid_before"),
        ({"validAfter": str(int(time.time()) + 500)}, "valid_after"),
        ({"from": other_account()}, "signature"),
    ],
)
async def test_a_signed_authorization_that_does_not_pay_the_offer_is_refused(
    stack: Stack, authorization: dict[str, Any], reason: str
) -> None:
    assert reason in await refused(stack, stack.sign(await stack.buyer(), authorization=authorization))


@pytest.mark.parametrize("domain", [{"chainId": 1}, {"verifyingContract": other_account()}, {"version": "1"}])
async def test_a_signature_for_another_domain_is_refused(stack: Stack, domain: dict[str, Any]) -> None:
    assert "signature" in await refused(stack, stack.sign(await stack.buyer(), domain=domain))


async def test_somebody_elses_signature_is_refused(stack: Stack) -> None:
    payment = stack.sign(await stack.buyer(), signer=AccountKey.generate())
    assert "signature" in await refused(stack, payment)


async def test_a_payer_without_money_is_refused_before_any_work(stack: Stack) -> None:
    payment = stack.sign(await stack.buyer(0))
    assert await refused(stack, payment) == "invalid_exact_evm_insufficient_balance"


@pytest.mark.parametrize(
    "payment",
    ["", "%%%", base64.b64encode(b"{").decode(), base64.b64encode(b"[]").decode(), "A" * 20_000,
     base64.b64encode(b'{"x402Version":1}').decode(), base64.b64encode(b'{"x402Version":2,"accepted":{}}').decode(),
     base64.b64encode(b'{"x402Version":2,"accepted":{},"payload":{"permit2Authorization":{}}}').decode(),
     base64.b64encode(b"[" * 9_000).decode()],
)  # fmt: skip
async def test_garbage_for_a_payment_is_a_402_with_a_reason(stack: Stack, payment: str) -> None:
    assert (await refused(stack, payment)).startswith("invalid_payload")


async def test_an_owed_stream_is_served_again_without_paying_again_and_only_once() -> None:
    engine = FakeEngine(lambda prompt, sampling: list(b"hello"), fail_after=2, error=Unavailable("stage 1 is gone"))
    stack = await open_stack(engine)
    payment = stack.sign(await stack.buyer())
    asked = completion(stream=True)
    broken = await stack.post(asked, payment)
    assert "stage 1 is gone" in broken.text
    assert await stack.income() == PRICE
    engine.fail_after = None
    assert (await stack.post(completion(stream=True, prompt="zzz"), payment)).status_code == 402
    again = await stack.post(asked, payment)
    assert again.text.endswith("data: [DONE]\n\n")
    assert (await stack.post(asked, payment)).status_code == 402
    assert await stack.income() == PRICE


async def test_a_chain_that_cannot_be_reached_is_503_and_costs_nothing(stack: Stack) -> None:
    payment = stack.sign(await stack.buyer())
    rpc = stack.chain.rpc

    class Down:
        async def request(self, method: str, params: list[Any]) -> Any:
            raise Unavailable("the node is gone")

    stack.chain.rpc = Down()
    assert (await stack.post(payment=payment)).status_code == 503
    assert stack.payments.held == 0
    stack.chain.rpc = rpc
    assert (await stack.post(payment=payment)).status_code == 200


async def test_a_settlement_without_an_answer_is_honoured_when_it_arrived(stack: Stack) -> None:
    payment = stack.sign(await stack.buyer())
    send = stack.chain.send

    async def lossy(*args: Any, **kwargs: Any) -> Any:
        await send(*args, **kwargs)
        raise Late("the node went away before it answered")

    stack.chain.send = lossy  # type: ignore[method-assign]
    assert (await stack.post(payment=payment)).status_code == 504
    assert await stack.income() == PRICE
    stack.chain.send = send  # type: ignore[method-assign]
    assert await refused(stack, payment, completion(prompt="another")) == USED
    assert (await stack.post(payment=payment)).status_code == 200
    assert await refused(stack, payment) == USED
    assert await stack.income() == PRICE


async def test_a_settlement_in_no_block_yet_is_picked_up_later(stack: Stack) -> None:
    payment = stack.sign(await stack.buyer())
    send, receipt = stack.chain.send, stack.chain.receipt

    async def unknown(tx_hash: str) -> Any:
        return None

    async def late(*args: Any, **kwargs: Any) -> Any:
        done = await send(*args, **kwargs)
        stack.chain.receipt = unknown  # type: ignore[method-assign]
        raise Late("in no block yet", tx_hash=done.tx_hash)

    stack.chain.send = late  # type: ignore[method-assign]
    first = await stack.post(payment=payment)
    assert first.status_code in (402, 504)
    stack.chain.send, stack.chain.receipt = send, receipt  # type: ignore[method-assign]
    assert (await stack.post(payment=payment)).status_code == 200
    assert await stack.income() == PRICE


async def test_cancelling_while_a_settlement_is_in_doubt_does_not_buy_an_answer(stack: Stack) -> None:
    key = await stack.buyer()
    payment = stack.sign(key)
    send = stack.chain.send

    async def lost(*args: Any, **kwargs: Any) -> Any:
        raise Late("the node went away before it took the transaction")

    stack.chain.send = lost  # type: ignore[method-assign]
    assert (await stack.post(payment=payment)).status_code == 504
    stack.chain.send = send  # type: ignore[method-assign]
    await stack.cancel(key, payment)
    assert await refused(stack, payment) == USED
    assert await stack.income() == 0


async def test_one_payer_cannot_fill_every_place() -> None:
    stack = await open_stack(FakeEngine(delay_s=5.0), max_concurrent=64)
    stack.payments._ledger._max_held_per_payer = 2
    key = await stack.buyer()
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await stack.post(payment=stack.sign(key))).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(ask)
        while not statuses:
            await anyio.sleep(0.005)
        group.cancel_scope.cancel()
    assert statuses == [503]
    assert (await stack.income(), stack.engine.open, stack.payments.held) == (0, 0, 0)


async def test_the_price_of_one_request_does_not_buy_many_contexts_of_choices() -> None:
    engine = FakeEngine(context=512)
    stack = await open_stack(engine, tokens=TokenPrice.of_context(PRICE, 512), max_concurrent=16)
    buyer = await stack.buyer()
    whole = {"prompt": "x" * 12, "max_tokens": 500}
    flat = await stack.post(completion(**whole, n=4), stack.sign(buyer))
    assert (flat.status_code, engine.started) == (402, 0)
    most = str(-(-(12 + 4 * 500) * PRICE // 512))
    asked = [offer["amount"] for offer in flat.json()["accepts"]]
    assert asked == [most, most]
    paid = stack.sign(buyer, accepted={"amount": most}, authorization={"value": most})
    assert (await stack.post(completion(**whole, n=4), paid)).status_code == 200
    assert await stack.income() == int(most)
    assert (await stack.post(completion(**whole), stack.sign(buyer))).status_code == 200
    assert await stack.income() == int(most) + PRICE
