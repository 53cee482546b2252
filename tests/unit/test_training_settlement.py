"""How an epoch becomes shares through the run's contract: window, strikes, empty epochs, early weight, lost bonds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tessera.chain.consent import NOBODY, Consent
from tessera.chain.faces import Coin, Run
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused
from tessera.core.signing import PeerKey
from tessera.p2p.memory import run_virtual
from tessera.training.audit import Outcome, Verdict, bond_lost, draw
from tessera.training.bond import Status
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.manifest import Manifest, Settlement
from tessera.training.terms import terms_of, weight_bps
from training_run import OPERATOR, Ledger, settle_all, settlement
from training_run import Settlement as World
from training_world import account_keys, all_receipts, peer_keys, small_manifest, work_of

WINDOW_S = 60
WATCHED = small_manifest(steps=6, epoch_steps=3, settlement=Settlement(window_s=WINDOW_S, delay_s=3600))
ACCOUNTS = [key.account for key in account_keys()]


def leaves_of(manifest: Manifest, epoch: int, factor: int = 1) -> EpochLeaves:
    whole = factor * 3 * manifest.schedule.microbatches
    return compute_epoch(manifest, epoch, work_of(ACCOUNTS, [whole] * 4))


async def propose(world: World, leaves: EpochLeaves, signers: int = 4) -> None:
    """As workers who conspire would."""
    digest = Consent(world.manifest.chain_id, world.run.address, world.manifest.run_id).epoch(
        leaves.epoch, 0, leaves.root, leaves.total
    )
    keys = sorted(account_keys()[:signers], key=lambda key: int(key.account, 16))
    signatures = [key.sign_digest(digest) for key in keys]
    await world.run.propose(OPERATOR, leaves.epoch, leaves.root, leaves.total, signatures)


# --- the challenge window ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_proposal_waits_out_its_window_and_then_somebody_posts_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(WATCHED, tmp_path) as world, anyio.create_task_group() as tasks:
            tasks.start_soon(settle_all, world.settlers)
            await anyio.sleep(WINDOW_S - 10)
            assert (await world.share.epoch_count(), await world.run.pending() != bytes(32)) == (0, True)
            await anyio.sleep(30)
            assert (await world.share.epochs(0)).root == leaves_of(WATCHED, 0).root
            await anyio.sleep(2 * WINDOW_S)
            assert await world.share.epoch_count() == 2

    run_virtual(main)


@pytest.mark.slow
def test_a_proposal_whose_proposer_died_is_seen_through_by_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(WATCHED, tmp_path) as world, anyio.create_task_group() as tasks:
            await propose(world, leaves_of(WATCHED, 0), 3)  # and nobody has it in his book
            tasks.start_soon(settle_all, world.settlers[1:])
            await anyio.sleep(WINDOW_S + 30)
            assert await world.share.epoch_count() == 1
            assert await world.run.attempt() == 0
            tasks.cancel_scope.cancel()

    run_virtual(main)


def test_a_wrong_proposal_is_struck_and_the_right_one_is_posted(tmp_path: Path) -> None:
    """Signed by all, as by keys that were stolen: they earn nothing by it."""

    async def main() -> None:
        async with settlement(WATCHED, tmp_path) as world:
            less = compute_epoch(WATCHED, 0, work_of(ACCOUNTS, [9, 1, 1, 1]))
            await propose(world, less)
            await settle_all(world.settlers)
            assert [(await world.share.epochs(e)).root for e in range(2)] == [
                leaves_of(WATCHED, e).root for e in range(2)
            ]
            (struck,) = await world.run.events(Run.Struck)
            assert (struck.epoch, struck.attempt, await world.run.attempt()) == (0, 0, 1)

    run_virtual(main)


def test_nobody_strikes_what_he_computes_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(WATCHED, tmp_path) as world:
            world.settlers[1].keeper.serve()
            rows = [r.to_row() for r in all_receipts(WATCHED, peer_keys(), range(3))]
            body = encoding.encode({"receipts": rows, "verdicts": []})
            request = {"op": "strike", "epoch": 0, "attempt": 0, "root": leaves_of(WATCHED, 0).root.hex()}
            with pytest.raises(Conflict, match="does not wait with root"):
                await world.ask(0, 1, request, body)
            await propose(world, leaves_of(WATCHED, 0))
            with pytest.raises(Refused, match="the root that we compute too"):
                await world.ask(0, 1, request, body)
            with pytest.raises(Conflict, match="0 proposals were struck, not 1"):
                await world.ask(0, 1, {**request, "attempt": 1}, body)
            forged = encoding.encode({"receipts": [[*rows[0][:-1], "00" * 64]], "verdicts": []})
            with pytest.raises(Misbehaviour):
                await world.ask(0, 1, request, forged)

    run_virtual(main)


@pytest.mark.slow
def test_an_epoch_without_verified_work_is_proposed_empty_and_stops_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(WATCHED, tmp_path, held=lambda stage, receipt: receipt.step >= 3) as world:
            await settle_all(world.settlers)
            empty = await world.share.epochs(0)
            assert (empty.root, empty.unredeemed) == (bytes(32), 0)
            assert (await world.share.epochs(1)).root == leaves_of(WATCHED, 1).root

    run_virtual(main)


# --- early weight -----------------------------------------------------------------------------------------------------


def test_early_work_counts_more_and_no_epoch_exceeds_the_cap() -> None:
    """The contract's own cap, for every epoch of a run with all of its work verified."""
    manifest = small_manifest(steps=21, epoch_steps=4, settlement=Settlement(early_bps=30_007))
    whole = 4 * manifest.schedule.microbatches

    async def main() -> None:
        ledger = Ledger(manifest)
        run = await ledger.deploy_run(await ledger.coin())
        assert await run.terms() == terms_of(manifest)
        totals = [compute_epoch(manifest, e, work_of(ACCOUNTS, [whole] * 4)).total for e in range(6)]
        caps = [await run.cap(epoch) for epoch in range(7)]
        assert [weight_bps(manifest, epoch) for epoch in range(6)] == [30_007, 26_005, 22_004, 18_002, 14_001, 10_000]
        assert caps[6] == 0
        for total, cap in zip(totals, caps[:6], strict=True):
            assert cap - 1_000 < total <= cap  # shares have 10^18 units

    run_virtual(main)


