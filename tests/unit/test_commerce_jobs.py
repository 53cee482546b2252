"""Jobs from Python: asked, agreed, funded once, delivered, judged, and every way in which they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from commerce_world import BRIEF, GRACE, LIFE_S, PRICE, Market, close_books, open_market  # noqa: F401
from escrow_world import CLIENT, EVALUATOR, PROVIDER
from tessera.agents.commerce.terms import Brief, Phase, Terms, named_in, phase_of
from tessera.agents.mandates import asset_id
from tessera.chain.jobs import REFUND
from tessera.core.amount import Amount
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.incentives.escrow_twin import JobStatus

pytestmark = pytest.mark.anyio


@pytest.fixture
async def market(tmp_path: Path) -> Market:
    return await open_market(tmp_path)


async def test_a_job_goes_from_request_to_payment(market: Market) -> None:
    order, buyer = market.order(), await market.buyer()
    assert (await buyer.advance(order)).phase is Phase.REQUEST
    seller, evaluator = await market.seller(), await market.evaluator()
    await seller.step()
    assert (await buyer.advance(order)).phase is Phase.TRANSACTION
    await seller.step()
    assert (await buyer.advance(order)).phase is Phase.EVALUATION
    await evaluator.step()
    done = await buyer.advance(order)
    assert done.phase is Phase.COMPLETED
    assert done.outcome is not None
    assert (done.outcome.paid, done.outcome.refunded) == (PRICE, 0)
    assert len(done.outcome.transactions) == 1
    assert await buyer.collect(order) == b"Ten words about tiles: done"
    assert await market.wallets() == (-PRICE, PRICE, 0, 0)
    entry = market.ledger.find(order.intent)
    assert entry is not None
    assert entry.state == "consumed"


@pytest.mark.slow
async def test_looking_again_changes_nothing(market: Market) -> None:
    order = market.order()
    await market.finish(order)
    again = await (await market.buyer()).advance(order)
    assert again.phase is Phase.COMPLETED
    assert len(await (await market.jobs()).listed()) == 1
    assert await market.wallets() == (-PRICE, PRICE, 0, 0)


@pytest.mark.slow
async def test_a_seller_names_another_price_and_the_buyer_takes_what_he_may(market: Market) -> None:
    order = market.order(price=market.units(25), most=market.units(PRICE))
    done = await market.finish(order)
    assert done.phase is Phase.COMPLETED
    assert await market.wallets() == (-PRICE, PRICE, 0, 0)


@pytest.mark.slow
async def test_a_price_above_the_most_is_not_paid(market: Market) -> None:
    done = await market.finish(market.order(price=market.units(25), most=market.units(PRICE - 1)))
    assert (done.phase, done.job) == (Phase.REJECTED, 0)
    assert await market.wallets() == (0, 0, 0, 0)


async def test_what_the_mandate_does_not_allow_is_not_even_created(market: Market) -> None:
    order, buyer = market.order(price=market.units(101)), await market.buyer()
    await buyer.advance(order)
    await (await market.seller()).step()
    with pytest.raises(Refused) as refusal:
        await buyer.advance(order)
    assert refusal.value.rule in ("per_payment", "approval")
    assert await (await market.jobs()).listed() == []


@pytest.mark.slow
async def test_work_that_is_not_good_is_refunded(market: Market) -> None:
    async def scribble(brief: Brief) -> bytes:
        return b"scribble"

    market.worker = scribble
    order = market.order()
    done = await market.finish(order)
    assert done.phase is Phase.REJECTED
    assert done.outcome is not None
    assert done.outcome.refunded == PRICE
    assert await market.wallets() == (0, 0, 0, 0)
    with pytest.raises(Refused) as refusal:
        await (await market.buyer()).collect(order)
    assert refusal.value.rule == "unpaid"


@pytest.mark.slow
async def test_work_that_never_comes_is_refunded_at_the_deadline(market: Market) -> None:
    order, buyer = market.order(), await market.buyer()
    await buyer.advance(order)
    await (await market.seller()).step()
    await buyer.advance(order)
    market.clock.advance(LIFE_S)
    done = await buyer.advance(order)
    assert done.phase is Phase.EXPIRED
    assert await market.wallets() == (0, 0, 0, 0)


@pytest.mark.slow
async def test_a_silent_evaluator_leaves_the_seller_paid(market: Market) -> None:
    order, buyer, seller = market.order(), await market.buyer(), await market.seller()
    await buyer.advance(order)
    await seller.step()
    await buyer.advance(order)
    await seller.step()
    market.clock.advance(LIFE_S + GRACE)
    await seller.step()
    done = await buyer.advance(order)
    assert done.phase is Phase.EXPIRED
    assert done.outcome is not None
    assert done.outcome.paid == PRICE
    assert await buyer.collect(order) == b"Ten words about tiles: done"


@pytest.mark.slow
async def test_a_bond_is_locked_and_comes_back(market: Market) -> None:
    order, buyer = market.order(bond=30), await market.buyer()
    seller, evaluator = await market.seller(), await market.evaluator(most_bond=30)
    for _ in range(6):
        progress = await buyer.advance(order)
        await seller.step()
        await evaluator.step()
    assert progress.phase is Phase.COMPLETED
    assert await market.wallets() == (-PRICE, PRICE, 0, 0)


@pytest.mark.slow
async def test_an_order_can_be_taken_back_until_it_is_funded(market: Market) -> None:
    order, buyer = market.order(bond=30), await market.buyer()
    await buyer.advance(order)
    await (await market.seller()).step()
    assert (await buyer.advance(order)).phase is Phase.NEGOTIATION  # the bond is not there
    done = await buyer.take_back(order)
    assert done.phase is Phase.REJECTED
    entry = market.ledger.find(order.intent)
    assert entry is not None
    assert entry.state == "released"
    assert market.ledger.spent(market.mandate.id).units == 0


@pytest.mark.slow
async def test_an_intent_is_one_order_for_ever(market: Market) -> None:
    await market.finish(market.order("one"))
    other = market.order("one", title="Something else")
    buyer, seller = await market.buyer(), await market.seller()
    with pytest.raises(Conflict):
        await buyer.advance(other)
    await seller.step()
    with pytest.raises(Conflict):
        await buyer.advance(other)
    assert await market.wallets() == (-PRICE, PRICE, 0, 0)


async def test_two_processes_with_one_order_make_one_payment(market: Market) -> None:
    """Both have created a job before either saw the other's."""
    order, first, second = market.order(), await market.buyer(), await market.buyer()
    await first.advance(order)
    await (await market.seller()).step()
    terms = order.terms(CLIENT.account)
    jobs = await market.jobs()
    await jobs.create(CLIENT, terms)
    await jobs.create(CLIENT, terms)
    await first.advance(order)
    await second.advance(order)
    done = await market.finish(order)
    assert done.job == 1
    assert await market.wallets() == (-PRICE, PRICE, 0, 0)


