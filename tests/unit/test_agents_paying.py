"""The x402 buyer, against sellers honest and hostile."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import pytest

from agents_world import (  # noqa: F401
    AGENT,
    APPROVER,
    ATTACKER,
    COIN,
    NOW,
    QUICK,
    SELLER,
    Shop,
    close_ledgers,
    key,
    make_intent,
    make_mandate,
    open_ledger,
    open_shop,
    units,
)
from tessera.agents.approvals import approve, payment_call
from tessera.agents.intents import Coin, Intent, authorize, intent_id
from tessera.agents.ledger import Signing
from tessera.agents.mandates import asset_id
from tessera.agents.paying import Payer, PayerConfig, Purchase
from tessera.agents.settlements import ChainSettlements, FakeSettlements
from tessera.chain.faces import Coin as CoinFace
from tessera.chain.local import LocalChain
from tessera.core.amount import Amount
from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, PaymentRequired, Refused, TesseraError, Unavailable

pytestmark = pytest.mark.anyio
Payment = dict[str, Any] | None


@pytest.fixture
def shop() -> Shop:
    return open_shop()


async def test_a_purchase_is_paid_once_and_delivered(shop: Shop) -> None:
    bought = await shop.payer().buy(shop.purchase())
    assert json.loads(bought.body) == {"data": "/data"}
    assert bought.entry is not None
    assert bought.entry.state == "consumed"
    assert bought.entry.note.startswith("0x")
    again = await shop.payer().buy(shop.purchase())
    assert again.status == 200
    assert shop.chain.payments == [(AGENT.account, SELLER, 40)]


async def test_what_costs_nothing_is_not_paid(shop: Shop) -> None:
    shop.seller.habit = lambda request, payment: httpx.Response(200, text="free")
    bought = await shop.payer().buy(shop.purchase())
    assert (bought.body, bought.entry) == (b"free", None)
    assert shop.ledger.entries() == []


@pytest.mark.parametrize(
    ("status", "error"), [(500, Unavailable), (503, Unavailable), (308, Refused), (404, PaymentRequired)]
)
async def test_a_seller_without_an_offer_gets_nothing(shop: Shop, status: int, error: type[TesseraError]) -> None:
    shop.seller.habit = lambda request, payment: httpx.Response(status, headers={"location": "https://evil/"})
    with pytest.raises(error):
        await shop.payer().buy(shop.purchase())
    assert shop.ledger.entries() == []


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("price", {"amount": "101"}), ("payee", {"payTo": ATTACKER.account}), ("asset", {"asset": ATTACKER.account}),
        ("asset", {"network": "eip155:1"}), ("asset", {"scheme": "upto"}), ("invalid", {"amount": 40}),
        ("invalid", {"amount": "-1"}), ("invalid", {"amount": "4e1"}), ("invalid", {"amount": "0"}),
        ("invalid", {"payTo": "nobody"}), ("invalid", {"payTo": None}), ("invalid", {"amount": "٤٠"}),
    ],
    ids=str,
)  # fmt: skip
async def test_an_offer_outside_of_the_mandate_is_refused(shop: Shop, rule: str, changes: dict[str, Any]) -> None:
    shop.seller.habit = lambda request, payment: shop.seller.offer("/data", **changes)
    with pytest.raises((Refused, Invalid)) as caught:
        await shop.payer().buy(shop.purchase())
    assert getattr(caught.value, "rule", caught.value.code) == rule
    assert shop.ledger.entries() == []


async def test_the_same_intent_is_not_another_purchase(shop: Shop) -> None:
    shop.seller.prices["/dear"] = 40
    await shop.payer().buy(shop.purchase())
    for other in (shop.purchase(path="/dear"), shop.purchase(purpose="else"), shop.purchase(most=units(39))):
        with pytest.raises(Refused) as caught:
            await shop.payer().buy(other)
        assert caught.value.rule == "changed_terms"
    assert len(shop.chain.payments) == 1


async def test_above_the_threshold_a_person_is_asked() -> None:
    shop = open_shop(approve_above=30)
    purchase = shop.purchase()
    with pytest.raises(Refused) as caught:
        await shop.payer().buy(purchase)
    assert caught.value.rule == "approval"
    intent = Intent(purchase.intent, shop.mandate.id, SELLER, units(40), purchase.resource)
    approval = approve(payment_call(intent, shop.mandate), APPROVER, NOW + 60)
    assert (await shop.payer().buy(purchase, approval)).status == 200


async def test_only_the_agent_of_a_mandate_pays_under_it(shop: Shop) -> None:
    thief = Payer(shop.ledger, ATTACKER, COIN, shop.chain, config=QUICK, transport=shop.seller.transport())
    with pytest.raises(Refused) as caught:
        await thief.buy(shop.purchase())
    assert caught.value.rule == "agent"


async def test_a_share_of_the_purse_is_capped() -> None:
    shop = open_shop(balance_bps=399)
    with pytest.raises(Refused) as caught:
        await shop.payer().buy(shop.purchase())
    assert caught.value.rule == "balance"
    shop.chain.balances[AGENT.account] = 1_003
    assert (await shop.payer().buy(shop.purchase())).status == 200


async def test_a_seller_that_keeps_the_money_is_asked_again_with_the_same_payment(shop: Shop) -> None:
    def settle_and_fail(request: httpx.Request, payment: Payment) -> httpx.Response | None:
        if payment is None:
            return None
        shop.seller.settle(payment, "/data")
        return httpx.Response(502)

    shop.seller.habit = settle_and_fail
    with pytest.raises(Unavailable, match="it is paid"):
        await shop.payer().buy(shop.purchase())
    assert len({payment["nonce"] for payment in shop.seller.payments}) == 1
    assert [entry.state for entry in shop.ledger.entries()] == ["consumed"]
    assert len(shop.chain.payments) == 1


async def test_an_intent_is_given_up_only_when_its_payment_can_never_move(shop: Shop) -> None:
    shop.seller.habit = lambda request, payment: None if payment is None else httpx.Response(503)
    payer = shop.payer()
    with pytest.raises(Unavailable, match="in doubt"):
        await payer.buy(shop.purchase())
    assert await payer.reconcile() == []
    shop.pass_time(PayerConfig().valid_s + PayerConfig().margin_s - 1)
    assert await payer.reconcile() == []
    shop.pass_time(1)
    assert [entry.note for entry in await payer.reconcile()] == ["expired unused"]
    assert shop.ledger.spent(shop.mandate.id).units == 0
    with pytest.raises(Conflict):
        await payer.buy(shop.purchase())
    shop.seller.habit = None
    assert (await payer.buy(shop.purchase("a new one"))).status == 200


async def test_a_late_try_signs_anew_with_the_same_nonce(shop: Shop) -> None:
    shop.seller.habit = lambda request, payment: None if payment is None else httpx.Response(503)
    with pytest.raises(Unavailable):
        await shop.payer().buy(shop.purchase())
    shop.pass_time(125)
    shop.seller.habit = None
    assert (await shop.payer().buy(shop.purchase())).status == 200
    assert len({payment["nonce"] for payment in shop.seller.payments}) == 1
    assert len({payment["validBefore"] for payment in shop.seller.payments}) == 2


async def test_a_reservation_that_nobody_signs_is_given_up_after_its_lease(shop: Shop) -> None:
    shop.ledger.reserve(make_intent(shop.mandate))
    payer = shop.payer()
    assert await payer.reconcile() == []
    shop.pass_time(901)
    assert [entry.note for entry in await payer.reconcile()] == ["never signed"]


async def test_a_stopped_mandate_signs_nothing_more(shop: Shop) -> None:
    shop.ledger.reserve(Intent(intent_id("purchase"), shop.mandate.id, SELLER, units(40), shop.purchase().resource))
    shop.ledger.stop(shop.mandate.id)
    for name in ("purchase", "other"):
        with pytest.raises(Refused) as caught:
            await shop.payer().buy(shop.purchase(name))
        assert caught.value.rule == "stopped"
    assert shop.seller.payments == []


async def test_an_endless_answer_is_cut_off(shop: Shop) -> None:
    shop.seller.habit = lambda request, payment: httpx.Response(200, content=b"x" * 2_000)
    with pytest.raises(Unavailable):
        await shop.payer(config=PayerConfig(answer_limit_bytes=1_000)).buy(shop.purchase())


async def test_the_payer_settles_on_a_real_coin_and_reads_its_fate() -> None:
    clock = FakeClock(NOW)
    chain = LocalChain(None, chain_id=31_337, clock=clock).client()
    coin = await CoinFace.deploy(chain, key("operator"))
    await coin.mint(key("operator"), AGENT.account, 1_000)
    asset = asset_id(31_337, coin.address)
    real = Coin(asset, await coin.name(), await coin.version())
    mandate = make_mandate(asset=asset)
    ledger, settlements = open_ledger(mandate, clock=clock), ChainSettlements(chain)
    intent = make_intent(mandate)
    made = authorize(intent, real, AGENT, NOW + 60)
    assert await settlements.balance(asset, AGENT.account) == Amount(1_000, asset)
    assert (await settlements.fate(asset, AGENT.account, made.nonce, 0)).state == "unused"
    v, r, s = made.signature[64], made.signature[:32], made.signature[32:64]

    async def settle() -> None:
        await coin.transferWithAuthorization(
            key("operator"), made.payer, made.payee, made.units, 0, made.valid_before, made.nonce, v, r, s
        )

    await settle()
    fate = await settlements.fate(asset, AGENT.account, made.nonce, await settlements.head())
    assert (fate.state, await coin.balanceOf(SELLER)) == ("paid", 40)
    with pytest.raises(TesseraError, match="used or canceled"):
        await settle()
    later = authorize(intent, real, AGENT, NOW + 90)
    assert later.nonce == made.nonce, "however often it is signed"
    ledger.reserve(intent)
    ledger.sign(intent.id, Signing(NOW + 60, 1))
    seller = FakeSettlements(asset, {})
    payer = Payer(ledger, AGENT, real, settlements, config=QUICK, clock=clock)
    assert [entry.note for entry in await payer.reconcile()] == [fate.transaction]
    assert seller.payments == []


async def test_two_processes_that_buy_at_once_pay_once(shop: Shop) -> None:
    payers = [shop.payer() for _ in range(4)]
    statuses = []

    async def buy(payer: Payer) -> None:
        statuses.append((await payer.buy(shop.purchase())).status)

    async with anyio.create_task_group() as group:
        for payer in payers:
            group.start_soon(buy, payer)
    assert statuses == [200] * 4
    assert len(shop.chain.payments) == 1


async def test_a_url_that_is_none_is_refused(shop: Shop) -> None:
    with pytest.raises(Invalid):
        await shop.payer().buy(Purchase(intent_id("x"), shop.mandate.id, "https://seller:port/", units(1)))
