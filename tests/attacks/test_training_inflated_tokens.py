"""A worker and its neighbour agree to sign more than was done, or less against a third. Neither is believed."""

from dataclasses import replace
from pathlib import Path

import pytest

from tessera.core import encoding
from tessera.core.errors import Misbehaviour
from tessera.core.ids import Account
from tessera.p2p.memory import run_virtual
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.receipts import Receipt
from training_run import Settlement, settle_all, settlement
from training_world import account_keys, all_receipts, peer_keys, small_manifest

MANIFEST = small_manifest(steps=3, epoch_steps=3)
KEYS = peer_keys()
BY_ID = {key.id: key for key in KEYS}
ACCOUNTS = [key.account for key in account_keys()]
FULL = MANIFEST.tokens_per_step


def resigned(receipt: Receipt, tokens: int) -> Receipt:
    """The same neighbour's true signature under another number."""
    return replace(receipt, tokens=tokens).signed_by(BY_ID[receipt.signer])


def leaves(tokens: list[int]) -> EpochLeaves:
    computed = compute_epoch(MANIFEST, 0, ACCOUNTS, tokens)
    assert computed is not None
    return computed


async def propose(world: Settlement, proposer: int, voter: int, receipts: list[Receipt], root: bytes) -> None:
    world.settlers[voter].keeper.serve()
    body = encoding.encode([receipt.to_row() for receipt in receipts])
    await world.ask(proposer, voter, {"op": "vote", "epoch": 0, "root": root.hex()}, body)


@pytest.mark.parametrize("tokens", [1000 * FULL, FULL + 1, FULL - 1, 1])
def test_a_neighbours_true_signature_under_a_wrong_number_is_evidence_against_both(tokens: int, tmp_path: Path) -> None:
    receipts = all_receipts(MANIFEST, KEYS, range(3))
    wrong = [resigned(r, tokens) if r.worker == KEYS[1].id else r for r in receipts]

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path) as world:
            with pytest.raises(Misbehaviour, match=f"a receipt for {tokens} tokens, a step has {FULL}") as caught:
                await propose(world, 1, 3, wrong, leaves([3 * FULL, 3 * tokens, 3 * FULL, 3 * FULL]).root)
            assert caught.value.evidence[4] == tokens

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
                    with pytest.raises(Misbehaviour, match="these receipts give root"):
                        await propose(world, 1, voter, receipts, wrong.root)

    run_virtual(main)


def test_a_proposer_that_inflates_its_own_book_is_passed_over(tmp_path: Path) -> None:
    """Stage 0 is the first proposer. Its proposals get no votes, and the next worker's turn settles the epoch."""

    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=lambda stage, receipt: stage != 0) as world:
            inflated = [resigned(r, 50 * FULL) for r in all_receipts(MANIFEST, KEYS, range(3))]
            world.settlers[0].book.add(r for r in inflated if r.worker == KEYS[0].id)
            await settle_all(world.settlers)
            assert (await world.share.epochs(0)).root == leaves([3 * FULL] * 4).root

    run_virtual(main)
