"""The life of a model share: an epoch of sixteen holders, income and its way out. How an epoch comes is in `run`."""

from __future__ import annotations

from chain_support import WORKERS, make_world
from gas import HOLDERS
from tessera.chain.types import Receipt


async def table(chain: RpcChain) -> dict[str, int]:
    world = await make_world(chain)
    coin, share, sender = world.coin, world.share, WORKERS[0]
    used: dict[str, int] = {}

    def note(name: str, receipt: Receipt) -> None:
        used[name] = receipt.gas_used

    await coin.mint(sender, sender.account, 10**12)
    await coin.transfer(sender, HOLDERS[0].account, 1_000)  # so that its claim is one of an account with coins
    leaves = {holder.account: 10**18 * (i + 1) for i, holder in enumerate(HOLDERS)}
    tree = await world.epoch(leaves)
    note("transfer of income", await coin.transfer(sender, share.address, 10**9 + 7))
    note("distribute", await share.distribute(sender))
    for index in (0, 1):
        holder = HOLDERS[index].account
        note(f"redeem {index}", await share.redeem(sender, 0, holder, leaves[holder], tree.proof(index)))
    note("claim", await share.claim(HOLDERS[0]))
    note("claim of nothing", await share.claim(HOLDERS[0]))
    note("transfer of shares", await share.transfer(HOLDERS[1], HOLDERS[0].account, 10**17))
    await coin.transfer(sender, share.address, 5_000)
    note("second distribute", await share.distribute(sender))
    note("claim for another", await share.claim(sender, HOLDERS[1].account))
    return used
