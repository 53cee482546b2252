"""A worker and its neighbour agree to sign more than was done, or less against a third. Neither is believed."""

from dataclasses import replace
from pathlib import Path

import pytest

from tessera.core import encoding
from tessera.core.errors import Misbehaviour
from tessera.core.ids import Account
from tessera.p2p.memory import run_virtual
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.receipts import Receipt, credited
from training_run import Settlement, settle_all, settlement
from training_world import account_keys, all_receipts, peer_keys, small_manifest, work_of

MANIFEST = small_manifest(steps=3, epoch_steps=3)
KEYS = peer_keys()
BY_ID = {key.id: key for key in KEYS}
ACCOUNTS = [key.account for key in account_keys()]
FULL = MANIFEST.schedule.microbatches


def resigned(receipt: Receipt, *microbatches: int) -> Receipt:
    """The same neighbour's true signature under another set of microbatches."""
    return replace(receipt, microbatches=microbatches).signed_by(BY_ID[receipt.signer])


def leaves(microbatches: list[int]) -> EpochLeaves:
    return compute_epoch(MANIFEST, 0, work_of(ACCOUNTS, microbatches))


async def propose(world: Settlement, proposer: int, voter: int, receipts: list[Receipt], root: bytes) -> None:
    world.settlers[voter].keeper.serve()
    body = encoding.encode({"receipts": [receipt.to_row() for receipt in receipts], "verdicts": []})
    await world.ask(proposer, voter, {"op": "vote", "epoch": 0, "attempt": 0, "root": root.hex()}, body)


@pytest.mark.parametrize("more", [(FULL,), (1023,), tuple(range(FULL, 1024))])
def test_a_true_signature_for_microbatches_that_do_not_exist_is_evidence_against_both(
    more: tuple[int, ...], tmp_path: Path
) -> None:
    receipts = all_receipts(MANIFEST, KEYS, range(3))
    wrong = [resigned(r, *r.microbatches, *more) if r.worker == KEYS[1].id else r for r in receipts]

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            with pytest.raises(Misbehaviour, match=f"for microbatch {more[-1]}, a step has {FULL}") as caught:
                await propose(world, 1, 3, wrong, leaves([3 * FULL, 3 * FULL + 3 * len(more), 3 * FULL, 3 * FULL]).root)
            assert caught.value.evidence[1] == KEYS[1].id

    run_virtual(main)


def test_a_victims_receipts_cannot_be_replaced_by_smaller_ones(tmp_path: Path) -> None:
    """Both neighbours of stage 1 turn against it and feed the proposer receipts for less."""

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=lambda i, r: i == 1 or r.worker != KEYS[1].id) as world:
            smaller = [resigned(r, 1) for r in all_receipts(MANIFEST, KEYS, range(3)) if r.worker == KEYS[1].id]
            for liar in (0, 2):
                world.settlers[liar].book.add(r for r in smaller if r.signer == KEYS[liar].id)
            await settle_all(world.settlers[1:])
            assert (await world.share.epochs(0)).root == leaves([3 * FULL] * 4).root

    run_virtual(main)


def test_a_root_with_inflated_shares_gets_no_vote_from_anybody(tmp_path: Path) -> None:
    receipts = all_receipts(MANIFEST, KEYS, range(3))
    mine = ACCOUNTS[1]
    honest = leaves([3 * FULL] * 4)
    inflated = EpochLeaves(0, tuple((a, s * 2 if a == mine else s) for a, s in honest.leaves))
    stranger = EpochLeaves(0, (*honest.leaves, (Account("0x" + "ff" * 20), 1)))

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            for voter in (0, 2, 3):
                for wrong in (inflated, stranger):
                    with pytest.raises(Misbehaviour, match="these receipts and verdicts give root"):
                        await propose(world, 1, voter, receipts, wrong.root)

    run_virtual(main)


def test_a_proposer_that_inflates_its_own_book_is_passed_over(tmp_path: Path) -> None:
    """Stage 0 is the first proposer. Its proposals get no votes, and the next worker's turn settles the epoch."""

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=lambda stage, receipt: stage != 0) as world:
            inflated = [resigned(r, *range(50)) for r in all_receipts(MANIFEST, KEYS, range(3))]
            world.settlers[0].book.add(r for r in inflated if r.worker == KEYS[0].id)
            await settle_all(world.settlers)
            assert (await world.share.epochs(0)).root == leaves([3 * FULL] * 4).root

    run_virtual(main)


def test_a_microbatch_that_two_say_they_did_is_paid_to_one() -> None:
    """Two workers of a stage and their common neighbours sign the same work for both."""
    keys = peer_keys(4)
    stage_of = {keys[0].id: 0, keys[1].id: 1, keys[2].id: 1, keys[3].id: 2}
    whole = tuple(range(FULL))
    signed = [
        Receipt(MANIFEST.run_id, 0, worker.id, signer.id, direction, whole, bytes(32)).signed_by(signer)
        for worker in keys[1:3]
        for direction, signer in (("forward", keys[3]), ("backward", keys[0]))
    ]
    credit = credited(signed, stage_of, 3, range(1), FULL)
    assert credit == {min(keys[1].id, keys[2].id): frozenset((0, index) for index in whole)}
