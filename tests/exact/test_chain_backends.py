"""One suite for every way to a chain: in this process, over HTTP, over bytes, and another implementation (anvil)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import anyio
import anyio.to_thread
import httpx
import pytest

from chain_support import CHAIN_ID, WORKERS, anvil, fund_on_anvil, key, make_world, memory_chain
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin, ModelShare
from tessera.chain.http import rpc_app
from tessera.chain.indexer.model_share import ShareView, share_index
from tessera.chain.rpc import BytesRpc, HttpRpc
from tessera.chain.settle import income_table
from tessera.core.errors import Conflict, Invalid, PaymentRequired
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
PEOPLE = [*WORKERS, key("holder"), key("other"), key("stranger")]


@pytest.fixture(scope="module")
def anvil_url() -> Iterator[str]:
    with anvil() as url:
        fund_on_anvil(url, [person.account for person in PEOPLE])
        yield url


@pytest.fixture(params=["process", "bytes", "http", "anvil"])
async def chain(request: pytest.FixtureRequest) -> AsyncIterator[RpcChain]:
    if request.param == "anvil":
        rpc = HttpRpc(request.getfixturevalue("anvil_url"))
        yield RpcChain(rpc)
        await rpc.aclose()
        return
    local = memory_chain()
    if request.param == "process":
        yield local.client()
    elif request.param == "bytes":

        async def exchange(body: bytes) -> bytes:
            return await anyio.to_thread.run_sync(local.handle, body)

        yield RpcChain(BytesRpc(exchange))
    else:
        rpc = HttpRpc("http://chain.test/")
        app, headers = httpx.ASGITransport(app=rpc_app(local)), {"content-type": "application/json"}
        rpc._http = httpx.AsyncClient(transport=app, headers=headers)  # the app, without a port
        yield RpcChain(rpc)
        await rpc.aclose()


async def test_a_whole_settlement_adds_up(chain: RpcChain) -> None:
    assert await chain.chain_id() == CHAIN_ID
    world = await make_world(chain)
    holder, other = key("holder").account, key("other").account
    await world.give({holder: 3, other: 4})
    await world.earn(1_000)
    await world.share.claim(key("holder"))
    await world.coin.mint(WORKERS[0], world.share.address, 5)
    table = await income_table(chain, world.share.address)
    assert (table.revenue, table.total_claimed, table.undistributed, table.dust) == (1_005, 428, 5, 1)
    assert table.total_claimed + table.unclaimed + table.undistributed + table.dust == table.revenue
    index = share_index(None, chain, world.share.address, world.coin.address)
    assert await index.update() == table.block_number
    told = ShareView(index.queries)
    assert {who: claimed.amount for who, claimed in told.claimed().items()} == table.claimed
    assert {who: balance.amount for who, balance in told.balances().items()} == table.shares
    assert told.revenue().amount == table.revenue
    index.close()


async def test_a_refusal_comes_as_the_error_that_says_what_to_do(chain: RpcChain) -> None:
    world = await make_world(chain)
    with pytest.raises(PaymentRequired) as caught:
        await world.coin.transfer(key("stranger"), key("other").account, 1)
    assert caught.value.fields["reason"] == "coin: transfer amount exceeds balance"
    with pytest.raises(Invalid, match="model_share: bad proof"):
        await world.share.redeem(WORKERS[0], 0, key("holder").account, 1, [])
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await world.run.post(WORKERS[0], 3, bytes(32), 1, 0)


async def test_many_sends_of_one_account_each_count_once(chain: RpcChain) -> None:
    coin = await Coin.deploy(chain, WORKERS[0])
    receiver = key("other").account

    async def mint(amount: int) -> None:
        await coin.mint(WORKERS[0], receiver, amount)

    async with anyio.create_task_group() as tasks:
        for i in range(8):
            tasks.start_soon(mint, 10**i)
    assert await coin.balanceOf(receiver) == 11_111_111
    assert len(await coin.events(Coin.Transfer)) == 8


async def test_two_clients_of_one_account_do_not_lose_sends(chain: RpcChain) -> None:
    """Two processes with the same key: each finds its nonce taken now and then, and tries the next."""
    coin = await Coin.deploy(chain, WORKERS[0])
    second = Coin(RpcChain(chain.rpc), coin.address)
    receiver = key("other").account
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(coin.mint, WORKERS[0], receiver, 1)
            tasks.start_soon(second.mint, WORKERS[0], receiver, 10)
    assert await coin.balanceOf(receiver) == 44


async def test_events_are_found_by_topic_and_range(chain: RpcChain) -> None:
    coin = await Coin.deploy(chain, WORKERS[0])
    first = await coin.mint(WORKERS[0], key("holder").account, 1)
    second = await coin.mint(WORKERS[0], key("other").account, 2)
    topic = bytes(12) + bytes.fromhex(key("other").account[2:])
    assert [e.value for e in await coin.events(Coin.Transfer, topics=[None, topic])] == [2]
    assert [e.value for e in await coin.events(Coin.Transfer, 0, first.block_number)] == [1]
    either = [Coin.Transfer.TOPIC, Coin.Approval.TOPIC]
    found = await chain.logs(None, [either], second.block_number)
    assert [(log.address, log.tx_hash) for log in found] == [(coin.address, second.tx_hash)]
    assert await chain.logs(coin.address, [], second.block_number + 1) == []


async def test_views_can_be_pinned_to_a_block(chain: RpcChain) -> None:
    coin = await Coin.deploy(chain, WORKERS[0])
    receiver = key("other").account
    first = await coin.mint(WORKERS[0], receiver, 1)
    await coin.mint(WORKERS[0], receiver, 1)
    assert await coin.at(first.block_number).balanceOf(receiver) == 1
    assert await coin.balanceOf(receiver) == 2


async def test_an_account_without_code_is_no_contract(chain: RpcChain) -> None:
    assert await chain.code(key("other").account) == b""
    with pytest.raises(Invalid, match="no coin stands there"):
        await Coin(chain, key("other").account).balanceOf(key("other").account)
    coin = await Coin.deploy(chain, WORKERS[0])
    assert len(await chain.code(coin.address)) > 1_000
    with pytest.raises(Invalid):
        await ModelShare(chain, coin.address).held()


async def test_the_networks_own_coin_pays_for_gas_where_gas_costs(chain: RpcChain) -> None:
    newcomer = AccountKey.generate()
    coin = await Coin.deploy(chain, WORKERS[0])
    if await chain.gas_price() > 0:
        await chain.fund(WORKERS[0], newcomer.account, 10**16)
        assert await chain.balance(newcomer.account) == 10**16
    await coin.mint(newcomer, newcomer.account, 5)
    assert await coin.balanceOf(newcomer.account) == 5


async def test_any_method_passes_through(chain: RpcChain) -> None:
    assert json.dumps(await chain.request("eth_accounts", [])).startswith("[")
    with pytest.raises(Invalid):
        await chain.request("eth_noSuchMethod", [])
