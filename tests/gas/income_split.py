"""The life of a split of income: its division, a tally of 128 workers that 3 of 4 sign, and a claim."""

from __future__ import annotations

from chain_support import WORKERS, make_world
from gas import HOLDERS
from split_world import SLOW, WINDOW_S, make_split
from tessera.chain.types import Chain
from tessera.core.hashing import keccak
from tessera.core.ids import account_from_bytes

LEAVES = 128


async def table(chain: Chain) -> dict[str, int]:
    world = await make_world(chain, terms=SLOW)
    s = await make_split(world)
    coin, split, sender, worker = world.coin, s.split, WORKERS[0], HOLDERS[0].account
    await coin.mint(sender, sender.account, 10**12)
    await coin.mint(sender, worker, 1_000)  # so that its claim is one of an account with coins
    used = {}
    for name in ("first distribute", "distribute"):
        await coin.transfer(sender, split.address, 10**9 + 7)
        used[name] = (await split.distribute(sender)).gas_used
    leaves = {worker: 10**5}
    for i in range(1, LEAVES):
        leaves[account_from_bytes(keccak(i.to_bytes(2, "big"))[12:])] = 10**5 + i
    await s.tally({worker: 10**5})
    tally = await s.propose(leaves, world.workers[:3])
    used["propose, 3 signers"] = tally.receipt.gas_used
    await world.wait(WINDOW_S)
    used["post"] = (await split.post(sender, *tally.fields)).gas_used
    used["claim at depth 7"] = (await split.claim(sender, *tally.claim(worker))).gas_used
    return used
