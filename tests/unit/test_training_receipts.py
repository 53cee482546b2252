"""Receipts and epochs: what was signed by every neighbour counts, and nothing else does."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.merkle import fold, share_leaf
from tessera.training.checkpoints import Checkpoints
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.receipts import Receipt, verified_tokens
from training_world import CREATOR, DATA_OWNER, account_keys, all_receipts, peer_keys, small_manifest

MANIFEST = small_manifest()
KEYS = peer_keys()
PEERS = [key.id for key in KEYS]
ACCOUNTS = [key.account for key in account_keys()]
STEPS = range(3)
FULL = MANIFEST.tokens_per_step


def tokens(receipts: list[Receipt]) -> list[int]:
    return verified_tokens(receipts, PEERS, STEPS, FULL)


def test_all_receipts_verify_every_token() -> None:
    assert tokens(all_receipts(MANIFEST, KEYS, STEPS)) == [3 * FULL] * 4


def test_one_missing_receipt_costs_one_worker_one_step() -> None:
    receipts = all_receipts(MANIFEST, KEYS, STEPS)
    gone = next(r for r in receipts if r.step == 1 and r.worker == PEERS[2])
    assert tokens([r for r in receipts if r is not gone]) == [3 * FULL, 3 * FULL, 2 * FULL, 3 * FULL]


def test_repeated_foreign_or_inflated_receipts_add_nothing() -> None:
    receipts = all_receipts(MANIFEST, KEYS, STEPS)
    later = all_receipts(MANIFEST, KEYS, range(5, 6))
    inflated = [replace(r, tokens=10 * FULL) for r in receipts if r.worker == PEERS[0]]
    assert tokens(receipts + receipts + later) == [3 * FULL] * 4
    assert tokens([r for r in receipts if r.worker != PEERS[0]] + inflated)[0] == 0


def test_nobody_signs_for_himself_and_a_wrong_signature_is_misbehaviour() -> None:
    receipt = all_receipts(MANIFEST, KEYS, STEPS)[0]
    receipt.check()
    for wrong in (
        replace(receipt, signature=bytes(64)),
        replace(receipt, tokens=receipt.tokens + 1),
        replace(receipt, step=receipt.step + 1),
        replace(receipt, worker=PEERS[3]),
        replace(receipt, worker=receipt.signer),
    ):
        with pytest.raises(Misbehaviour) as caught:
            wrong.check()
        assert caught.value.evidence == wrong.to_row()


@given(st.recursive(st.none() | st.integers() | st.text(max_size=70), lambda inner: st.lists(inner, max_size=8)))
def test_no_row_from_a_peer_breaks_the_parser(row: object) -> None:
    with pytest.raises(Invalid):
        Receipt.from_row(MANIFEST.run_id, row)


def test_a_receipt_travels_as_a_row() -> None:
    receipt = all_receipts(MANIFEST, KEYS, STEPS)[5]
    assert Receipt.from_row(MANIFEST.run_id, receipt.to_row()) == receipt


def test_an_epoch_pays_the_workers_their_basis_points_and_the_owners_theirs() -> None:
    leaves = compute_epoch(MANIFEST, 0, ACCOUNTS, [3 * FULL] * 4)
    assert leaves is not None
    work = sum(leaves.shares_of(account) for account in ACCOUNTS)
    assert work == sum(3 * FULL * MANIFEST.model.flops_per_token(s) * 10**6 for s in range(4))
    assert leaves.shares_of(DATA_OWNER) == work * 1000 // 8500
    assert leaves.shares_of(CREATOR) == work * 500 // 8500
    assert leaves.total == work + leaves.shares_of(DATA_OWNER) + leaves.shares_of(CREATOR)
    for account, shares in leaves.leaves:
        assert fold(share_leaf(0, account, shares), leaves.proof(account)) == leaves.root
    assert EpochLeaves.from_text(leaves.to_text()) == leaves


def test_no_verified_work_makes_no_epoch() -> None:
    assert compute_epoch(MANIFEST, 0, ACCOUNTS, [0] * 4) is None


@pytest.mark.parametrize("text", ["", "[]", "[0,[]]x", '[0,[["0x00",1]]]', "[0,[[1,2,3]]]", '["0",[]]'])
def test_leaves_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        EpochLeaves.from_text(text)


def test_checkpoints_keep_the_last_few_and_notice_damage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (0, 10, 20, 30):
        checkpoints.save(step, b"state %d" % step)
    assert checkpoints.steps() == [0, 20, 30]
    assert checkpoints.load(30) == b"state 30"
    file = tmp_path / "step-000000030.ckpt"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(Invalid, match="damaged"):
        checkpoints.load(30)
    assert checkpoints.steps() == [0, 20]
    checkpoints.drop_after(0)
    assert checkpoints.steps() == [0]


def test_checkpoints_that_are_held_stay_until_they_are_let_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.hold([20, 70])
    for step in range(10, 60, 10):
        checkpoints.save(step, b"state %d" % step)
    assert checkpoints.steps() == [20, 40, 50]
    checkpoints.hold([])
    checkpoints.save(60, b"state 60")
    assert checkpoints.steps() == [50, 60]
    checkpoints.hold([60])
    checkpoints.drop_after(50)  # another past: held or not
    assert checkpoints.steps() == [50]


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(0, b"whole")
    (tmp_path / ".step-000000010.ckpt.abc123").write_bytes(b"half")
    assert Checkpoints(tmp_path).steps() == [0]
    assert [file.name for file in tmp_path.iterdir()] == ["step-000000000.ckpt"]
