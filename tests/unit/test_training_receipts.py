"""Receipts and epochs: what was signed by every neighbour counts, and nothing else does."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.core.merkle import fold, share_leaf
from tessera.training.checkpoints import Checkpoints
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.receipts import Direction, Receipt, credited, payloads_digest, why_not
from training_world import (
    CREATOR,
    DATA_OWNER,
    account_keys,
    all_receipts,
    peer_keys,
    small_manifest,
    verified,
    work_of,
)

MANIFEST = small_manifest()
KEYS = peer_keys()
PEERS = [key.id for key in KEYS]
ACCOUNTS = [key.account for key in account_keys()]
STEPS = range(3)
EACH = MANIFEST.schedule.microbatches  # in a step
FULL = EACH * len(STEPS)


def done(receipts: list[Receipt]) -> list[int]:
    return verified(MANIFEST, receipts, PEERS, STEPS)


def test_all_receipts_verify_every_microbatch() -> None:
    assert done(all_receipts(MANIFEST, KEYS, STEPS)) == [FULL] * 4


def test_one_missing_receipt_costs_one_worker_one_step() -> None:
    receipts = all_receipts(MANIFEST, KEYS, STEPS)
    gone = next(r for r in receipts if r.step == 1 and r.worker == PEERS[2])
    assert done([r for r in receipts if r is not gone]) == [FULL, FULL, FULL - EACH, FULL]


def test_what_one_neighbour_has_not_signed_is_missing_and_nothing_else() -> None:
    receipts = all_receipts(MANIFEST, KEYS, STEPS)
    less = [replace(r, microbatches=(0, 2)) if (r.step, r.worker) == (1, PEERS[2]) else r for r in receipts]
    assert done(less) == [FULL, FULL, FULL - 1, FULL]


def test_repeated_or_foreign_receipts_and_microbatches_that_do_not_exist_add_nothing() -> None:
    receipts = all_receipts(MANIFEST, KEYS, STEPS)
    later = all_receipts(MANIFEST, KEYS, range(5, 6))
    inflated = [replace(r, microbatches=(*r.microbatches, EACH)) for r in receipts if r.worker == PEERS[0]]
    assert done(receipts + receipts + later) == [FULL] * 4
    assert done([r for r in receipts if r.worker != PEERS[0]] + inflated)[0] == 0


def test_the_digest_names_each_microbatch() -> None:
    a, b = bytes([1]) * 32, bytes([2]) * 32
    assert payloads_digest({5: b, 2: a}) == sha256(b"\0\2", a, b"\0\5", b)
    assert len({payloads_digest(d) for d in ({0: a, 1: b}, {0: b, 1: a}, {0: a, 2: b}, {0: a}, {})}) == 5
    for wrong in ({1024: a}, {-1: a}, {0: a[:31]}):
        with pytest.raises(Invalid):
            payloads_digest(wrong)


# --- several workers at a stage ---------------------------------------------------------------------------------------

MANY = {PeerId(f"{stage}{worker:x}" * 32): stage for stage in range(3) for worker in range(3)}
AT = {stage: sorted(peer for peer in MANY if MANY[peer] == stage) for stage in range(3)}


def says(signer: PeerId, worker: PeerId, *microbatches: int, step: int = 0) -> Receipt:
    direction: Direction = "forward" if MANY[signer] > MANY[worker] else "backward"
    return Receipt(MANIFEST.run_id, step, worker, signer, direction, microbatches, bytes(32))


def credit(*receipts: Receipt) -> dict[PeerId, set[int]]:
    found = credited(receipts, MANY, 3, range(1), 8)
    assert all(step == 0 for work in found.values() for step, _ in work)
    return {worker: {index for _, index in work} for worker, work in found.items()}


def test_each_worker_is_paid_for_what_both_sides_took_from_him() -> None:
    (up, other), (mine, twin, _), (down, below, _) = AT[0][:2], AT[1], AT[2]
    assert credit(
        says(down, mine, 0, 1), says(below, mine, 2), says(up, mine, 0), says(other, mine, 2, 3),
        says(down, twin, 3), says(up, twin, 3),
    ) == {mine: {0, 2}, twin: {3}}  # fmt: skip


def test_a_microbatch_that_was_done_twice_is_paid_once() -> None:
    (up, other), (mine, twin, _), (down, below, _) = AT[0][:2], AT[1], AT[2]
    once = [says(down, twin, 0), says(up, twin, 0)]
    assert credit(*once) == {twin: {0}}
    assert credit(*once, says(down, mine, 0), says(up, mine, 0)) == {mine: {0}}  # the lower id
    assert credit(*once, says(down, mine, 0), says(up, mine, 0), says(below, twin, 0)) == {twin: {0}}  # more signers
    assert credit(*once, says(down, mine, 0), says(below, mine, 0), says(other, twin, 1)) == {
        twin: {0}
    }  # one side only


def test_ends_of_the_pipeline_need_one_side() -> None:
    first, mid, last = AT[0][0], AT[1][0], AT[2][0]
    assert credit(says(mid, first, 0, 1), says(mid, last, 1)) == {first: {0, 1}, last: {1}}


def test_only_neighbours_count() -> None:
    first, mid, last = AT[0][0], AT[1][0], AT[2][0]
    wrong = [
        Receipt(MANIFEST.run_id, 0, first, last, "forward", (0,), bytes(32)),
        Receipt(MANIFEST.run_id, 0, first, AT[0][1], "forward", (0,), bytes(32)),
        Receipt(MANIFEST.run_id, 0, last, mid, "forward", (0,), bytes(32)),
        Receipt(MANIFEST.run_id, 0, first, mid, "backward", (0,), bytes(32)),
        Receipt(MANIFEST.run_id, 0, first, PeerId("ff" * 32), "forward", (0,), bytes(32)),
        says(mid, first, 8),
    ]
    assert all(why_not(receipt, MANY, 8) for receipt in wrong)
    assert credit(*wrong) == {}


signed = st.builds(
    says, st.sampled_from(AT[1]), st.sampled_from(AT[0] + AT[2]), st.integers(0, 7), step=st.integers(0, 1)
)
heard = st.lists(
    st.one_of(signed, st.builds(lambda r: replace(r, worker=r.signer, signer=r.worker, direction=_turned(r)), signed)),
    max_size=40,
)


def _turned(receipt: Receipt) -> Direction:
    return "backward" if receipt.direction == "forward" else "forward"


@given(heard, st.randoms(use_true_random=False))
def test_credit_is_the_same_in_any_order_and_never_twice(receipts: list[Receipt], rng: random.Random) -> None:
    found = credited(receipts, MANY, 3, range(2), 8)
    shuffled = receipts * 2
    rng.shuffle(shuffled)
    assert credited(shuffled, MANY, 3, range(2), 8) == found
    paid = [(MANY[worker], work) for worker, works in found.items() for work in works]
    assert len(paid) == len(set(paid))


# --- as bytes ---------------------------------------------------------------------------------------------------------


def test_nobody_signs_for_himself_and_a_wrong_signature_is_misbehaviour() -> None:
    receipt = all_receipts(MANIFEST, KEYS, STEPS)[0]
    receipt.check()
    for wrong in (
        replace(receipt, signature=bytes(64)),
        replace(receipt, microbatches=(0, 1)),
        replace(receipt, version=b"\1" * 32),
        replace(receipt, step=receipt.step + 1),
        replace(receipt, worker=PEERS[3]),
        replace(receipt, worker=receipt.signer),
    ):
        with pytest.raises(Misbehaviour) as caught:
            wrong.check()
        assert caught.value.evidence == wrong.to_row()


@given(st.sets(st.integers(0, 1023), min_size=1))
def test_microbatches_travel_as_a_bitmap(indices: set[int]) -> None:
    receipt = replace(all_receipts(MANIFEST, KEYS, STEPS)[0], microbatches=tuple(sorted(indices)))
    assert Receipt.from_row(MANIFEST.run_id, receipt.to_row()) == receipt
    assert len(receipt.to_row()[4]) <= 256


@pytest.mark.parametrize("bitmap", ["", "0", "07", "F", "0x7", "-1", " 7", "7 ", "1" + "0" * 256, 7, None])
def test_a_set_of_microbatches_is_written_in_one_way(bitmap: object) -> None:
    row = all_receipts(MANIFEST, KEYS, STEPS)[0].to_row()
    row[4] = bitmap
    with pytest.raises(Invalid):
        Receipt.from_row(MANIFEST.run_id, row)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=70), lambda inner: st.lists(inner, max_size=8)))
def test_no_row_from_a_peer_breaks_the_parser(row: object) -> None:
    with pytest.raises(Invalid):
        Receipt.from_row(MANIFEST.run_id, row)


def test_a_receipt_travels_as_a_row() -> None:
    receipt = all_receipts(MANIFEST, KEYS, STEPS)[5]
    assert Receipt.from_row(MANIFEST.run_id, receipt.to_row()) == receipt


def test_an_epoch_pays_the_workers_their_basis_points_and_the_owners_theirs() -> None:
    leaves = compute_epoch(MANIFEST, 0, work_of(ACCOUNTS, [FULL] * 4))
    assert leaves is not None
    work, tokens = sum(leaves.shares_of(account) for account in ACCOUNTS), FULL * MANIFEST.tokens_per_microbatch
    assert work == sum(tokens * MANIFEST.model.flops_per_token(s) * 10**6 for s in range(4))
    assert leaves.shares_of(DATA_OWNER) == work * 1000 // 8500
    assert leaves.shares_of(CREATOR) == work * 500 // 8500
    assert leaves.total == work + leaves.shares_of(DATA_OWNER) + leaves.shares_of(CREATOR)
    for account, shares in leaves.leaves:
        assert fold(share_leaf(0, account, shares), leaves.proof(account)) == leaves.root
    assert EpochLeaves.from_text(leaves.to_text()) == leaves


def test_no_verified_work_makes_no_epoch() -> None:
    empty = compute_epoch(MANIFEST, 0, work_of(ACCOUNTS, [0] * 4))
    assert (empty.leaves, empty.total, empty.root) == ((), 0, bytes(32))
    assert EpochLeaves.from_text(empty.to_text()) == empty


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
