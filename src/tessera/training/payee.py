"""Who is paid by a run's buyers, when that is a split of income: is it ours, and does it know its run?

A manifest names the split, and the split's creator names the run to it, once that has begun.
"""

from __future__ import annotations

from tessera.chain import artifact
from tessera.chain.client import RpcChain
from tessera.chain.consent import NOBODY
from tessera.chain.faces import IncomeSplit
from tessera.core.errors import Misbehaviour
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.training.manifest import Manifest

__all__ = ["begin_split", "check_payee", "split_of"]


async def split_of(chain: RpcChain, manifest: Manifest) -> IncomeSplit | None:
    """The manifest's payee, if it is a split of income with our code.  Cost: one request."""
    if manifest.pay_to == "share":
        return None
    face = IncomeSplit(chain, manifest.pay_to)
    ours = (await chain.code(face.address)).startswith(artifact.load(face.ARTIFACT).runtime)
    return face if ours else None


async def begin_split(chain: RpcChain, manifest: Manifest, run: Account, creator: AccountKey) -> None:
    """Name the run, which has begun, to the split that `creator` made for it. Nothing where that was done."""
    split = await split_of(chain, manifest)
    if split is not None and await split.run() == NOBODY:
        await split.begin(creator, run)


async def check_payee(chain: RpcChain, manifest: Manifest, run: Account, asset: Account) -> None:
    """Raises `Misbehaviour` for a split that pays another run's workers, or in another coin."""
    split = await split_of(chain, manifest)
    if split is None:
        return
    named = await split.run()
    if named != run or await split.asset() != asset:
        raise Misbehaviour(f"the payee {split.address} splits the income of {named}, expected {run}, in {asset}")
