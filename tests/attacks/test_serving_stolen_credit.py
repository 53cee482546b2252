"""Every way to spend somebody else's credit, or one's own twice."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from serving_stack import Stack, completion, open_stack, other_account
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine
from tessera.serving.paying.prices import TokenPrice

pytestmark = pytest.mark.anyio
TOKENS = TokenPrice(prompt_units=100_000, completion_units=300_000)
MOST = 3 * 100 + 20 * 300
UNITS = 2 * MOST
USED = "invalid_exact_evm_nonce_already_used"


@pytest.fixture
async def stack() -> Stack:
    return await open_stack(tokens=TOKENS, max_concurrent=64)


def paying(stack: Stack, key: AccountKey, units: int = UNITS) -> str:
    return stack.sign(key, accepted={"amount": str(units)}, authorization={"value": str(units)})


async def test_who_saw_the_payment_on_the_chain_gets_no_key(stack: Stack) -> None:
    key = await stack.buyer()
    for asked in ({}, {"retry_secret": "s" * 16}):
        payment = paying(stack, key)
        assert (await stack.buy_credit(key, UNITS, payment=payment, **asked)).status_code == 200
        for guess in ({}, {"retry_secret": "t" * 16}):
            stolen = await stack.buy_credit(key, UNITS, payment=payment, **guess)
            assert (stolen.status_code, stolen.json()["error"]["code"]) == (402, USED)
            assert "api_key" not in stolen.text
    assert (await stack.income(), await stack.credit(key)) == (2 * UNITS, 2 * UNITS)


async def test_a_payment_for_credit_buys_no_answer_beside_it_and_the_other_way_round(stack: Stack) -> None:
    key = await stack.buyer()
    payment = paying(stack, key)
    assert (await stack.post(payment=payment)).json()["error"]["code"] == "amount_mismatch"
    exact = stack.sign(key)
    assert (await stack.buy_credit(key, UNITS, payment=exact)).json()["error"]["code"] == "amount_mismatch"
    assert (await stack.post(payment=exact)).status_code == 200
    again = await stack.buy_credit(key, 40_000, payment=exact)
    assert again.json()["error"]["code"] == USED
    assert await stack.credit(key) == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"authorization": {"value": str(UNITS - 1)}}, "value_mismatch"),
    ({"accepted": {"amount": str(UNITS - 1)}}, "amount_mismatch"),
    ({"authorization": {"to": other_account(), "value": str(UNITS)}}, "recipient_mismatch"),
    ({"accepted": {"asset": other_account(), "amount": str(UNITS)}}, "asset_mismatch"),
    ({"authorization": {"validBefore": "5", "value": str(UNITS)}}, "valid_before"),
    ({"signer": AccountKey(b"\x21" * 32), "authorization": {"value": str(UNITS)}}, "signature"),
]


async def test_credit_is_not_given_for_a_payment_that_does_not_pay(stack: Stack) -> None:
    key = await stack.buyer()
    for changes, reason in BAD:
        payment = stack.sign(key, **({"accepted": {"amount": str(UNITS)}} | changes))
        refused = await stack.buy_credit(key, UNITS, payment=payment)
        assert refused.status_code == 402, changes
        assert reason in refused.json()["error"]["code"]
    assert (await stack.income(), await stack.credit(key)) == (0, 0)


async def test_replaying_a_purchase_many_times_at_once_credits_once(stack: Stack) -> None:
    key = await stack.buyer()
    payment = paying(stack, key)
    statuses: list[int] = []

    async def buy() -> None:
        statuses.append((await stack.buy_credit(key, UNITS, payment=payment, retry_secret="s" * 16)).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(buy)
    assert 200 in statuses
    assert set(statuses) <= {200, 402}
    assert (await stack.income(), await stack.credit(key)) == (UNITS, UNITS)


async def test_asking_many_times_at_once_spends_no_more_than_there_is() -> None:
    stack = await open_stack(FakeEngine(delay_s=0.002), tokens=TOKENS, max_concurrent=64)
    key = await stack.buyer()
    api_key = (await stack.buy_credit(key, UNITS)).json()["api_key"]
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await stack.post(completion(stream=True), api_key=api_key)).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(ask)
    assert sorted(statuses) == [200] * 2 + [402] * 6
    assert await stack.credit(key) == 0


async def test_strange_and_revoked_keys_spend_nothing(stack: Stack) -> None:
    assert stack.till is not None
    key = await stack.buyer()
    api_key = (await stack.buy_credit(key, UNITS)).json()["api_key"]
    for strange in (api_key[:-1], api_key.lower(), "sk-tessera-" + "A" * 43, "", key.account):
        assert (await stack.post(api_key=strange)).status_code == 402
    (known,) = await stack.till.keys.list("credit")
    await stack.till.keys.revoke(known.id)
    assert (await stack.post(api_key=api_key)).status_code == 402
    assert await stack.credit(key) == UNITS
