"""A manifest whose payee is a split of income: its host names the run to it, workers look, and a worker claims."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chain_support import WORKERS, World, key, local_world
from split_world import SLOW, WORKERS_BPS, Splitting
from tessera.chain.faces import IncomeSplit
from tessera.core.errors import Misbehaviour
from tessera.devnet.served import INCOME, claim_served, serving_terms
from tessera.serving.income.book import IncomeBook
from tessera.serving.income.tally import Tally
from tessera.training.manifest import Manifest
from tessera.training.payee import begin_split, check_payee, split_of
from training_world import small_manifest

pytestmark = pytest.mark.anyio
MANIFEST = small_manifest()


def paying(payee: str, **changes: Any) -> Manifest:
    return Manifest.model_validate(MANIFEST.model_copy(update={"pay_to": payee, **changes}).model_dump())


@pytest.fixture
async def world() -> World:
    return await local_world(SLOW)


async def new_split(world: World) -> IncomeSplit:
    return await IncomeSplit.deploy(world.chain, WORKERS[0], world.coin.address, WORKERS_BPS)


async def test_the_host_names_the_run_to_its_split_once(world: World) -> None:
    split = await new_split(world)
    for _ in range(2):
        await begin_split(world.chain, paying(split.address), world.run.address, WORKERS[0])
    assert await split.run() == world.run.address
    await check_payee(world.chain, paying(split.address), world.run.address, world.coin.address)


async def test_a_share_and_a_strangers_account_are_no_split(world: World) -> None:
    for payee in ("share", key("somebody").account, world.share.address):
        assert await split_of(world.chain, paying(payee)) is None
        await begin_split(world.chain, paying(payee), world.run.address, WORKERS[0])
        await check_payee(world.chain, paying(payee), world.run.address, world.coin.address)


async def test_a_split_of_another_run_or_coin_is_seen_before_work(world: World) -> None:
    split = await new_split(world)
    with pytest.raises(Misbehaviour, match="splits the income of 0x0"):
        await check_payee(world.chain, paying(split.address), world.run.address, world.coin.address)
    await begin_split(world.chain, paying(split.address), world.run.address, WORKERS[0])
    for run, coin in ((world.share.address, world.coin.address), (world.run.address, world.share.address)):
        with pytest.raises(Misbehaviour, match="splits the income"):
            await check_payee(world.chain, paying(split.address), run, coin)


@dataclass
class Told:
    """As much of an open run as claiming asks for."""

    home: Any
    manifest: Manifest
    roster: Any
    chain: Any


@dataclass
class Home:
    account_key: Any
    path: Path

    def run_folder(self, run_id: str) -> Path:
        return self.path


@dataclass
class Roster:
    coin: str
    share: str


async def test_a_worker_claims_what_tallies_give_him_once(world: World, tmp_path: Path) -> None:
    split = await new_split(world)
    manifest = paying(split.address, price_units=10_000)
    await begin_split(world.chain, manifest, world.run.address, WORKERS[0])
    run: Any = Told(Home(WORKERS[1], tmp_path), manifest, Roster(world.coin.address, world.share.address), world.chain)
    assert await claim_served(run) == 0  # this directory has not served
    await world.coin.mint(WORKERS[0], split.address, 10_000)
    await split.distribute(WORKERS[0])
    tally = Tally(0, 100, tuple(sorted([(WORKERS[1].account, 700), (WORKERS[2].account, 300)])))
    s = Splitting(world, split)
    digest = s.consent.tally(0, 0, tally.root, tally.total)
    await split.propose(WORKERS[0], 0, tally.root, tally.total, [k.sign_digest(digest) for k in WORKERS])
    (proposed,) = await split.events(IncomeSplit.Proposed)
    await world.wait(SLOW.window_s)
    await split.post(WORKERS[0], 0, tally.root, tally.total, proposed.opens_at)
    terms = await serving_terms(world.chain, manifest, run.roster)
    assert terms is not None
    assert terms.pay_to == split.address
    book = IncomeBook(terms, tmp_path / INCOME)
    book.save_tally(0, tally.to_text())
    book.close()
    assert [await claim_served(run) for _ in range(2)] == [700, 0]


async def test_a_price_of_nothing_means_that_serving_is_open(world: World) -> None:
    roster: Any = Roster(world.coin.address, world.share.address)
    assert await serving_terms(world.chain, paying("share", price_units=0), roster) is None
    context = MANIFEST.model.model.context
    terms = await serving_terms(world.chain, paying("share", price_units=1), roster)
    assert terms is not None
    assert terms.cost_up(context) == 1  # a price too small for 1,000 tokens is for a whole context
