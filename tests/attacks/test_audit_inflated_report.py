"""A worker says that he did more than he did. Nothing that he says of himself is looked at, so he gains nothing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from audit_world import MICROBATCHES, RUN, STEP, Step, auditor_key, crew, worker_key
from tessera.core.errors import Misbehaviour
from tessera.core.signing import AccountKey
from tessera.training.audit import AuditConfig, settle_credit
from tessera.training.audit_commitment import accepted
from tessera.training.epochs import compute_epoch
from tessera.training.receipts import Receipt
from training_world import small_manifest, work_of

LIAR = worker_key(1)
MANIFEST = small_manifest(stages=3)
ACCOUNTS = [AccountKey(bytes([i + 1]) * 32).account for i in range(3)]


def shares(done: Step, receipts: list[Receipt]) -> list[int]:
    """From receipts to shares, as a keeper goes: signatures, acceptance, credit, audits, epoch."""
    for receipt in receipts:
        receipt.check()
    signed: dict[tuple[str, int], set[str]] = defaultdict(set)
    for receipt in accepted(receipts, done.commitments):
        if done.run.stage_of(receipt.signer) is not None:
            for index in receipt.microbatches:
                signed[receipt.worker, index].add(receipt.direction)
    needed = [{"forward"}, {"forward", "backward"}, {"backward"}]
    work = {
        worker_key(s).id: {(STEP, i) for (w, i), ways in signed.items() if w == worker_key(s).id and ways >= needed[s]}
        for s in range(3)
    }
    others = {worker_key(s).id: [auditor_key(s).id] for s in range(3)}
    credit = settle_credit(work, [], others, AuditConfig())
    leaves = compute_epoch(MANIFEST, 0, work_of(ACCOUNTS, [len(credit.paid[worker_key(s).id]) for s in range(3)]))
    return [leaves.shares_of(account) for account in ACCOUNTS]


def test_an_inflated_report_gains_no_share() -> None:
    done = crew().step(STEP)
    honest = shares(done, done.receipts)
    assert min(honest) > 0
    more = tuple(range(MICROBATCHES + 50))
    inflated = replace(done.commitments[1], microbatches=more).signed_by(LIAR)
    boast = replace(done, commitments=[done.commitments[0], inflated, done.commitments[2]])
    assert shares(boast, done.receipts) == honest


def test_a_receipt_for_more_that_he_signs_for_himself_is_refused() -> None:
    done = crew().step(STEP)
    own = Receipt(RUN, STEP, LIAR.id, LIAR.id, "forward", tuple(range(200)), bytes(32), bytes(32)).signed_by(LIAR)
    with pytest.raises(Misbehaviour, match="cannot sign for himself"):
        shares(done, [*done.receipts, own])


def test_a_friends_receipt_that_the_commitment_does_not_name_gains_no_share() -> None:
    done = crew().step(STEP)
    forward = next(r for r in done.receipts if r.worker == LIAR.id and r.direction == "forward")
    more = replace(forward, microbatches=tuple(range(200))).signed_by(worker_key(2))
    backward = next(r for r in done.receipts if r.worker == LIAR.id and r.direction == "backward")
    again = replace(backward, digest=bytes(32), microbatches=tuple(range(200))).signed_by(worker_key(0))
    assert shares(
        done, [*done.receipts, more, again, replace(backward, microbatches=more.microbatches).signed_by(worker_key(0))]
    ) == shares(done, done.receipts)
