"""Are the contracts that a host names ours, for this run and its workers? Asked before a bond and before work."""

from __future__ import annotations

from tessera.chain import artifact
from tessera.chain.client import RpcChain
from tessera.chain.consent import NOBODY
from tessera.chain.face import Contract
from tessera.chain.faces import ModelShare, Run
from tessera.core.errors import Misbehaviour, Missing, Refused
from tessera.core.ids import Account
from tessera.training.manifest import Manifest
from tessera.training.payee import check_payee
from tessera.training.roster import Roster
from tessera.training.terms import terms_of

__all__ = ["check_changes", "check_contracts", "check_run"]


async def check_run(chain: RpcChain, manifest: Manifest, run: Account, asset: Account) -> None:
    """Raises `Misbehaviour` naming the first thing that is wrong: chain, code, run, asset, terms.  Cost: 5 requests."""
    found = await chain.chain_id()
    if found != manifest.chain_id:
        raise Misbehaviour(f"the host's chain has id {found}, the manifest says {manifest.chain_id}")
    face = Run(chain, run)
    await _check_code(chain, face)
    _check_names("run", (await face.run_id()).hex(), await face.asset(), manifest.run_id, asset)
    terms, expected = await face.terms(), terms_of(manifest)
    for name, value, due in zip(expected._fields, terms, expected, strict=True):
        if value != due:
            raise Misbehaviour(f"the run contract says {name} {value}, the manifest {due}", evidence=terms._asdict())


async def check_contracts(chain: RpcChain, manifest: Manifest, roster: Roster) -> None:
    """Raises `Misbehaviour` naming the first thing that is wrong. Cost: a request for each worker and change, and 15.

    The contract may be ahead of the roster: the host may be a moment behind.
    """
    await check_run(chain, manifest, roster.run, roster.coin)
    run, share = Run(chain, roster.run), ModelShare(chain, roster.share)
    await _check_code(chain, share)
    _check_names("share", (await share.run_id()).hex(), await share.asset(), manifest.run_id, roster.coin)
    issuer, issued = await share.issuer(), await run.share()
    if issuer != run.address or issued != share.address:
        raise Misbehaviour(f"the share contract is issued by {issuer}, and the run contract issues {issued}")
    await _check_members(run, roster)
    await check_payee(chain, manifest, roster.run, roster.coin)


async def _check_code(chain: RpcChain, face: Contract) -> None:
    code = await chain.code(face.address)
    if not code.startswith(artifact.load(face.ARTIFACT).runtime):
        raise Misbehaviour(
            f"{face.address} holds {len(code)} bytes of code that are not contracts/{face.ARTIFACT}.vy's"
        )


def _check_names(what: str, run_id: str, asset: Account, expected_run: str, expected_asset: Account) -> None:
    if run_id != expected_run:
        raise Misbehaviour(f"the {what} contract is for run {run_id[:16]}…, expected {expected_run[:16]}…")
    if asset != expected_asset:
        raise Misbehaviour(f"the {what} contract takes {asset}, the host says {expected_asset}")


async def _check_members(face: Run, roster: Roster) -> None:
    """Whoever worked when the roster's last change was made must be its workers, and whoever had left its past."""
    changes = [await face.changes(number) for number in range(await face.change_count())]
    if len(changes) < roster.changes:
        raise Misbehaviour(f"the roster shows {roster.changes} changes, the run contract {len(changes)}")
    workers = {await face.workers(index) for index in range(await face.worker_count())}
    for change in reversed(changes[roster.changes :]):
        workers = (workers - {change.joiner} | {change.leaver}) - {NOBODY}
    left = [change.leaver for change in changes[: roster.changes] if change.leaver != NOBODY]
    if workers != set(roster.accounts) or left != [seat.account for seat in roster.past]:
        evidence = {"workers": sorted(workers), "left": left}
        raise Misbehaviour("the run contract names other workers than the roster", evidence=evidence)


async def check_changes(face: Run, roster: Roster, before: Roster) -> None:
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
                expected = expected.without(leaver)
    except (Missing, Refused) as error:
        raise Misbehaviour(f"the run contract's changes do not fit the roster: {error.message}") from error
    if not roster.same_members(expected):
        raise Misbehaviour("the roster is not what the run contract's changes lead to", evidence=roster.to_value())
