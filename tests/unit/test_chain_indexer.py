"""The indexer on a share contract: figures that lead to their transactions and agree with the chain, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chain_support import WORKERS, World, key, local_world, make_world
from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.chain.indexer import tables
from tessera.chain.indexer.engine import Config, Indexer
from tessera.chain.indexer.facts import Reducer
from tessera.chain.indexer.model_share import MODEL_SHARE, ShareView, share_index
from tessera.chain.indexer.queries import Figure
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


def index_of(world: World, where: Path | str | None = None, **options: Any) -> Indexer:
    return share_index(where, world.chain, world.share.address, world.coin.address, **options)


def amounts(figures: dict[Account, Figure]) -> dict[Account, int]:
    return {account: figure.amount for account, figure in figures.items()}


async def test_figures_agree_with_the_chain(world: World, database_url: str) -> None:
    index = index_of(world, database_url)
    assert await index.update() == await world.chain.block_number()
    table, told = await income_table(world.chain, world.share.address), ShareView(index.queries)
    assert amounts(told.claimed()) == table.claimed == {HOLDER: 300}
    assert amounts(told.payments.by_payer()) == table.payers == {key("buyer").account: 400}
    assert amounts(told.balances()) == table.shares
    assert amounts(told.redeemed()) == {HOLDER: 3, OTHER: 1}
    assert {epoch: (p.shares, p.redeemed) for epoch, p in told.postings().items()} == {
        0: (4, 4),
        1: (6, 0),
    }
    assert (told.revenue().amount, told.distributed().amount) == (400, 400)
    assert told.payments.paid_to(world.share.address) == told.revenue()
    index.close()


async def test_every_figure_names_the_transaction_that_proves_it(world: World, database_url: str) -> None:
    assert isinstance(world.chain, RpcChain)
    index = index_of(world, database_url)
    await index.update()
    told = ShareView(index.queries)
    (claim,) = told.claims(HOLDER)
    receipt = await world.chain.receipt(claim.tx_hash)
    assert receipt is not None
    assert (receipt.block_number, claim.amount) == (claim.block, 300)
    (payment,) = told.payments.payments(payee=world.share.address)
    assert (told.revenue().count, told.revenue().tx_hash) == (1, payment.tx_hash)
    moved = told.balances()[HOLDER]
    transfer = await world.chain.receipt(moved.tx_hash)
    assert transfer is not None
    assert ModelShare.Transfer.decode(transfer.logs[0]).receiver == key("third").account
    assert (await world.share.epochs(1)).root.hex() == told.postings()[1].root[2:]
    index.close()


async def test_facts_come_newest_first_and_page_by_page(world: World, database_url: str) -> None:
    index = index_of(world, database_url)
    await index.update()
    facts = index.queries.facts()
    assert [fact.kind for fact in index.queries.facts(account=HOLDER)] == ["sent", "claimed", "redeemed"]
    assert [fact.place for fact in facts] == sorted((fact.place for fact in facts), reverse=True)
    pages = index.queries.facts(limit=2)
    while page := index.queries.facts(limit=2, before=pages[-1]):
        pages += page
    assert pages == facts
    assert index.queries.histories("model_share", ["0", "7"]) == {
        "0": [fact for fact in reversed(facts) if fact.item == "0"],
        "7": [],
    }
    index.close()


async def test_an_index_goes_on_where_it_stopped_and_counts_nothing_twice(world: World, database_url: str) -> None:
    index = index_of(world, database_url)
    await index.update()
    before = len(index.queries.facts())
    index.close()
    await world.earn(60)
    index = index_of(world, database_url)
    await index.update()
    await index.update()
    assert len(index.queries.facts()) == before + 2
    assert ShareView(index.queries).distributed().amount == 460
    index.close()


async def test_blocks_that_may_still_be_taken_back_are_not_read(world: World) -> None:
    index = index_of(world, config=Config(confirmations=2))
    head = await world.chain.block_number()
    assert await index.update() == head - 2
    assert list(ShareView(index.queries).postings()) == [0]
    index.close()


async def test_a_half_stored_chunk_is_not_stored_at_all(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(world, database_url)

    def stop(fact: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_row", stop)  # totals are written, facts not yet
        with pytest.raises(RuntimeError):
            await index.update()
    assert (index.last_block, index.queries.facts(), ShareView(index.queries).revenue().amount) == (-1, [], 0)
    await index.update()
    assert ShareView(index.queries).revenue().amount == 400
    index.close()


async def test_two_readers_of_one_database_do_not_count_twice(world: World, database_url: str) -> None:
    first, second = index_of(world, database_url), index_of(world, database_url)
    seen = second.queries.mark()
    await first.update()
    facts = first.queries.facts()
    late = second._db.apply(lambda db: tables.extend(db, seen, [(0, "0x00")], facts))  # read while the first one stored
    assert late is False
    assert await second.update() == first.last_block
    assert (ShareView(second.queries).revenue().amount, second.queries.facts()) == (400, facts)
    first.close()
    second.close()


async def test_a_database_of_another_contract_is_refused(world: World, database_url: str) -> None:
    index_of(world, database_url).close()
    other = await make_world(world.chain)
    with pytest.raises(Invalid, match="indexes another model_share"):
        share_index(database_url, world.chain, other.share.address, world.coin.address)
    apart = share_index(database_url, world.chain, other.share.address, world.coin.address, schema="other")
    apart.close()


async def test_a_database_of_another_network_is_refused(world: World, database_url: str) -> None:
    index = index_of(world, database_url)
    await index.update()
    index._db.apply(lambda db: tables._set(db, chain_id="8453"))
    index.close()
    index = index_of(world, database_url)
    with pytest.raises(Invalid, match="indexes the network 8453"):
        await index.update()
    index.close()


async def test_another_version_of_a_reducer_reads_everything_again(world: World, database_url: str) -> None:
    first = Indexer(database_url, world.chain, [MODEL_SHARE.at(world.share.address)])
    await first.update()
    first.close()
    fewer = {ModelShare.Claimed: MODEL_SHARE.says[ModelShare.Claimed]}
    second = Indexer(database_url, world.chain, [Reducer("model_share", fewer, version=2).at(world.share.address)])
    assert second.last_block == -1
    await second.update()
    assert [fact.kind for fact in second.queries.facts()] == ["claimed"]
    second.close()


async def test_a_damaged_file_says_that_it_can_be_deleted(world: World, tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(b"no database, but some text" * 99)
    with pytest.raises(Invalid, match="delete it, it is built again"):
        index_of(world, path)


async def test_an_event_that_is_not_what_its_topic_says_is_refused() -> None:
    where = Account("0x" + "11" * 20)
    log = Log(where, (ModelShare.Claimed.TOPIC,), b"", 1, 0, "0x" + "00" * 32, "0x" + "00" * 32, None)
    with pytest.raises(Invalid, match="no Claimed"):
        MODEL_SHARE.at(where).facts(log, 0)


@pytest.mark.parametrize("wrong", [{"window_blocks": 0}, {"confirmations": -1}, {"chunk_blocks": 0}, {"behind_s": -1}])
def test_a_setting_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(Invalid, match="at least"):
        Config(**wrong)
