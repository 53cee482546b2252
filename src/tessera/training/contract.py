"""Before a worker works: is the share contract that the host names really ours, and for this run and these workers?"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.chain import artifact
from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.core.errors import Misbehaviour
from tessera.core.ids import Account, RunId

__all__ = ["check_share"]


async def check_share(
    chain: RpcChain, share: Account, coin: Account, run_id: RunId, accounts: Sequence[Account]
) -> None:
    """Raises `Misbehaviour` naming the first thing that is wrong. Cost: one request for each worker, and four."""
    code = await chain.code(share)
    if not code.startswith(artifact.load(ModelShare.ARTIFACT).runtime):
        raise Misbehaviour(f"{share} holds {len(code)} bytes of code that are not the share contract's")
    face = ModelShare(chain, share)
    found_run, found_coin = (await face.run_id()).hex(), await face.asset()
    if found_run != run_id:
        raise Misbehaviour(f"the share contract is for run {found_run[:16]}…, expected {run_id[:16]}…")
    if found_coin != coin:
        raise Misbehaviour(f"the share contract earns in {found_coin}, the host says {coin}")
    workers = [await face.workers(index) for index in range(await face.worker_count())]
    if workers != list(accounts):
        raise Misbehaviour("the share contract names other workers than the roster", evidence={"workers": workers})
