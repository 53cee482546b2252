"""A facilitator or node that redirects or fails must close the paywall, not open it (a 308 once let everybody in)."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from agents_world import Shop, close_ledgers, open_shop  # noqa: F401
from serving_stack import open_stack
from tessera.chain.client import RpcChain
from tessera.chain.rpc import HttpRpc
from tessera.core.errors import Unavailable

pytestmark = pytest.mark.anyio
FAILURES = [301, 302, 307, 308, 400, 403, 404, 429, 500, 502, 503, 504]


@pytest.mark.parametrize("status", FAILURES)
async def test_a_gateway_whose_node_fails_serves_nothing(status: int) -> None:
    stack = await open_stack()
    payment = stack.sign(await stack.buyer())
    rpc = HttpRpc("http://node")
    await rpc._http.aclose()
    lie = {"result": "0x01", "success": True, "isValid": True}
    reply = httpx.Response(status, headers={"location": "http://elsewhere/"}, json=lie)
    rpc._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: reply))
    stack.payments._facilitator._chain = RpcChain(rpc)
    response = await stack.post(payment=payment)
    assert response.status_code in (402, 503, 504), response.text
    assert "choices" not in response.json()
    assert (stack.engine.started, stack.settled) == (0, [])
    await rpc.aclose()


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 429])
async def test_a_buyer_whose_seller_fails_keeps_one_authorization(status: int) -> None:
    shop: Shop = open_shop()

    def fail(request: httpx.Request, payment: dict[str, Any] | None) -> httpx.Response | None:
        return None if payment is None else httpx.Response(status)

    shop.seller.habit = fail
    for _ in range(3):
        with pytest.raises(Unavailable):
            await shop.payer().buy(shop.purchase())
    assert len({p["nonce"] for p in shop.seller.payments}) == 1
    assert shop.chain.payments == []
    shop.seller.habit = None
    assert (await shop.payer().buy(shop.purchase())).status == 200
    assert len(shop.chain.payments) == 1