@pytest.mark.slow
async def test_reconcile_needs_no_order(market: Market) -> None:
    order, buyer = market.order(), await market.buyer()
    await buyer.advance(order)
    await (await market.seller()).step()
    await buyer.advance(order)
    job = (await (await market.jobs()).listed())[0]
    assert job.intent == order.intent
    assert market.ledger.entries(open_only=True) == []  # consumed when it was funded
    assert await buyer.reconcile() == []


@pytest.mark.slow
async def test_a_seller_refuses_terms_that_could_leave_him_unpaid(market: Market) -> None:
    seller, buyer = await market.seller(evaluators=frozenset({EVALUATOR.account})), await market.buyer()
    bad = [
        market.order("own judge", evaluator=CLIENT.account),
        market.order("silence", on_silence=REFUND),
        market.order("no time", deadline=int(market.clock.time()) + 2),
        market.order("unknown", brief=Brief("dance", "", {})),
    ]
    for order in bad:
        await buyer.advance(order)
    await seller.step()
    assert [(await buyer.advance(order)).phase for order in bad] == [Phase.REJECTED] * 4
    assert await (await market.jobs()).listed() == []


def test_phases_are_acps() -> None:
    assert [phase_of(None, False), phase_of(JobStatus.OPEN, True)] == [Phase.REQUEST, Phase.NEGOTIATION]
    assert [phase_of(status, True) for status in JobStatus][1:] == list(Phase)[2:]


def test_terms_come_back_as_they_were_and_name_themselves() -> None:
    terms = Terms(
        client=CLIENT.account,
        provider=PROVIDER.account,
        evaluator=EVALUATOR.account,
        price=Amount(5, asset_id(1, CLIENT.account)),
        deadline=99,
        title="Tiles",
        brief=BRIEF.hash,
        intent="ab" * 32,
    )
    assert Terms.from_dict(terms.to_dict()) == terms
    assert named_in(terms.description) == (terms.digest, "ab" * 32)
    assert named_in("terms " + "0" * 64) is None
    for change in ({"title": "two\nlines"}, {"units": -1}, {"deadline": True}, {"extra": 1}, {"brief": "AB"}):
        with pytest.raises(Invalid):
            Terms.from_dict(terms.to_dict() | change)
