"""What the tests of `income_split` share: a run that has begun, and a split that its first worker made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chain_support import CHAIN_ID, RUN_ID, TERMS, WORKERS, World, ascending, local_world
from tessera.chain.consent import TallyConsent
from tessera.chain.face import decode_events
from tessera.chain.faces import IncomeSplit
from tessera.chain.types import Receipt
from tessera.core.ids import Account
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.core.signing import AccountKey

WORKERS_BPS = 3_000
WINDOW_S = 600
EVIDENCE = b"\x09" * 32
SLOW = TERMS._replace(window_s=WINDOW_S)


@dataclass(frozen=True)
class Tally:
    """A tally that waits. `fields` are what `post` and `strike` take."""

    fields: tuple[int, bytes, int, int]
    tree: MerkleTree
    leaves: Mapping[Account, int]
    receipt: Receipt

    def claim(self, worker: Account) -> tuple[int, Account, int, list[bytes]]:
        return self.fields[0], worker, self.leaves[worker], self.tree.proof(list(self.leaves).index(worker))


@dataclass(frozen=True)
class Splitting:
    """A world, and the split of its income."""

    world: World
    split: IncomeSplit

    @property
    def consent(self) -> TallyConsent:
        return TallyConsent(CHAIN_ID, self.split.address, RUN_ID)

    async def earn(self, amount: int) -> None:
        """Income arrives and is divided."""
        await self.world.coin.mint(WORKERS[0], self.split.address, amount)
        await self.split.distribute(WORKERS[0])

    async def propose(self, leaves: Mapping[Account, int], signers: Sequence[AccountKey] | None = None) -> Tally:
        """A tally with these leaves, signed by all workers."""
        number, attempt = await self.split.tally_count(), await self.split.attempt()
        tree = MerkleTree([share_leaf(number, account, amount) for account, amount in leaves.items()])
        amount = sum(leaves.values())
        digest = self.consent.tally(number, attempt, tree.root, amount)
        signatures = [k.sign_digest(digest) for k in ascending(self.world.workers if signers is None else signers)]
        receipt = await self.split.propose(WORKERS[0], number, tree.root, amount, signatures)
        (proposed,) = decode_events(IncomeSplit.Proposed, self.split.address, receipt)
        return Tally((number, tree.root, amount, proposed.opens_at), tree, leaves, receipt)

    async def tally(self, leaves: Mapping[Account, int]) -> Tally:
        """Proposed, waited for, and posted."""
        tally = await self.propose(leaves)
        if window_s := await self.split.window_s():
            await self.world.wait(window_s)
        await self.split.post(WORKERS[0], *tally.fields)
        return tally

    async def strike(self, tally: Tally, signers: Sequence[AccountKey], attempt: int = 0) -> Receipt:
        digest = self.consent.strike(tally.fields[0], attempt, EVIDENCE)
        signatures = [k.sign_digest(digest) for k in ascending(signers)]
        return await self.split.strike(WORKERS[0], *tally.fields, EVIDENCE, signatures)


async def make_split(world: World, workers_bps: int = WORKERS_BPS) -> Splitting:
    split = await IncomeSplit.deploy(world.chain, WORKERS[0], world.coin.address, workers_bps)
    await split.begin(WORKERS[0], world.run.address)
    return Splitting(world, split)


async def splitting_world() -> Splitting:
    return await make_split(await local_world(SLOW))
