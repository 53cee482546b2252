"""The whole way: the official client pays, and four peers that hold a stage each answer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serving_peers import open_shards
from serving_stack import MODEL, PRICE, open_stack
from tessera.models.tokenizer import END, train_tokenizer
from tessera.serving.buyer import Buyer
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel

pytestmark = pytest.mark.anyio


async def test_a_paid_request_is_answered_by_the_peers_that_hold_the_stages() -> None:
    tokenizer = train_tokenizer(["def add(a, b):\n    return a + b\n"] * 50, 300)
    stack = await open_stack()
    key = await stack.buyer()
    async with open_shards(4, real=True) as shards:
        model = LocalModel(MODEL, shards.engine, tokenizer, stop_tokens=(END,))
        app = create_app(GatewayConfig(), [model], [stack.payments])
        limits: dict[str, Any] = {"asset": stack.coin.address, "max_units_each": PRICE, "max_units": 3 * PRICE}
        transport = httpx.ASGITransport(app)
        async with Buyer("http://g", key, chain_id=stack.chain_id, transport=transport, **limits) as buyer:
            answers = await buyer.buy(2, "def add(a", model=MODEL, max_tokens=12, temperature=0)
        expected = shards.one_process(tokenizer.encode("def add(a"), 12)
        ids = expected[: expected.index(END)] if END in expected else expected
        text = tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])
        assert text
        assert [answer["choices"][0]["text"] for answer in answers] == [text] * 2
        assert answers[0]["usage"]["completion_tokens"] == len(ids)
        await shards.settled()
    assert await stack.income() == 2 * PRICE
