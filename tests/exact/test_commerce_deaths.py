"""A party of a job dies at every step, before or after the act, and comes back or never does: one payout or one refund.

Each life runs on a LocalChain with real books on disk. A death throws a process away in the middle of an act; what it
had written, signed or sent stays. Whatever happened, once the time is over the budget has gone one way, whole.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from commerce_world import GRACE, LIFE_S, PRICE, Crash, Fuse, Market, close_books, open_market  # noqa: F401
from tessera.agents.commerce.buyer import Order
from tessera.agents.commerce.evaluator import Evaluator
from tessera.agents.commerce.seller import Seller

pytestmark = pytest.mark.anyio
ROLES = ("buyer", "seller", "evaluator")
MOST_ACTS = 16
ENDS = {
    "buyer": {"paid", "never funded"},
    "seller": {"paid", "refunded", "never funded"},
    "evaluator": {"paid"},  # his silence is paid for
}


async def _turn(market: Market, role: str, order: Order, fuse: Fuse | None) -> bool:
    """One step of one process. False when it died in it."""
    try:
        if role == "buyer":
            await (await market.buyer(fuse)).advance(order)
        else:
            make = market.seller if role == "seller" else market.evaluator
            party: Seller | Evaluator = await make(fuse)
            await party.step()
    except Crash:
        return False
    return True


async def _live(market: Market, order: Order, victim: str, fuse: Fuse, returns: bool, rounds: int = 5) -> None:
    """Everybody takes turns; the victim dies once, and is made anew or stays away."""
    alive = set(ROLES)
    for _ in range(rounds):
        for role in ROLES:
            if role in alive and not await _turn(market, role, order, fuse if role == victim else None) and not returns:
                alive.discard(role)
                if role == "seller":
                    market.street.away.add(order.provider)
    for wait in (LIFE_S, GRACE, 0):  # the time is over: anybody who lives closes the job
        market.clock.advance(wait)
        for role in sorted(alive):
            await _turn(market, role, order, None)


async def _check(market: Market, order: Order, returns: bool, victim: str) -> str:
    """Once, whole, and nothing left. Returns: what it was."""
    client, provider, evaluator, held = await market.wallets()
    assert (evaluator, held) == (0, 0)
    assert client == -provider
    assert provider in (0, PRICE)
    listed = await (await market.jobs()).listed()
    outcomes = [await (await market.jobs()).outcome(job.id) for job in listed]
    ends = [outcome for outcome in outcomes if outcome is not None and outcome.paid + outcome.refunded]
    assert len(ends) <= 1  # one intent funds one job
    for end in ends:
        assert sorted((end.paid, end.refunded)) == [0, PRICE]
    if returns or victim != "buyer":  # the books say what the chain says
        entry = market.ledger.find(order.intent)
        assert (entry is not None and entry.state == "consumed") == bool(ends)
    return "paid" if provider else "refunded" if ends else "never funded"


async def acts_of(market: Market, victim: str) -> list[str]:
    """What a party does in a life without deaths."""
    fuse, order = Fuse(), market.order("undisturbed")
    await _live(market, order, victim, fuse, returns=True)
    assert await _check(market, order, True, victim) == "paid"
    return fuse.names


# After the n-th act is before the next one, so that only the first needs a death before it.
CASES = [(0, False, True), (0, False, False), *itertools.product(range(MOST_ACTS), (True,), (True, False))]


async def _die(folder: Path, victim: str, cases: list[tuple[int, bool, bool]]) -> set[str]:
    names = await acts_of(await open_market(folder / "undisturbed"), victim)
    assert len(names) < MOST_ACTS
    seen = set()
    for at, after, returns in cases:
        if at < len(names):
            where = folder / f"{at}-{after}-{returns}"
            market = await open_market(where)
            order, fuse = market.order(f"{at}"), Fuse(at, after)
            await _live(market, order, victim, fuse, returns)
            assert fuse.at == -1, "the victim did not die"
            seen.add(await _check(market, order, returns, victim))
    return seen


@pytest.mark.parametrize(("victim", "end"), [("buyer", "paid")])
async def test_one_death_and_the_money_goes_one_way(victim: str, end: str, tmp_path: Path) -> None:
    returns = victim == "buyer"
    market = await open_market(tmp_path)
    order, fuse = market.order(), Fuse(6 if victim == "buyer" else 2, True)
    await _live(market, order, victim, fuse, returns)
    assert fuse.at == -1
    assert await _check(market, order, returns, victim) == end


@pytest.mark.slow
@pytest.mark.parametrize("victim", ROLES)
async def test_whoever_dies_at_any_step_the_money_goes_one_way(victim: str, tmp_path: Path) -> None:
    assert await _die(tmp_path, victim, CASES) == ENDS[victim]
