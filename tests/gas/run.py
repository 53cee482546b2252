"""The life of a run: stakes, the consent of 3, 6 and 12 workers to an epoch, changes and disputes.

The epoch is a later one (there has been income), of 4,096 leaves: what a proposal and its posting cost does not depend
on how many there are, what `redeem` costs grows with the depth of their tree, here 12.
"""

from __future__ import annotations

from chain_support import TERMS, WORKERS, World, ascending, make_world, peer_of, split
from gas import HOLDERS
from tessera.chain.types import Chain, Receipt
from tessera.core.hashing import keccak
from tessera.core.ids import Account, account_from_bytes

LEAVES = 4_096
WINDOW_S = 600
EVIDENCE, SUBJECT = b"\x09" * 32, b"\x0a" * 32
Receipts = dict[str, Receipt]


async def table(chain: Chain) -> dict[str, int]:
    receipts: Receipts = {}
    for size in (3, 6, 12):
        terms = TERMS._replace(most=12, window_s=WINDOW_S)
        world = await make_world(chain, terms=terms, founders=[*WORKERS, *HOLDERS][:size])
        receipts |= await an_epoch(world)
    receipts |= await comings_and_goings(world)
    receipts |= await disputes(world)
    return {name: receipt.gas_used for name, receipt in receipts.items()}


async def an_epoch(world: World) -> Receipts:
    """The second of a run: consent, posting, and for three workers what follows."""
    sender, holder, signers = WORKERS[0], HOLDERS[15], len(world.workers)
    await world.give({sender.account: 10**18})
    await world.earn(10**9 + 7)
    leaves: dict[Account, int] = {holder.account: 10**18}
    for i in range(1, LEAVES):
        leaves[account_from_bytes(keccak(i.to_bytes(2, "big"))[12:])] = 10**18 + i
    proposal = await world.propose(leaves)
    await world.wait(WINDOW_S)
    posted = await world.run.post(sender, *proposal.fields)
    receipts = {f"propose, {signers} signers": proposal.receipt, f"post, {signers} signers": posted}
    if signers == 3:
        await world.coin.mint(sender, holder.account, 1_000)  # so that its claim is one of an account with coins
        await world.coin.mint(sender, world.share.address, 10**9)
        receipts["distribute"] = await world.share.distribute(sender)
        proof = proposal.tree.proof(0)
        receipts[f"redeem at depth {len(proof)}"] = await world.share.redeem(sender, 1, holder.account, 10**18, proof)
        receipts["claim"] = await world.share.claim(holder)
    return receipts


async def comings_and_goings(world: World) -> Receipts:
    """In a run of twelve, of whom all sign."""
    sender, joiner, leaver, run = WORKERS[0], HOLDERS[12], world.workers[5], world.run
    await world.coin.mint(sender, joiner.account, TERMS.stake)
    v, r, s = split(await world.authorization(joiner, peer_of(joiner), TERMS.stake))
    receipts = {"bond": await run.bond(sender, joiner.account, peer_of(joiner), 0, 2**40, v, r, s)}
    await run.draw(sender, joiner.account)  # its gas depends on whether the block's hash draws an empty stage
    receipts["change: one joins, 12 signers"] = await world.change(joiner=joiner.account)
    world.workers.append(joiner)
    receipts["leave"] = await run.leave(leaver)
    receipts["change: one leaves, 13 signers"] = await world.change(leaver=leaver.account)
    world.workers.remove(leaver)
    await world.wait(TERMS.delay_s)
    receipts["withdraw"] = await run.withdraw(sender, leaver.account)
    (began,) = await run.events(run.Began)
    begun = await world.chain.receipt(began.log.tx_hash)
    assert begun is not None
    receipts["begin, 12 founders"] = begun
    return receipts


async def disputes(world: World) -> Receipts:
    """In a run of twelve: a third strikes, nine of eleven others slash, two receipts contradict each other."""
    sender, consent, run = WORKERS[0], await world.consent(), world.run
    cheat, liar = world.workers[6:8]
    bad = await world.propose({sender.account: 10**18})
    digest = consent.strike(bad.epoch, 0, EVIDENCE)
    signatures = [worker.sign_digest(digest) for worker in ascending(world.workers[:4])]
    receipts = {"strike, 4 signers": await run.strike(sender, *bad.fields, EVIDENCE, signatures)}
    digest = consent.slash(cheat.account, EVIDENCE, sender.account)
    signatures = [worker.sign_digest(digest) for worker in ascending(set(world.workers[:10]) - {cheat})]
    receipts["slash, 9 signers"] = await run.slash(sender, cheat.account, EVIDENCE, sender.account, signatures)
    one, other = (liar.sign_digest(consent.receipt(SUBJECT, content)) for content in (SUBJECT, EVIDENCE))
    receipts["contradict"] = await run.contradict(sender, liar.account, SUBJECT, SUBJECT, one, EVIDENCE, other)
    return receipts
