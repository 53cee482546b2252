"""A worker shows receipts that nobody gave it. It is paid for what its neighbours really signed, and no more."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tessera.core import encoding
from tessera.core.errors import Misbehaviour
from tessera.core.ids import RunId
from tessera.p2p.memory import run_virtual
from tessera.training.epochs import compute_epoch
from tessera.training.receipts import Receipt
from training_run import Settlement, settle_all, settlement
from training_world import account_keys, all_receipts, peer_keys, small_manifest, work_of

MANIFEST = small_manifest(steps=3, epoch_steps=3)
KEYS = peer_keys()
ATTACKER, NEIGHBOUR, ACCOMPLICE = KEYS[1], KEYS[2], KEYS[3]
FULL = MANIFEST.schedule.microbatches


def honest(step: int) -> Receipt:
    """What the neighbour below signs for the attacker's work in `step`."""
    receipts = all_receipts(MANIFEST, KEYS, range(step, step + 1))
    return next(r for r in receipts if (r.worker, r.signer) == (ATTACKER.id, NEIGHBOUR.id))


def forge_signature(step: int) -> Receipt:
    return replace(honest(step), signature=b"\1" * 64)


def sign_for_the_neighbour(step: int) -> Receipt:
    return replace(honest(step).signed_by(ATTACKER), signer=NEIGHBOUR.id)


def sign_for_himself(step: int) -> Receipt:
    return honest(step).signed_by(ATTACKER)


def let_an_accomplice_sign(step: int) -> Receipt:
    return honest(step).signed_by(ACCOMPLICE)


def move_to_another_step(step: int) -> Receipt:
    return replace(honest(step + 1), step=step)


def take_from_another_run(step: int) -> Receipt:
    return replace(replace(honest(step), run_id=RunId("77" * 32)).signed_by(NEIGHBOUR), run_id=MANIFEST.run_id)


def turn_round(step: int) -> Receipt:
    return replace(honest(step), direction="backward")


def claim_more_of_the_step(step: int) -> Receipt:
    partly = replace(honest(step), microbatches=(0,)).signed_by(NEIGHBOUR)
    return replace(partly, microbatches=(0, 1))


def name_other_parameters(step: int) -> Receipt:
    return replace(honest(step), version=b"\5" * 32)


FORGERIES = [
    forge_signature, sign_for_the_neighbour, sign_for_himself, let_an_accomplice_sign, move_to_another_step,
    take_from_another_run, turn_round, claim_more_of_the_step, name_other_parameters,
]  # fmt: skip


def not_for_step_0(stage: int, receipt: Receipt) -> bool:
    """The attacker did no work in step 0, so nobody signed any for it."""
    return (receipt.worker, receipt.step) != (ATTACKER.id, 0)


@pytest.mark.parametrize("forge", [forge_signature, let_an_accomplice_sign], ids=lambda forge: forge.__name__)
def test_a_forged_receipt_is_worth_nothing(forge: Callable[[int], Receipt], tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=not_for_step_0) as world:
            world.settlers[1].book.add([forge(0)])
            await settle_all(world.settlers)
            accounts = [key.account for key in account_keys()]
            leaves = compute_epoch(MANIFEST, 0, work_of(accounts, [3 * FULL, 2 * FULL, 3 * FULL, 3 * FULL]))
            assert (await world.share.epochs(0)).root == leaves.root

    run_virtual(main)


def test_a_proposal_with_a_forged_receipt_gets_no_vote(tmp_path: Path) -> None:
    async def main() -> None:
        async with settlement(MANIFEST, tmp_path, held=not_for_step_0) as world:
            for forge in FORGERIES:
                with pytest.raises(Misbehaviour) as caught:
                    await propose(world, [*all_receipts(MANIFEST, KEYS, range(3)), forge(0)])
                assert caught.value.evidence

    run_virtual(main)


async def propose(world: Settlement, receipts: list[Receipt]) -> None:
    world.settlers[0].keeper.serve()
    body = encoding.encode({"receipts": [receipt.to_row() for receipt in receipts], "verdicts": []})
    await world.ask(1, 0, {"op": "vote", "epoch": 0, "attempt": 0, "root": "00"}, body)


def test_a_key_signs_receipts_and_nothing_else_with_a_receipts_words() -> None:
    """A signature made for another purpose over the very same bytes is no receipt."""
    receipt = honest(0)
    other = replace(receipt, signature=NEIGHBOUR.sign("vote", receipt.message()))
    with pytest.raises(Misbehaviour, match="forged"):
        other.check()
