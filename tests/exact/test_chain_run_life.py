"""The whole life of a run gives everybody the same to the last unit on three back ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from chain_support import TERMS, WORKERS, World, anvil, ascending, fund_on_anvil, key, make_world, memory_chain
from tessera.chain.client import RpcChain
from tessera.chain.http import rpc_app
from tessera.chain.rpc import HttpRpc
from tessera.chain.settle import income_table
from tessera.core.errors import Conflict, Refused

pytestmark = pytest.mark.anyio
CREW = [*WORKERS, key("worker 4"), key("worker 5")]
FIRST, SECOND, QUITTER, LIAR, CHEAT, LEAVER = CREW
JOINER, STRANGER, BUYER = key("joiner"), key("stranger"), key("buyer")
PEOPLE = [*CREW, JOINER, STRANGER, BUYER]
EVIDENCE, SUBJECT, ONE, OTHER = (bytes([i]) * 32 for i in range(1, 5))
TERMS_OF_LIFE = TERMS._replace(most=4, window_s=600, epochs=5, epoch_shares=100)


async def live(world: World) -> None:
    """Two epochs, one struck; income; a join and a leave, a slash, a contradiction, an exit; everything taken out."""
    run, share, consent = world.run, world.share, await world.consent()
    bad = await world.propose({LIAR.account: 200})
    digest = consent.strike(0, 0, EVIDENCE)
    await run.strike(STRANGER, *bad.fields, EVIDENCE, [k.sign_digest(digest) for k in ascending([FIRST, SECOND])])
    first = await world.epoch({FIRST.account: 100, SECOND.account: 60, CHEAT.account: 40})
    await pay(world, 1_001)
    await world.candidate(JOINER)
    await world.change(joiner=JOINER.account, leaver=LEAVER.account)
    world.workers = [JOINER if worker is LEAVER else worker for worker in world.workers]
    digest = consent.slash(CHEAT.account, EVIDENCE, JOINER.account)
    others = ascending(worker for worker in world.workers if worker is not CHEAT)
    await run.slash(STRANGER, CHEAT.account, EVIDENCE, JOINER.account, [k.sign_digest(digest) for k in others])
    one, other = (LIAR.sign_digest(consent.receipt(SUBJECT, content)) for content in (ONE, OTHER))
    await run.contradict(STRANGER, LIAR.account, SUBJECT, ONE, one, OTHER, other)
    world.workers = [worker for worker in world.workers if worker not in (CHEAT, LIAR)]
    await share.distribute(STRANGER)
    await run.leave(QUITTER)
    second = await world.epoch({FIRST.account: 10, SECOND.account: 70, JOINER.account: 95})
    await pay(world, 777)
    await world.wait(TERMS_OF_LIFE.delay_s)
    await run.exit(QUITTER)
    await run.withdraw(STRANGER, LEAVER.account)
    with pytest.raises(Refused, match="bond is still at risk"):
        await run.withdraw(STRANGER, QUITTER.account)
    await world.wait(TERMS_OF_LIFE.delay_s)
    await run.withdraw(STRANGER, QUITTER.account)
    for epoch, tree, leaves in (
        (0, first, [(FIRST, 100), (SECOND, 60), (CHEAT, 40)]), (1, second, [(FIRST, 10), (SECOND, 70), (JOINER, 95)]),
    ):  # fmt: skip
        for place, (holder, amount) in enumerate(leaves):
            await share.redeem(STRANGER, epoch, holder.account, amount, tree.proof(place))
    for holder in (FIRST, SECOND, JOINER, CHEAT):
        await share.claim(STRANGER, holder.account)
    with pytest.raises(Conflict, match="not the waiting proposal"):
        await run.post(STRANGER, *bad.fields)


async def pay(world: World, amount: int) -> None:
    await world.coin.mint(BUYER, BUYER.account, amount)
    await world.coin.transfer(BUYER, world.share.address, amount)
    await world.share.distribute(STRANGER)


async def balances(world: World) -> dict[str, tuple[int, int]]:
    """Money and shares by who holds them."""
    names = ["first", "second", "quitter", "liar", "cheat", "leaver", "joiner", "stranger", "buyer"]
    accounts = dict(zip(names, [person.account for person in PEOPLE], strict=True))
    accounts |= {"the run": world.run.address, "the share": world.share.address}
    return {
        name: (await world.coin.balanceOf(account), await world.share.balanceOf(account))
        for name, account in accounts.items()
    }


@asynccontextmanager
async def back_end(kind: str) -> AsyncIterator[RpcChain]:
    if kind == "process":
        yield memory_chain().client()
    elif kind == "json-rpc":
        rpc = HttpRpc("http://chain.test/")
        rpc._http = httpx.AsyncClient(transport=httpx.ASGITransport(app=rpc_app(memory_chain())))  # without a port
        yield RpcChain(rpc)
        await rpc.aclose()
    else:
        with anvil() as url:
            fund_on_anvil(url, [person.account for person in PEOPLE])
            rpc = HttpRpc(url)
            yield RpcChain(rpc)
            await rpc.aclose()


# Bonds: 1,000 each, a slashed one pays 100 to who proved it and 900 to the shares. The first income, 1,001, and both
# slashed bonds go over 200 shares: 2,801 * 100/200, 60/200, 40/200. Then 777 over 375: 110, 130, 95 and 40 of them.
EXPECTED = {
    "first": (1_628, 110),  # 1,400.5 + 227.9
    "second": (1_109, 130),  # 840.3 + 269.4
    "quitter": (1_000, 0),
    "liar": (0, 0),
    "cheat": (643, 40),  # 560.2 + 82.9: what was posted before he cheated stays his; his bond does not come back
    "leaver": (1_000, 0),
    "joiner": (100 + 196, 95),
    "stranger": (100, 0),
    "buyer": (0, 0),
    "the run": (3_000, 0),  # of who is still there: first, second, joiner
    "the share": (2, 0),
}


@pytest.mark.parametrize("kind", ["process", "json-rpc", "anvil"])
async def test_a_runs_whole_life_gives_everybody_the_same(kind: str) -> None:
    async with back_end(kind) as chain:
        world = await make_world(chain, terms=TERMS_OF_LIFE, founders=CREW)
        await live(world)
        found = await balances(world)
        assert sum(money for money, _ in found.values()) == await world.coin.totalSupply() == 7_000 + 1_778
        assert await world.run.bonded() == 3_000
        table = await income_table(chain, world.share.address)
        assert (table.revenue, table.undistributed, table.unclaimed + table.dust) == (1_778 + 1_800, 0, 2)
        assert sum(await served(world)) == 3
    assert found == EXPECTED


async def served(world: World) -> list[int]:
    return [await world.run.served(stage) for stage in range(TERMS_OF_LIFE.stages)]
