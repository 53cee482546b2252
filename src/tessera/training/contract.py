"""Before a worker works: is the share contract that the host names really ours, and for this run and these workers?"""

from __future__ import annotations

from tessera.chain import artifact
from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.core.errors import Misbehaviour
from tessera.training.roster import Roster

__all__ = ["check_handovers", "check_share"]


async def check_share(chain: RpcChain, roster: Roster) -> None:
    """Raises `Misbehaviour` naming the first thing that is wrong. Cost: one request for each worker, and five."""
    share, run_id = roster.share, roster.run_id
    code = await chain.code(share)
    if not code.startswith(artifact.load(ModelShare.ARTIFACT).runtime):
        raise Misbehaviour(f"{share} holds {len(code)} bytes of code that are not the share contract's")
    face = ModelShare(chain, share)
    found_run, found_coin = (await face.run_id()).hex(), await face.asset()
    if found_run != run_id:
        raise Misbehaviour(f"the share contract is for run {found_run[:16]}…, expected {run_id[:16]}…")
    if found_coin != roster.coin:
        raise Misbehaviour(f"the share contract earns in {found_coin}, the host says {roster.coin}")
    await check_handovers(face, roster)
    workers = [await face.workers(index) for index in range(await face.worker_count())]
    if workers != roster.accounts:
        raise Misbehaviour("the share contract names other workers than the roster", evidence={"workers": workers})


async def check_handovers(face: ModelShare, roster: Roster, known: int = 0) -> None:
    """Raises `Misbehaviour` unless the roster's past, from number `known` on, is what the workers signed on chain.

    A handover that the roster does not show yet is no fault: the host may be a moment behind. Cost: one request each.
    """
    if await face.handover_count() < len(roster.past):
        raise Misbehaviour(f"the roster shows {len(roster.past)} handovers, the share contract fewer")
    for number, past in enumerate(roster.past[known:], start=known):
        stage, leaver, from_step = await face.handovers(number)
        if (stage, leaver, from_step) != (past.seat.stage, past.seat.account, past.until_step):
            raise Misbehaviour(
                f"handover {number} was of stage {stage} by {leaver} at step {from_step}; the roster says otherwise",
                evidence=past.to_value(),
            )
