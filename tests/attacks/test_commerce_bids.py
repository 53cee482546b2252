"""Sealed bids: copied, late, missing, wrong and early ones; one award for all, and the bond pays for silence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain_support import NOW, key
from commerce_world import Market, close_books, open_market  # noqa: F401
from escrow_world import CLIENT, EVALUATOR, PROVIDER
from tessera.agents.commerce.bounties import (
    Auction,
    Bid,
    Bounty,
    bond_holds,
    bond_judge,
    bond_order,
    bond_service,
    commit_message,
    reveal_message,
)
from tessera.agents.commerce.evaluator import Evaluator
from tessera.agents.commerce.messages import write_message
from tessera.agents.commerce.terms import Phase
from tessera.agents.mandates import asset_id
from tessera.core.errors import Conflict, Invalid, Late, Refused
from tessera.core.ids import Account

POSTER, REFEREE, BIDDERS = key("poster"), key("referee"), [key(f"bidder {number}") for number in range(4)]
BOUNTY = Bounty(
    poster=POSTER.account, referee=REFEREE.account, title="Ten pictures", brief="ab" * 32,
    asset=asset_id(1, POSTER.account), most=100, bond=10,
    commit_until=NOW + 100, reveal_until=NOW + 200, bond_until=NOW + 300,
)  # fmt: skip


def auction() -> Auction:
    return Auction(BOUNTY, POSTER.account)


def commit(book: Auction, number: int, bid: Bid, now: float = NOW + 1) -> None:
    book.commit(commit_message(BIDDERS[number], POSTER.account, BOUNTY, bid, number + 1, now), now, bonded=True)


def reveal(book: Auction, number: int, bid: Bid, now: float = NOW + 101) -> None:
    book.reveal(reveal_message(BIDDERS[number], POSTER.account, BOUNTY, bid, now), now)


def test_the_lowest_bid_wins_and_equal_ones_by_who_came_first() -> None:
    book, bids = auction(), [Bid(30), Bid(20), Bid(20)]
    for number, bid in enumerate(bids):
        commit(book, number, bid)
    for number in (2, 1, 0):
        reveal(book, number, bids[number])
    with pytest.raises(Conflict):
        book.award(NOW + 199)
    assert book.award(NOW + 200) == [(BIDDERS[1].account, 20), (BIDDERS[2].account, 20), (BIDDERS[0].account, 30)]
    assert book.forfeits(NOW + 200) == {}


def test_a_copied_bid_is_refused_and_could_not_be_opened() -> None:
    book, bid = auction(), Bid(20)
    commit(book, 0, bid)
    body = {"bounty": BOUNTY.digest, "commitment": bid.commitment(BOUNTY, BIDDERS[0].account), "bond_job": 9}
    copied = write_message(BIDDERS[1], POSTER.account, "commit", body, NOW + 2)
    with pytest.raises(Conflict):
        book.commit(copied, NOW + 2, bonded=True)
    first = auction()  # even where the thief is faster than the one he copies
    first.commit(copied, NOW + 2, bonded=True)
    reveal_of_thief = reveal_message(BIDDERS[1], POSTER.account, BOUNTY, bid, NOW + 101)
    with pytest.raises(Refused) as refusal:
        first.reveal(reveal_of_thief, NOW + 101)
    assert refusal.value.rule == "reveal"
    assert first.forfeits(NOW + 200) == {BIDDERS[1].account: 9}


def test_late_early_and_missing_bids() -> None:
    book, bid = auction(), Bid(20)
    with pytest.raises(Late):
        commit(book, 0, bid, NOW + 100)
    commit(book, 0, bid)
    commit(book, 1, Bid(30))
    for moment in (NOW + 99, NOW + 200):
        with pytest.raises(Late):
            reveal(book, 0, bid, moment)
    with pytest.raises(Refused) as refusal:
        reveal(book, 2, bid)
    assert refusal.value.rule == "no_commitment"
    reveal(book, 0, bid)
    assert book.award(NOW + 200) == [(BIDDERS[0].account, 20)]
    assert book.forfeits(NOW + 200) == {BIDDERS[1].account: 2}


@pytest.mark.parametrize("units", [19, 101, 0, -1, True])
def test_another_price_than_was_sealed_is_wrong_for_good(units: int) -> None:
    book, bid = auction(), Bid(20)
    commit(book, 0, bid)
    with pytest.raises(Refused):
        reveal(book, 0, replace(bid, units=units))
    with pytest.raises(Conflict):
        reveal(book, 0, bid)  # no second try
    assert book.award(NOW + 200) == []


def test_no_bid_without_a_bond_or_for_another_call() -> None:
    book, bid = auction(), Bid(20)
    message = commit_message(BIDDERS[0], POSTER.account, BOUNTY, bid, 1, NOW)
    with pytest.raises(Refused):
        book.commit(message, NOW, bonded=False)
    other = replace(BOUNTY, most=99)
    with pytest.raises(Invalid):
        book.commit(commit_message(BIDDERS[0], POSTER.account, other, bid, 1, NOW), NOW, bonded=True)
    commit(book, 0, bid)
    with pytest.raises(Conflict):
        commit(book, 0, Bid(10))
    with pytest.raises(Invalid):
        replace(BOUNTY, referee=POSTER.account)
    assert Bounty.from_dict(BOUNTY.to_dict()) == BOUNTY


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 120), st.booleans(), st.booleans()), max_size=4))
def test_poster_and_referee_come_to_one_award(drawn: list[tuple[int, bool, bool]]) -> None:
    """Whatever order the reveals come in; who reveals rightly loses nothing, all others forfeit."""
    books = [auction(), auction()]
    bids = [Bid(units) for units, _, _ in drawn]
    for number, bid in enumerate(bids):
        for book in books:
            commit(book, number, bid)
    for book, order in zip(books, (range(len(bids)), reversed(range(len(bids)))), strict=True):
        for number in order:
            _, opens, lies = drawn[number]
            bid = replace(bids[number], units=bids[number].units + 1) if lies else bids[number]
            if opens and (lies or bid.units > BOUNTY.most):
                with pytest.raises(Refused):
                    reveal(book, number, bid)
            elif opens:
                reveal(book, number, bid)
    assert books[0].award(NOW + 200) == books[1].award(NOW + 200)
    assert books[0].forfeits(NOW + 200) == books[1].forfeits(NOW + 200)
    awarded = {account for account, _ in books[0].award(NOW + 200)}
    assert awarded.isdisjoint(books[0].forfeits(NOW + 200))
    assert len(awarded) + len(books[0].forfeits(NOW + 200)) == len(bids)


@dataclass
class Bonded:
    """A bidder (the market's buyer) whose bond the poster (its seller) may claim before the referee (its evaluator)."""

    market: Market
    bounty: Bounty
    books: dict[Account, Auction]

    async def turn(self, times: int = 3) -> Phase:
        market, clock = self.market, self.market.clock
        services = {"bond": bond_service(self.books[PROVIDER.account], clock)}
        seller, buyer = await market.seller(services=services), await market.buyer()
        judges = {"bond": bond_judge(self.books[EVALUATOR.account], clock)}
        evaluator = Evaluator(
            EVALUATOR, await market.jobs(), market.desks[EVALUATOR.account], market.street, judges, clock=clock
        )
        order = bond_order(self.bounty, CLIENT.account, market.mandate.id)
        for _ in range(times):
            progress = await buyer.advance(order)
            await seller.step()
            await evaluator.step()
        return (await buyer.advance(order)).phase if times else progress.phase


async def bonded(folder: Path) -> Bonded:
    market = await open_market(folder)
    now = int(market.clock.time())
    bounty = Bounty(
        poster=PROVIDER.account, referee=EVALUATOR.account, title="Ten pictures", brief="ab" * 32,
        asset=market.mandate.asset, most=100, bond=10, commit_until=now + 100, reveal_until=now + 200,
        bond_until=now + 300,
    )  # fmt: skip
    return Bonded(market, bounty, {who: Auction(bounty, who) for who in (PROVIDER.account, EVALUATOR.account)})


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize(("reveals", "end"), [(True, Phase.REJECTED), (False, Phase.COMPLETED)])
async def test_the_bond_comes_back_to_who_reveals_and_pays_for_silence(
    tmp_path: Path, reveals: bool, end: Phase
) -> None:
    here, bid = await bonded(tmp_path), Bid(40)
    market = here.market
    assert await here.turn() is Phase.TRANSACTION  # locked
    jobs = await market.jobs()
    assert await bond_holds(jobs, here.bounty, CLIENT.account, 1)
    assert not await bond_holds(jobs, replace(here.bounty, bond=11), CLIENT.account, 1)
    assert not await bond_holds(jobs, here.bounty, PROVIDER.account, 1)
    for who, book in here.books.items():
        now = market.clock.time()
        book.commit(commit_message(CLIENT, who, here.bounty, bid, 1, now), now, bonded=True)
    market.clock.advance(110)
    if reveals:
        for who, book in here.books.items():
            book.reveal(reveal_message(CLIENT, who, here.bounty, bid, market.clock.time()), market.clock.time())
    market.clock.advance(100)
    assert await here.turn() is end
    assert await market.wallets() == ((0, 0, 0, 0) if reveals else (-10, 10, 0, 0))


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_poster_who_claims_the_bond_of_who_revealed_gets_nothing(tmp_path: Path) -> None:
    """The poster's book leaves the reveal out; the referee has his own."""
    here, bid = await bonded(tmp_path), Bid(40)
    market = here.market
    await here.turn()
    for who, book in here.books.items():
        now = market.clock.time()
        book.commit(commit_message(CLIENT, who, here.bounty, bid, 1, now), now, bonded=True)
    market.clock.advance(110)
    now = market.clock.time()
    here.books[EVALUATOR.account].reveal(reveal_message(CLIENT, EVALUATOR.account, here.bounty, bid, now), now)
    market.clock.advance(100)
    assert await here.turn() is Phase.REJECTED
    assert await market.wallets() == (0, 0, 0, 0)
