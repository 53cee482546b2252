"""The life of a model share: an epoch of sixteen holders, three changes of workers, income and its way out."""

from __future__ import annotations

from chain_support import CHAIN_ID, RUN_ID, WORKERS, make_world
from gas import HOLDERS
from tessera.chain.settle import NOBODY, change_digest, epoch_digest
from tessera.chain.types import Receipt
from tessera.core.merkle import MerkleTree, share_leaf


async def table(chain: RpcChain) -> dict[str, int]:
    world = await make_world(chain)
    coin, share, sender = world.coin, world.share, WORKERS[0]
    used: dict[str, int] = {}

    def note(name: str, receipt: Receipt) -> None:
        used[name] = receipt.gas_used

    await coin.mint(sender, sender.account, 10**12)
    await coin.transfer(sender, HOLDERS[0].account, 1_000)  # so that its claim is one of an account with coins
    leaves = {holder.account: 10**18 * (i + 1) for i, holder in enumerate(HOLDERS)}
    tree = MerkleTree([share_leaf(0, account, amount) for account, amount in leaves.items()])
    total = sum(leaves.values())
    digest = epoch_digest(CHAIN_ID, share.address, RUN_ID, 0, tree.root, total)
    signatures = [worker.sign_digest(digest) for worker in WORKERS[:3]]
    note("post", await share.post(sender, 0, tree.root, total, signatures))
    joiner, leaver, signers = HOLDERS[15].account, WORKERS[3].account, WORKERS[:3]
    for number, name, change in (
        (0, "change: one joins", (joiner, NOBODY)),
        (1, "change: one leaves", (NOBODY, joiner)),
        (2, "change: one for another", (joiner, leaver)),
    ):
        digest = change_digest(CHAIN_ID, share.address, RUN_ID, number, *change)
        present = WORKERS if number == 1 else signers
        note(name, await share.change(sender, number, *change, [worker.sign_digest(digest) for worker in present]))
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
