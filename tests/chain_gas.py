"""One transaction of each kind that settlement makes, and the gas that its receipt shows."""

from __future__ import annotations

from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, RUN_ID, WORKERS, World, key, make_world
from tessera.chain import artifact
from tessera.chain.settle import NOBODY, change_digest, epoch_digest
from tessera.chain.types import Chain, Receipt
from tessera.core.merkle import MerkleTree, share_leaf

HOLDERS = [key(f"holder {i}") for i in range(16)]


async def gas_table(chain: Chain) -> dict[str, int]:
    """One transaction of each kind that settlement makes, by accounts that are the same everywhere."""
    world = await make_world(chain)
    coin, share, sender = world.coin, world.share, WORKERS[0]
    used: dict[str, int] = {}

    def note(name: str, receipt: Receipt) -> None:
        used[name] = receipt.gas_used

    leaves = {holder.account: 10**18 * (i + 1) for i, holder in enumerate(HOLDERS)}
    tree = MerkleTree([share_leaf(0, account, amount) for account, amount in leaves.items()])
    total = sum(leaves.values())
    digest = epoch_digest(CHAIN_ID, share.address, RUN_ID, 0, tree.root, total)
    signatures = [worker.sign_digest(digest) for worker in WORKERS[:3]]
    note("mint", await coin.mint(sender, sender.account, 10**12))
    note("transfer to a new account", await coin.transfer(sender, HOLDERS[0].account, 1_000))
    note("transfer to a known account", await coin.transfer(sender, HOLDERS[0].account, 1_000))
    note("approve", await coin.approve(sender, HOLDERS[0].account, 500))
    note("transferFrom", await coin.transferFrom(HOLDERS[0], sender.account, HOLDERS[0].account, 500))
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
    note(
        "second distribute",
        (await world.coin.transfer(sender, share.address, 5_000), await share.distribute(sender))[1],
    )
    note("claim for another", await share.claim(sender, HOLDERS[1].account))
    note("payment by signature", await pay_by_signature(world))
    note("approve back to zero", await coin.approve(sender, HOLDERS[0].account, 0))
    note("deployment of the coin", await chain.send(sender, None, artifact.load("coin").init_code()))
    note("plain call to an account", await chain.send(sender, HOLDERS[5].account, b"\x01\x00" * 40))
    return used


async def pay_by_signature(world: World) -> Receipt:
    names = ["from", "to", "value", "validAfter", "validBefore", "nonce"]
    kinds = ["address", "address", "uint256", "uint256", "uint256", "bytes32"]
    values = (WORKERS[0].account, world.share.address, 77, 1, 2**40, b"\x33" * 32)
    domain = {"name": "Test USD", "version": "2", "chainId": CHAIN_ID, "verifyingContract": world.coin.address}
    fields = [{"name": name, "type": kind} for name, kind in zip(names, kinds, strict=True)]
    message = dict(zip(names, values, strict=True))
    signable = encode_typed_data(domain, {"TransferWithAuthorization": fields}, message)
    signature = bytes(EthAccount.sign_message(signable, WORKERS[0].secret).signature)
    vrs = (signature[64], signature[:32], signature[32:64])
    return await world.coin.transferWithAuthorization(HOLDERS[3], *values, *vrs)
