"""A gateway's purse: what pays for a session, and what comes back of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chain_support import NOW, key
from gate_world import BUYER, TERMS, bought, session
from tessera.core.clock import FakeClock
from tessera.serving.income.purchases import FakePurchases
from tessera.serving.income.purse import Purse
from tessera.serving.income.vouchers import Payer

pytestmark = pytest.mark.anyio
HOUSE, CREDITOR = key("house"), Payer(BUYER.account)


def purse(where: Path | str = ":memory:") -> Purse:
    return Purse(TERMS, HOUSE, FakeClock(NOW), where=where)


def test_a_request_that_pays_for_itself_shows_its_own_payment() -> None:
    own = bought(number=7)
    assert purse().take(Payer("anybody", own), session(1), 10**6) == own


def test_credit_pays_for_its_buyer_until_it_is_used_up() -> None:
    mine = purse()
    credit = bought(1_000)  # 100 tokens
    mine.add(credit)
    mine.add(credit)  # told again
    assert mine.take(CREDITOR, session(1), 60) == credit
    assert mine.take(CREDITOR, session(2), 60).payer == HOUSE.account
    assert mine.take(Payer(key("other").account), session(3), 1).payer == HOUSE.account
    mine.give_back(session(1), 25)
    assert mine.take(CREDITOR, session(4), 75) == credit
    assert mine.take(CREDITOR, session(5), 1).payer == HOUSE.account


def test_a_session_that_brought_nothing_keeps_what_it_drew_as_workers_count_it() -> None:
    mine = purse()
    mine.add(bought(1_000))
    mine.take(CREDITOR, session(1), 60)
    assert mine.take(CREDITOR, session(2), 60).payer == HOUSE.account


def test_a_restart_draws_nothing_twice(tmp_path: Path) -> None:
    first = purse(tmp_path / "purse.sqlite")
    first.add(bought(1_000))
    first.take(CREDITOR, session(1), 60)
    first.close()
    second = purse(tmp_path / "purse.sqlite")
    second.add(bought(1_000))
    assert second.take(CREDITOR, session(2), 60).payer == HOUSE.account
    assert second.take(CREDITOR, session(3), 40).payer == BUYER.account


async def test_the_house_pays_for_what_was_delivered_and_for_nothing_else() -> None:
    mine, chain = purse(), FakePurchases()
    served, refused = (mine.take(Payer("key 1"), session(number), 50) for number in (1, 2))
    served.check(TERMS)
    assert (served.payer, served.value) == (HOUSE.account, TERMS.cost_up(50))
    mine.give_back(session(1), 50)
    mine.give_back(session(1), 50)
    await mine.settle(chain)
    assert chain.on_chain == {served.name}
    assert refused.name not in chain.on_chain


async def test_what_the_house_cannot_pay_now_is_tried_again() -> None:
    mine, chain = purse(), FakePurchases(frozenset({HOUSE.account}))
    mine.take(Payer("key 1"), session(1), 50)
    mine.give_back(session(1), 50)
    await mine.settle(chain)
    chain.poor = frozenset()
    await mine.settle(chain)
    assert len(chain.on_chain) == 1
