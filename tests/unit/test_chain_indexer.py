"""The indexer: facts that lead to their transactions, totals that agree with the chain, and going on after a stop."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from chain_support import WORKERS, World, key, local_world, make_world
from tessera.chain.indexer import ShareIndex, _store, share_facts
from tessera.chain.settle import income_table
from tessera.chain.types import Log
from tessera.core.errors import Invalid
from tessera.core.ids import Account

pytestmark = pytest.mark.anyio
HOLDER, OTHER = key("holder").account, key("other").account


@pytest.fixture
async def world() -> World:
    world = await local_world()
    await world.give({HOLDER: 3, OTHER: 1})
    await world.coin.mint(WORKERS[0], key("buyer").account, 1_000)
    await world.coin.transfer(key("buyer"), world.share.address, 400)
    await world.share.distribute(WORKERS[0])
    await world.share.claim(key("holder"))
    await world.share.transfer(key("holder"), key("third").account, 2)
    await world.epoch({OTHER: 6})
    return world


def index_of(world: World, where: Path | str | None = None, **options: int) -> ShareIndex:
    return ShareIndex(where, world.chain, world.share.address, world.coin.address, **options)


async def test_totals_agree_with_the_chain(world: World, database_url: str) -> None:
    index = index_of(world, database_url)
    assert await index.update() == await world.chain.block_number()
    table = await income_table(world.chain, world.share.address)
    assert index.by_account("claimed") == table.claimed == {HOLDER: 300}
    assert index.by_account("paid") == table.payers == {key("buyer").account: 400}
    assert index.balances() == table.shares
    assert index.by_account("redeemed") == {HOLDER: 3, OTHER: 1}
    assert index.posted() == {0: 4, 1: 6}
    assert (index.total("paid"), index.total("distributed")) == (400, 400)
    index.close()


async def test_each_fact_names_its_transaction(world: World, database_url: str) -> None:
    index = index_of(world, database_url)
    await index.update()
    (claim,) = index.facts("claimed", HOLDER)
    receipt = await world.chain.receipt(claim.tx_hash)  # type: ignore[attr-defined]
    assert (receipt.block_number, claim.amount) == (claim.block, 300)
    newest = index.facts(limit=1)
    assert [fact.kind for fact in newest] == ["posted"]
    assert len(index.facts(limit=2)) == 2
    assert [fact.kind for fact in index.facts(account=HOLDER)] == ["sent", "claimed", "redeemed"]
    assert index.count("redeemed") == 2
    index.close()


async def test_an_index_goes_on_where_it_stopped_and_counts_nothing_twice(world: World, database_url: str) -> None:
    index = index_of(world, database_url)
    await index.update()
    before = len(index.facts())
    index.close()
    await world.earn(60)
    index = index_of(world, database_url)
    await index.update()
    await index.update()
    assert len(index.facts()) == before + 2
    assert index.total("distributed") == 460
    index.close()


async def test_blocks_that_may_still_be_taken_back_are_not_read(world: World) -> None:
    index = index_of(world, confirmations=2)
    head = await world.chain.block_number()
    assert await index.update() == head - 2
    assert index.posted() == {0: 4}


async def test_a_half_stored_chunk_is_not_stored_at_all(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(world, database_url)

    def stop(part: int, fact: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tessera.chain.indexer._row", stop)  # totals are written, facts not yet
        with pytest.raises(KeyboardInterrupt):
            await index.update()
    assert (index.last_block, index.facts(), index.total("paid")) == (-1, [], 0)
    await index.update()
    assert index.total("paid") == 400
    index.close()


async def test_two_readers_of_one_database_do_not_count_twice(world: World, database_url: str) -> None:
    first, second = index_of(world, database_url), index_of(world, database_url)
    await first.update()
    assert await second.update() == first.last_block
    again = first.facts()
    second._db.apply(partial(_store, facts=again, first=0, last=first.last_block))  # read while the first one stored
    assert (second.total("paid"), second.facts()) == (400, again)
    first.close()
    second.close()


async def test_a_database_of_another_contract_is_refused(world: World, database_url: str) -> None:
    index_of(world, database_url).close()
    other = await make_world(world.chain)
    with pytest.raises(Invalid, match="indexes another share"):
        ShareIndex(database_url, world.chain, other.share.address, world.coin.address)
    apart = ShareIndex(database_url, world.chain, other.share.address, world.coin.address, schema="other")
    apart.close()


async def test_a_damaged_file_says_that_it_can_be_deleted(world: World, tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(b"no database, but some text" * 99)
    with pytest.raises(Invalid, match="delete it, it is built again"):
        index_of(world, path)


async def test_an_event_that_is_not_what_its_topic_says_is_refused() -> None:
    from tessera.chain.faces import ModelShare

    log = Log(Account("0x" + "11" * 20), (ModelShare.Claimed.TOPIC,), b"", 1, 0, "0x" + "00" * 32)
    with pytest.raises(Invalid, match="no Claimed"):
        share_facts(log)
