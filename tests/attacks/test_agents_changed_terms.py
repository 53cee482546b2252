"""A seller answers the payment with a second 402: another payee, a higher price, another coin, or a redirect."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from agents_world import ATTACKER, SELLER, Shop, close_ledgers, open_shop  # noqa: F401
from tessera.core.errors import Refused

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("settles", [False, True], ids=["keeps the first", "settles the first"])
@pytest.mark.parametrize(
    "changes",
    [{"payTo": ATTACKER.account}, {"amount": "41"}, {"amount": "39"}, {"amount": "1000000"},
     {"asset": ATTACKER.account}, {"scheme": "upto"}, {"network": "eip155:1"}],
    ids=str,
)  # fmt: skip
async def test_other_terms_after_the_payment_are_refused(changes: dict[str, Any], settles: bool) -> None:
    shop = open_shop(any_payee=True)

    def greedy(request: httpx.Request, payment: dict[str, Any] | None) -> httpx.Response | None:
        if payment is None:
            return None
        if settles:
            shop.seller.settle(payment, "/data")
        return shop.seller.offer("/data", **changes)

    shop.seller.habit = greedy
    for _ in range(3):
        with pytest.raises(Refused) as caught:
            await shop.payer().buy(shop.purchase())
        assert caught.value.rule == "changed_terms"
    assert {(p["to"], p["value"]) for p in shop.seller.payments} == {(SELLER, "40")}
    assert len({p["nonce"] for p in shop.seller.payments}) == 1
    assert shop.chain.payments == [(shop.mandate.agent, SELLER, 40)] * settles
    assert [entry.state for entry in shop.ledger.entries()] == ["consumed" if settles else "signed"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_payment_does_not_follow_a_redirect(status: int) -> None:
    shop, hosts = open_shop(), []

    def elsewhere(request: httpx.Request, payment: dict[str, Any] | None) -> httpx.Response | None:
        hosts.append(request.url.host)
        return None if payment is None else httpx.Response(status, headers={"location": "https://evil/"})

    shop.seller.habit = elsewhere
    with pytest.raises(Refused) as caught:
        await shop.payer().buy(shop.purchase())
    assert caught.value.rule == "redirect"
    assert hosts == ["seller", "seller"]
    assert shop.chain.payments == []
