"""What the index tells of a split is what the contract says."""

from __future__ import annotations

import pytest

from chain_support import WORKERS
from split_world import splitting_world
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.income_split import INCOME_SPLIT, SplitView

pytestmark = pytest.mark.anyio


async def test_tallies_claims_and_both_parts_add_up() -> None:
    world = await splitting_world()
    split, (first, second) = world.split, (WORKERS[0].account, WORKERS[1].account)
    await world.earn(10_001)
    struck = await world.propose({first: 3_000})
    await world.strike(struck, WORKERS)
    posted = await world.tally({first: 1_000, second: 2_000})
    await split.claim(WORKERS[1], *posted.claim(second))
    await world.earn(99)

    index = Indexer(None, world.world.chain, [INCOME_SPLIT.at(split.address)])
    await index.update()
    view = SplitView(index.queries)
    assert (view.divided().amount, view.passed().amount) == (await split.received(), await split.passed())
    assert list(view.tallies()) == [0]
    tally = view.tallies()[0]
    assert (tally.amount, tally.claimed, tally.strikes) == (3_000, await split.claimed(), 1)
    assert tally.root == "0x" + posted.tree.root.hex()
    assert {who: figure.amount for who, figure in view.claimed().items()} == {second: 2_000}
    assert [(claim.holder, claim.amount) for claim in view.claims()] == [(second, 2_000)]
    assert view.claims(first) == []
    index.close()