def test_more_work_than_the_contract_can_take_is_named() -> None:
    manifest = small_manifest(steps=10**9, epoch_steps=3)
    huge = manifest.schedule.model_copy(update={"epoch_steps": 10**9, "sequences": 1024, "microbatches": 1024})
    huge_model = manifest.model.model_copy(
        update={"model": manifest.model.model.model_copy(update={"width": 2**20, "ffn": 2**22})}
    )
    with pytest.raises(Invalid, match="lower epoch_steps"):
        terms_of(manifest.model_copy(update={"schedule": huge, "model": huge_model}))


# --- bonds ------------------------------------------------------------------------------------------------------------

STAKED = small_manifest(
    steps=3, epoch_steps=3, settlement=Settlement(stake_units=1_000, window_s=5, delay_s=60, reward_bps=2_500)
)
ACCUSED, *AUDITORS = (peer_keys(6)[i] for i in (0, 4, 5))  # all of stage 0


def verdict(by: PeerKey, index: int = 2, outcome: Outcome = "failed", about: PeerKey = ACCUSED) -> Verdict:
    lot = draw(by, STAKED.run_id, 1, about.id, index)
    return Verdict(lot, outcome, "code: 8.2 steps from the replay", bytes(32)).signed_by(by)


def test_who_failed_an_audit_loses_his_bond_to_the_auditor_and_to_the_shares(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(STAKED, tmp_path, companions=2) as world:
            for i, auditor in ((4, AUDITORS[0]), (5, AUDITORS[1])):
                world.settlers[i].book.add_verdicts([verdict(auditor)])
                world.settlers[i].book.add_verdicts([verdict(AUDITORS[5 - i])])  # as the flood brings it
            await settle_all(world.settlers)
            accused = ACCOUNTS[0]
            assert (await world.run.members(accused)).status == Status.SLASHED
            assert not await world.run.is_worker(accused)
            assert await world.run.changes(0) == (NOBODY, accused)
            challenger = min(zip((key.id for key in AUDITORS), account_keys(6)[4:], strict=True))[1].account
            coin = Coin(world.ledger.chain, await world.run.asset())
            assert await coin.balanceOf(challenger) == 250
            assert await coin.balanceOf(world.share.address) == 750
            assert await coin.balanceOf(world.run.address) == await world.run.bonded() == 5_000
            assert await world.share.balanceOf(accused) == 0  # and the epoch's credit

    run_virtual(main)


def test_one_auditors_word_costs_the_credit_and_not_the_bond(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(STAKED, tmp_path, companions=1) as world:
            world.settlers[4].book.add_verdicts([verdict(AUDITORS[0])])
            await settle_all(world.settlers)
            assert (await world.run.members(ACCOUNTS[0])).status == Status.WORKER
            assert await world.share.balanceOf(ACCOUNTS[0]) == 0

    run_virtual(main)


def test_nobody_signs_for_a_bond_that_is_not_lost(tmp_path: Path) -> None:
    first, second = verdict(AUDITORS[0]), verdict(AUDITORS[1])
    wrong = {
        "one word": [first],
        "two places": [first, verdict(AUDITORS[1], 1)],
        "withheld": [first, verdict(AUDITORS[1], outcome="withheld")],
        "twice the same": [first, first],
        "about another": [first, second, verdict(AUDITORS[1], about=AUDITORS[0])],
        "nothing": [],
    }

    async def main() -> None:
        async with settlement(STAKED, tmp_path, companions=2) as world:
            world.settlers[1].keeper.serve()
            request = {"op": "slash", "epoch": 0, "worker": ACCUSED.id}

            async def ask(verdicts: list[Verdict]) -> bytes:
                body = encoding.encode([v.to_row() for v in verdicts])
                return bytes.fromhex((await world.ask(0, 1, request, body))[0]["signature"])

            for verdicts in wrong.values():
                with pytest.raises(Refused, match="cost nobody his bond"):
                    await ask(verdicts)
            with pytest.raises(Misbehaviour, match="forged"):
                await ask([first, replace(second, reason="because")])
            in_order = sorted((first, second), key=lambda v: v.draw.auditor)
            assert len(await ask(in_order)) == 65
            with pytest.raises(Refused):
                await ask(in_order[::-1])  # one evidence, one order

    run_virtual(main)


def test_a_bond_takes_more_than_half_of_the_auditors_at_one_place() -> None:
    auditors = {ACCUSED.id: [key.id for key in peer_keys(9)[4:9]]}
    words = [verdict(key) for key in peer_keys(9)[4:9]]
    assert bond_lost(words[:2], auditors) == {}
    assert set(bond_lost(words[:3], auditors)) == {ACCUSED.id}
    lost = bond_lost([*words, *(verdict(key, 0) for key in peer_keys(9)[4:7])], auditors)[ACCUSED.id]
    assert {v.draw.index for v in lost} == {0}  # the first place
    assert [v.draw.auditor for v in lost] == sorted(key.id for key in peer_keys(9)[4:7])
