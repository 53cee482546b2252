"""A payment for one resource is shown for another of the same price, or of a higher one."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from agents_world import Shop, close_ledgers, open_shop  # noqa: F401
from tessera.agents.intents import is_for, resource_name
from tessera.core.errors import Unavailable

pytestmark = pytest.mark.anyio
CHEAP, DEAR, EQUAL = (f"https://seller/{name}" for name in ("cheap", "dear", "equal"))


@pytest.fixture
async def signed() -> tuple[Shop, dict[str, Any]]:
    """A payment for /cheap, caught on its way before it was settled."""
    shop, caught = open_shop(), []
    shop.seller.prices |= {"/cheap": 40, "/dear": 400, "/equal": 40}

    def catch(request: httpx.Request, payment: dict[str, Any] | None) -> httpx.Response | None:
        if payment is None:
            return None
        caught.append(json.loads(base64.b64decode(request.headers["payment-signature"])))
        raise httpx.ReadError("cut off", request=request)

    shop.seller.habit = catch
    with pytest.raises(Unavailable):
        await shop.payer().buy(shop.purchase(path="/cheap"))
    return shop, caught[0]


async def test_a_seller_knows_what_a_payment_is_for(signed: tuple[Shop, dict[str, Any]]) -> None:
    _, payment = signed
    assert is_for(payment, resource_name("GET", CHEAP))
    for other in (resource_name("GET", DEAR), resource_name("GET", EQUAL), resource_name("POST", CHEAP),
                  resource_name("GET", CHEAP, b"body"), resource_name("GET", CHEAP + "?x=1")):  # fmt: skip
        assert not is_for(payment, other)


async def test_nothing_in_the_payment_can_be_changed_to_fit(signed: tuple[Shop, dict[str, Any]]) -> None:
    _, payment = signed
    resource, text = resource_name("GET", CHEAP), json.dumps(payment)
    authorization = payment["payload"]["authorization"]
    for name, value in (
        ("value", "400"),
        ("to", authorization["from"]),
        ("from", authorization["to"]),
        ("nonce", "0x" + "00" * 32),
    ):
        changed = json.loads(text)
        changed["payload"]["authorization"][name] = value
        assert not is_for(changed, resource)
    for broken in (
        {},
        {"payload": None},
        {**payment, "extensions": {}},
        {**payment, "extensions": {"payment-identifier": {"info": {"id": "xy"}}}},
    ):
        assert not is_for(broken, resource)


async def test_a_payment_for_the_cheap_one_buys_the_dear_one_nowhere(signed: tuple[Shop, dict[str, Any]]) -> None:
    shop, payment = signed
    authorization = payment["payload"]["authorization"]
    request = httpx.Request("GET", DEAR)
    assert shop.seller.honest(request, authorization).status_code == 402
    shop.seller.habit = None
    assert shop.seller.honest(httpx.Request("GET", CHEAP), authorization).status_code == 200
    for url in (DEAR, EQUAL):
        assert shop.seller.honest(httpx.Request("GET", url), authorization).status_code == 402
    assert len(shop.chain.payments) == 1
