"""Before a worker works: is the share contract that the host names really ours, and for this run and these workers?"""

from __future__ import annotations

from tessera.chain import artifact
from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.chain.settle import NOBODY
from tessera.core.errors import Misbehaviour, Missing, Refused
from tessera.training.roster import Roster

__all__ = ["check_changes", "check_share"]


async def check_share(chain: RpcChain, roster: Roster) -> None:
    """Raises `Misbehaviour` naming the first thing that is wrong. Cost: a request for each worker and change, and five.

    The contract may be ahead of the roster: the host may be a moment behind.
    """
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
    await _check_members(face, roster)


async def _check_members(face: ModelShare, roster: Roster) -> None:
    """Whoever worked when the roster's last change was made must be its workers, and whoever had left its past."""
    changes = [await face.changes(number) for number in range(await face.change_count())]
    if len(changes) < roster.changes:
        raise Misbehaviour(f"the roster shows {roster.changes} changes, the share contract {len(changes)}")
    workers = {await face.workers(index) for index in range(await face.worker_count())}
    for change in reversed(changes[roster.changes :]):
        workers = (workers - {change.joiner} | {change.leaver}) - {NOBODY}
    left = [change.leaver for change in changes[: roster.changes] if change.leaver != NOBODY]
    if workers != set(roster.accounts) or left != [seat.account for seat in roster.past]:
        evidence = {"workers": sorted(workers), "left": left}
        raise Misbehaviour("the share contract names other workers than the roster", evidence=evidence)


async def check_changes(face: ModelShare, roster: Roster, before: Roster) -> None:
    """Raises `Misbehaviour` unless `roster` is what the contract's changes have made of `before`, to the order.

    Cost: one request for each change.
    """
    if not before.changes <= roster.changes <= await face.change_count():
        raise Misbehaviour(f"the roster shows {roster.changes} changes, after {before.changes}: the contract does not")
    seats, expected = {seat.account: seat for seat in roster.everyone}, before
    try:
        for number in range(before.changes, roster.changes):
            joiner, leaver = await face.changes(number)
            if joiner != NOBODY:
                if joiner not in seats:
                    raise Misbehaviour(f"the roster lacks {joiner}, who was admitted by change {number}")
                expected = expected.admit(seats[joiner])
            if leaver != NOBODY:
                expected = expected.dismiss(leaver)
    except (Missing, Refused) as error:
        raise Misbehaviour(f"the share contract's changes do not fit the roster: {error.message}") from error
    if not roster.same_members(expected):
        raise Misbehaviour("the roster is not what the share contract's changes lead to", evidence=roster.to_value())
