"""The indexer on real chains that take blocks back: LocalChain's evm_revert, anvil's revert and anvil's reorg."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator

import pytest

from chain_support import WORKERS, World, anvil, fund_on_anvil, key, local_world, make_world
from index_world import contents
from tessera.chain.client import RpcChain
from tessera.chain.indexer.engine import Config, Indexer
from tessera.chain.indexer.model_share import ShareView, share_index
from tessera.chain.rpc import HttpRpc

pytestmark = pytest.mark.anyio
CONFIG = Config(window_blocks=8, chunk_blocks=5, behind_s=0)
BUYER = key("buyer")


@pytest.fixture(scope="module")
def anvil_url() -> Iterator[str]:
    with anvil() as url:
        fund_on_anvil(url, [person.account for person in [*WORKERS, BUYER, key("holder")]])
        yield url


@pytest.fixture(params=["local", "anvil"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    if request.param == "local":
        yield await local_world()
        return
    rpc = HttpRpc(request.getfixturevalue("anvil_url"))
    yield await make_world(RpcChain(rpc))
    await rpc.aclose()


def index_of(world: World) -> Indexer:
    return share_index(None, world.chain, world.share.address, world.coin.address, config=CONFIG)


async def fresh(world: World) -> tuple[list[object], list[object]]:
    index = index_of(world)
    await index.update()
    told = contents(index)
    index.close()
    return told


async def ask(world: World, method: str, *params: object) -> object:
    assert isinstance(world.chain, RpcChain)
    return await world.chain.request(method, list(params))


async def act(world: World, rng: random.Random, times: int) -> None:
    """Payments and claims of one moment."""
    for _ in range(times):
        if rng.random() < 0.7:
            await world.coin.mint(WORKERS[0], world.share.address, rng.randrange(1, 1_000))
        else:
            await world.share.distribute(WORKERS[0])


@pytest.mark.parametrize("seed", range(2))
async def test_after_reverts_the_tables_are_those_of_a_fresh_index(world: World, seed: int) -> None:
    rng = random.Random(seed)
    await world.give({key("holder").account: 3})
    index = index_of(world)
    for _ in range(3):
        snapshot = await ask(world, "evm_snapshot")
        await act(world, rng, rng.randrange(1, 14))
        await index.update()
        assert contents(index) == await fresh(world)
        assert await ask(world, "evm_revert", snapshot)
        if rng.random() < 0.7:
            await act(world, rng, rng.randrange(1, 14))
        await index.update()
        assert contents(index) == await fresh(world)
    index.close()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 4, 12])
async def test_anvils_reorg_is_followed(anvil_url: str, depth: int) -> None:
    """Within the window of eight blocks, and beyond it."""
    rpc = HttpRpc(anvil_url)
    world = await make_world(RpcChain(rpc))
    await act(world, random.Random(depth), 14)
    index = index_of(world)
    await index.update()
    before = ShareView(index.queries).revenue()
    reached = await world.chain.header()
    await ask(world, "anvil_reorg", depth, [])
    now = await world.chain.header()
    assert reached is not None
    assert now is not None
    assert (now.number, now.hash != reached.hash) == (reached.number, True)
    await world.coin.mint(WORKERS[0], world.share.address, 5)
    await index.update()
    told = ShareView(index.queries)
    assert contents(index) == await fresh(world)
    assert told.revenue().amount == await world.coin.balanceOf(world.share.address)
    assert told.revenue().tx_hash != before.tx_hash
    index.close()
    await rpc.aclose()
