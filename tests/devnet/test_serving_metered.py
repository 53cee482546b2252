"""`upto` at the gateway: the official client signs for the most, and pays for the tokens that were really made."""

from __future__ import annotations

import base64
import json
from typing import Any

import anyio
import httpx
import pytest
from eth_account import Account as EthAccount
from x402 import x402Client
from x402.http.clients.httpx import x402AsyncTransport
from x402.mechanisms.evm.exact import ExactEvmClientScheme
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.mechanisms.evm.upto import UptoEvmClientScheme

from serving_stack import PRICE, Stack, completion, open_stack
from tessera.core.signing import AccountKey
from tessera.serving.engine import FakeEngine
from tessera.serving.paying.prices import TokenPrice

pytestmark = pytest.mark.anyio
TOKENS = TokenPrice(prompt_units=100_000, completion_units=300_000)
MOST = 3 * 100 + 20 * 300  # of `completion()`
USED = 3 * 100 + 11 * 300  # of it, when the answer is "hello world"


@pytest.fixture
async def stack() -> Stack:
    return await open_stack(tokens=TOKENS)


def official_client(stack: Stack, key: AccountKey, *schemes: Any) -> httpx.AsyncClient:
    """x402's own client, set up as its documentation says."""
    client = x402Client()
    signer = EthAccountSigner(EthAccount.from_key(key.secret))
    for scheme in schemes:
        client.register(stack.payments.offer.network, scheme(signer))
    cap = {"network": stack.payments.offer.network, "asset": stack.coin.address, "max_amount_per_payment": str(PRICE)}
    client.set_spend_controls({"allowed_assets": [cap]})  # type: ignore[list-item]
    transport = x402AsyncTransport(client, httpx.ASGITransport(stack.app))
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def receipt(header: str) -> dict[str, Any]:
    return dict(json.loads(base64.b64decode(header)))


def last_chunk(text: str) -> dict[str, Any]:
    *_, chunk, done, _ = text.split("\n\n")
    assert done == "data: [DONE]"
    return dict(json.loads(chunk.removeprefix("data: ")))


async def test_the_official_client_pays_for_what_was_made_whole_and_streamed(stack: Stack) -> None:
    key = await stack.buyer(metered=True)
    async with official_client(stack, key, UptoEvmClientScheme) as client:
        whole = await client.post("/v1/completions", json=completion())
        assert whole.json()["choices"][0]["text"] == "hello world"
        streamed = await client.post("/v1/completions", json=completion(stream=True))
    assert "payment-response" not in streamed.headers
    closing = last_chunk(streamed.text)
    assert closing["choices"][0]["finish_reason"] == "stop"
    for told in (whole.headers["payment-response"], closing["payment"]["payment-response"]):
        assert (receipt(told)["success"], receipt(told)["amount"]) == (True, str(USED))
    assert await stack.income() == 2 * USED
    assert [settlement.units for settlement in stack.settled] == [USED] * 2
    assert (await stack.credit(key), stack.payments.held) == (0, 0)


async def test_both_schemes_are_offered_and_the_client_picks(stack: Stack) -> None:
    accepts = (await stack.post()).json()["accepts"]
    assert [(offer["scheme"], offer["amount"]) for offer in accepts] == [("exact", str(PRICE)), ("upto", str(MOST))]
    key = await stack.buyer(metered=True)
    for schemes, paid in (((ExactEvmClientScheme,), PRICE), ((UptoEvmClientScheme,), USED)):
        before = await stack.income()
        async with official_client(stack, key, *schemes) as client:
            assert (await client.post("/v1/completions", json=completion())).status_code == 200
        assert await stack.income() - before == paid


async def test_a_cancelled_stream_is_paid_as_far_as_it_went() -> None:
    stack = await open_stack(FakeEngine(delay_s=0.005), tokens=TOKENS)
    key = await stack.buyer(metered=True)
    body = completion(stream=True)
    seen = anyio.Event()

    async def read() -> None:
        inner: list[bytes] = []

        async def send(message: Any) -> None:
            inner.append(message.get("body", b""))
            if len(inner) == 6:  # the headers, and five chunks
                seen.set()

        sent = False

        async def receive() -> Any:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            await seen.wait()
            return {"type": "http.disconnect"}

        headers = [(b"payment-signature", stack.sign_metered(key, body).encode()), (b"host", b"gateway")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
                 "root_path": "", "scheme": "http", "query_string": b"", "headers": headers,
                 "server": ("gateway", 80), "client": ("buyer", 1), "http_version": "1.1"}  # fmt: skip
        await stack.app(scope, receive, send)

    with anyio.fail_after(20):
        await read()
    made = stack.engine.produced
    assert 5 <= made < 20
    assert await stack.income() == 3 * 100 + made * 300
    assert (await stack.credit(key), stack.payments.held, stack.engine.open) == (0, 0, 0)


async def test_a_stream_that_breaks_on_our_side_costs_nothing_and_its_payment_stays_good(stack: Stack) -> None:
    stack.engine.fail_after = 4
    key = await stack.buyer(metered=True)
    body = completion(stream=True)
    payment = stack.sign_metered(key, body)
    assert '"error"' in (await stack.post(body, payment)).text
    assert (await stack.income(), await stack.credit(key)) == (0, 0)
    stack.engine.fail_after = None
    assert last_chunk((await stack.post(body, payment)).text)["payment"]
    assert await stack.income() == USED
