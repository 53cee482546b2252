"""One payment shown to two gateways that share a ledger: it pays once, works once, and outlives a killed gateway."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import anyio
import pytest

from serving_stack import MODEL, PAYEE, PRICE, Stack, completion, open_stack
from tessera.chain.genesis import PERMIT2
from tessera.core.clock import FakeClock, SystemClock
from tessera.core.errors import PaymentRequired, Unavailable
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import PAYMENT_HEADER, PaidRequest, Usage
from tessera.serving.paying.ledger import LEASE_S
from tessera.serving.paying.payments import PaymentConfig, X402Payments
from tessera.serving.paying.prices import TokenPrice
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
OPERATOR = AccountKey(b"\x07" * 32)
TOKENS = TokenPrice(prompt_units=100_000, completion_units=300_000)


def paying(payment: str, digest: bytes = bytes(32)) -> PaidRequest:
    return PaidRequest("http://gateway/v1/completions", digest, {PAYMENT_HEADER: payment})


async def another(
    stack: Stack, url: str, *, price: int = PRICE, tokens: TokenPrice | None = None, clock: FakeClock | None = None
) -> Stack:
    """A gateway on `stack`'s chain, with its ledger and its balances at `url`."""
    names = await stack.coin.name(), await stack.coin.version()
    config = PaymentConfig(stack.coin.address, *names, price, PAYEE, tokens=tokens)
    balances = Balances(clock or SystemClock(), where=url)
    payments = await X402Payments.open(config, stack.chain, OPERATOR, balances=balances, database=url, clock=clock)
    engine = FakeEngine(lambda prompt, sampling: list(b"hello world"), delay_s=0.002)
    app = create_app(GatewayConfig(max_concurrent=64), [LocalModel(MODEL, engine, CharTokenizer())], [payments])
    return replace(stack, payments=payments, app=app, engine=engine)


async def test_replays_at_two_gateways_at_once_pay_once_and_are_served_once(database_url: str) -> None:
    stack = await open_stack()
    gateways = [await another(stack, database_url) for _ in range(2)]
    payment = gateways[0].sign(await stack.buyer())
    statuses: list[int] = []

    async def replay(gateway: Stack) -> None:
        statuses.append((await gateway.post(completion(max_tokens=5), payment)).status_code)

    async with anyio.create_task_group() as group:
        for turn in range(12):
            group.start_soon(replay, gateways[turn % 2])
    assert sorted(statuses) == [200] + [402] * 11
    assert (await stack.income(), sum(gateway.engine.started for gateway in gateways)) == (PRICE, 1)
    assert [gateway.payments.held for gateway in gateways] == [0, 0]
    for gateway in gateways:
        gateway.payments.close()


async def test_one_metered_payment_at_two_gateways_at_once_is_served_and_charged_once(database_url: str) -> None:
    stack = await open_stack()
    gateways = [await another(stack, database_url, tokens=TOKENS) for _ in range(2)]
    body = completion(stream=True)
    payment = gateways[0].sign_metered(await stack.buyer(metered=True), body)
    statuses: list[int] = []

    async def replay(gateway: Stack) -> None:
        statuses.append((await gateway.post(body, payment)).status_code)

    async with anyio.create_task_group() as group:
        for turn in range(8):
            group.start_soon(replay, gateways[turn % 2])
    assert sorted(statuses) == [200] + [402] * 7
    assert await stack.income() == TOKENS.cost_down(Usage(3, 11))
    for gateway in gateways:
        gateway.payments.close()


async def test_a_debt_at_one_gateway_closes_the_other_one_too(database_url: str) -> None:
    stack = await open_stack()
    here, there = [await another(stack, database_url, tokens=TOKENS) for _ in range(2)]
    key = await stack.buyer(metered=True)
    body = completion(stream=True)
    hold = await here.payments.hold(
        replace(paying(here.sign_metered(key, body)), prompt_tokens=3, max_tokens=body["max_tokens"])
    )
    await hold.start()
    await stack.coin.approve(key, PERMIT2, 0)
    with pytest.raises(PaymentRequired):
        await hold.finish(Usage(3, 11))
    await hold.release()
    await stack.coin.approve(key, PERMIT2, 2**256 - 1)
    refused = await there.post(body, there.sign_metered(key, body))
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "debt")
    for gateway in (here, there):
        gateway.payments.close()


async def test_what_a_killed_gateway_had_settled_another_one_serves(database_url: str) -> None:
    stack, clock = await open_stack(), FakeClock()
    killed = await another(stack, database_url, clock=clock)
    payment = killed.sign(await stack.buyer())
    hold = await killed.payments.hold(paying(payment))
    await hold.start()  # and here it is killed: no answer, no release
    killed.payments.close()
    heir = await another(stack, database_url, clock=clock)
    with pytest.raises(PaymentRequired, match="has been used"):
        await heir.payments.hold(paying(payment))
    clock.advance(LEASE_S)
    with pytest.raises(PaymentRequired, match="has been used"):
        await heir.payments.hold(paying(payment, digest=b"\1" * 32))
    for _ in range(2):
        again = await heir.payments.hold(paying(payment))
        assert await again.start() == {}
        again.owe()
        await again.release()
    served = await heir.payments.hold(paying(payment))
    assert await served.start() == {}
    await served.release()
    with pytest.raises(PaymentRequired, match="has been used"):
        await heir.payments.hold(paying(payment))
    assert await stack.income() == PRICE
    heir.payments.close()


async def test_what_is_owed_for_an_old_price_buys_nothing_at_a_new_one(database_url: str) -> None:
    stack = await open_stack()
    cheap = await another(stack, database_url)
    cheap.engine.fail_after, cheap.engine.error = 2, Unavailable("stage 1 is gone")
    key = await stack.buyer()
    payment, asked = cheap.sign(key), completion(stream=True)
    assert "stage 1 is gone" in (await cheap.post(asked, payment)).text
    dear = await another(stack, database_url, price=5 * PRICE)
    raised: dict[str, Any] = {"accepted": {"amount": str(5 * PRICE)}}
    for header in (payment, _as_if(payment, raised)):
        assert (await dear.post(asked, header)).status_code == 402
    cheap.engine.fail_after = None
    assert (await cheap.post(asked, payment)).text.endswith("data: [DONE]\n\n")
    assert (await stack.income(), dear.engine.started) == (PRICE, 0)
    for gateway in (cheap, dear):
        gateway.payments.close()


async def test_a_ledger_that_cannot_be_written_charges_nobody(database_url: str) -> None:
    stack = await open_stack()
    gateway = await another(stack, database_url)
    payment = gateway.sign(await stack.buyer())
    hold = await gateway.payments.hold(paying(payment))
    gateway.payments.close()
    with pytest.raises(Unavailable):
        await hold.start()
    await hold.release()  # it is told in the log alone: the lease ends by itself
    assert await stack.income() == 0


def _as_if(payment: str, changes: dict[str, Any]) -> str:
    """`payment` with terms that its signature does not cover."""
    value = json.loads(base64.b64decode(payment))
    value["accepted"] |= changes["accepted"]
    return base64.b64encode(json.dumps(value).encode()).decode()
