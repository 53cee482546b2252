"""Draws, verdicts, logs, evidence as bytes; and an auditor at work on a network, in virtual time."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from audit_world import (
    MICROBATCHES,
    RUN,
    STEP,
    auditor_key,
    crew,
    honest_step,
    judged,
    lot,
    message_bytes,
    replayer,
    scene,
    worker_key,
)
from tessera.core.errors import Invalid, Misbehaviour, Missing, Refused
from tessera.models.replay import Replayer, Snapshot
from tessera.p2p.memory import MemoryNetwork, run_virtual
from tessera.training.audit import AuditConfig, Verdict, draw, settle_credit
from tessera.training.audit_commitment import Commitment
from tessera.training.audit_evidence import Evidence
from tessera.training.audit_log import AuditLog
from tessera.training.audit_probe import Examiner, serve_probe
from tessera.training.audit_service import Behind
from tessera.training.receipts import Receipt

WORKER = worker_key(1).id


# --- draws and verdicts -----------------------------------------------------------------------------------------------


def test_a_draw_is_its_auditors_and_can_be_shown() -> None:
    mine = lot(1)
    mine.check()
    assert mine == lot(1)
    assert mine.signature != lot(1, 1).signature
    with pytest.raises(Invalid, match="signature"):
        replace(mine, auditor=auditor_key(1, 1).id).check()
    with pytest.raises(Invalid, match="signature"):
        replace(mine, index=None).check()


def test_rate_0_never_hits_and_rate_1_always() -> None:
    assert not lot(1).hits(0)
    assert lot(1).hits(10_000)
    with pytest.raises(Invalid, match="at least one auditor"):
        lot(1).hits(100, auditors=0)


def test_a_verdict_travels_and_comes_back() -> None:
    verdict = Verdict(lot(1, None), "failed", "code: 8 steps", bytes(range(32))).signed_by(auditor_key(1))
    again = Verdict.from_row(RUN, verdict.to_row())
    again.check()
    assert again == verdict
    with pytest.raises(Invalid, match="auditor who drew"):
        verdict.signed_by(auditor_key(1, 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, -1), (0, True), (1, "x"), (2, 5000), (2, "0"), (4, "00"), (5, "guilty"), (6, "x" * 500), (7, None), (8, "zz")],
)
def test_a_verdict_of_another_shape_is_refused(field: int, value: Any) -> None:
    row = Verdict(lot(1), "passed", "passed", bytes(32)).signed_by(auditor_key(1)).to_row()
    row[field] = value
    with pytest.raises(Invalid):
        Verdict.from_row(RUN, row)
    with pytest.raises(Invalid, match="9 fields"):
        Verdict.from_row(RUN, row[:-1])


def test_a_worker_alone_at_his_stage_is_paid_provisionally() -> None:
    work = {WORKER: {(STEP, 0)}, worker_key(0).id: {(STEP, 0)}}
    credit = settle_credit(work, [], {worker_key(0).id: [auditor_key(0).id]}, AuditConfig())
    assert credit.provisional == {WORKER: frozenset({(STEP, 0)}), worker_key(0).id: frozenset()}
    assert credit.paid == {WORKER: frozenset(), worker_key(0).id: frozenset({(STEP, 0)})}


@pytest.mark.parametrize("wrong", [{"rate_bps": 10_001}, {"window_steps": 0}, {"penalty": "life"}, {"more": 1}])
def test_a_config_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AuditConfig(**wrong)


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_log_keeps_its_window_and_what_is_held() -> None:
    snapshot = honest_step().logs[1].params(STEP)
    log = AuditLog(RUN, 3)
    log.open(0, snapshot)
    log.hold([0])
    for step in range(1, 6):
        log.open(step, snapshot)
    assert log.steps == [0, 3, 4, 5]
    log.hold([])
    log.open(6, snapshot)
    assert log.steps == [4, 5, 6]
    with pytest.raises(Missing, match="steps \\[4, 5, 6\\] are"):
        log.keep(3, 0, "code_in", b"", WORKER)
    with pytest.raises(Missing, match="not finished"):
        log.commitment(4)
    with pytest.raises(Invalid, match="at most"):
        log.hold(range(100))


def test_a_commitment_says_what_each_neighbour_got() -> None:
    promise = honest_step().commitments[1]
    promise.check()
    assert promise.microbatches == tuple(range(MICROBATCHES))
    assert {(s.direction, s.peer) for s in promise.sent} == {
        ("forward", worker_key(2).id), ("backward", worker_key(0).id),
    }  # fmt: skip
    assert Commitment.from_row(RUN, WORKER, promise.to_row()) == promise
    with pytest.raises(Invalid, match="names him"):
        Commitment.from_row(RUN, worker_key(0).id, promise.to_row())


def test_a_microbatch_that_never_came_back_is_not_committed_to() -> None:
    log = AuditLog(RUN, 3)
    log.open(STEP, honest_step().logs[0].params(STEP))
    for index, gradient in ((0, True), (1, False), (2, True)):
        log.keep(STEP, index, "code_out", bytes([index]), WORKER)
        if gradient:
            log.keep(STEP, index, "gradient_in", bytes([index]), WORKER)
    assert log.commit(STEP, worker_key(0), b"").microbatches == (0, 2)


# --- evidence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("index", [2, None])
def test_honest_work_passes_on_every_stage_and_its_evidence_travels(stage: int, index: int | None) -> None:
    done = honest_step()
    assert judged(done, stage, index).outcome == "passed"
    evidence = done.evidence(stage, index)
    again = Evidence.from_bytes(RUN, evidence.to_bytes(), Receipt.from_row)
    assert again == evidence
    assert again.digest() == evidence.digest()


# --- the auditor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("index", [1, None])
def test_an_auditor_passes_an_honest_worker(stage: int, index: int | None) -> None:
    done = honest_step()

    async def main() -> None:
        async with scene(done, stage) as here:
            result = await here.auditor.audit(lot(stage, index), done.receipts, done.commitments[stage])
            assert (result.verdict.outcome, result.verdict.reason) == ("passed", "passed")
            assert result.evidence is not None
            assert result.verdict.evidence == result.evidence.digest()
            result.verdict.check()

    run_virtual(main)


def test_parameters_that_drifted_a_little_are_fetched_and_replayed() -> None:
    """Replicas on other hardware: almost the auditor's numbers, not quite."""
    done = honest_step()
    team = crew()
    team.workers[1].trainer.load(team.run.states[STEP][1])
    for parameter in team.workers[1].trainer.stage.parameters():
        parameter.data.mul_(1 + 1e-6)
    drifted = Snapshot(team.workers[1].trainer.stage)
    assert drifted.version != done.logs[1].params(STEP).version

    async def main() -> None:
        async with scene(done, 1, own=drifted) as here:
            result = await here.auditor.audit(lot(1), done.receipts, done.commitments[1])
            assert result.verdict.outcome == "passed"

    run_virtual(main)


def test_receipts_that_are_not_here_yet_are_no_ones_fault() -> None:
    done = honest_step()

    async def main() -> None:
        async with scene(done, 1) as here:
            with pytest.raises(Missing, match="not all here"):
                await here.auditor.audit(lot(1), done.receipts[1:], done.commitments[1])
            with pytest.raises(Missing, match="is not kept here"):
                await here.auditor.audit(lot(1, 0, STEP - 1), done.receipts, done.commitments[1])
            with pytest.raises(Invalid, match="earned nothing"):
                await here.auditor.audit(lot(1, 99), done.receipts, done.commitments[1])
            assert here.auditor.withheld(lot(1), "the window closed").verdict.outcome == "withheld"

    run_virtual(main)


def test_lots_are_drawn_for_what_was_earned_only() -> None:
    done = honest_step()
    always = AuditConfig(rate_bps=10_000, update_bps=10_000)

    async def main() -> None:
        async with scene(done, 1, config=always) as here:
            lots = here.auditor.lots(done.commitments[1], done.receipts, 1)
            assert [lot.index for lot in lots] == [0, 1, 2, 3, None]
            assert here.auditor.lots(done.commitments[1], [], 1) == []
        async with scene(done, 1, config=AuditConfig(rate_bps=0, update_bps=0)) as here:
            assert here.auditor.lots(done.commitments[1], done.receipts, 1) == []

    run_virtual(main)


def test_another_auditor_reviews_evidence_under_his_own_name() -> None:
    done = honest_step()
    shown = done.evidence(1, 0, auditor_key(1, 1))

    async def main() -> None:
        async with scene(done, 1) as here:
            result = await here.auditor.review(shown)
            assert result.verdict.outcome == "passed"
            assert result.verdict.draw.auditor == auditor_key(1).id
            with pytest.raises(Invalid):
                await here.auditor.review(replace(shown, flows=()))

    run_virtual(main)


# --- a joiner's probe -------------------------------------------------------------------------------------------------


def probed(joined: Replayer, *, count: int = 3, stage: int = 1, admitted: bool = True) -> None:
    """The auditor of the small world examines a joiner who replays with `joined`."""
    done = honest_step()

    async def main() -> None:
        network = MemoryNetwork(random.Random(4), delay_s=0.01)
        async with AsyncExitStack() as stack:
            ours, joiner = [await stack.enter_async_context(network.start(auditor_key(stage, n))) for n in (0, 1)]
            size = message_bytes(done)
            serve_probe(joiner, lambda step: joined, done.run.ids, lambda peer: admitted, message_bytes=size)
            examiner = Examiner(ours, replayer(done, stage), done.logs[stage], done.run.ids, size)
            version = done.logs[stage].params(STEP).version
            await examiner.probe(joiner.record(), version, count, random.Random(1))

    run_virtual(main)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_joiner_who_computes_as_the_others_do_passes_his_probe(stage: int) -> None:
    probed(replayer(honest_step(), stage), stage=stage)


def test_a_joiner_with_other_parameters_fails_his_probe() -> None:
    done, team = honest_step(), crew()
    team.workers[1].trainer.load(team.run.states[STEP - 1][1])
    stale = replayer(done, 1)
    stale.load(Snapshot(team.workers[1].trainer.stage))
    with pytest.raises(Misbehaviour, match="does not compute as this stage does"):
        probed(stale)


def test_a_probe_needs_samples_and_an_examiner_of_the_stage() -> None:
    joined = replayer(honest_step(), 1)
    with pytest.raises(Missing, match="no 50 microbatches"):
        probed(joined, count=50)
    with pytest.raises(Refused, match="only workers of this stage"):
        probed(joined, admitted=False)


def test_a_draw_of_one_auditor_says_nothing_of_anothers() -> None:
    lots = [draw(auditor_key(1, number), RUN, STEP, WORKER, 0).signature for number in range(3)]
    assert len(set(lots)) == 3


def test_an_auditor_who_asks_too_late_says_nothing_about_the_worker() -> None:
    async def main() -> None:
        done = honest_step()
        async with scene(done, 1) as here:
            own = here.auditor._own
            for step in (STEP + 1, STEP + 2):  # the worker may begin the one after it, and drop the audited one
                assert own.in_time(STEP)
                own.open(step, own.params(STEP))
            with pytest.raises(Behind):
                await here.auditor.audit(lot(1), done.receipts, done.commitments[1])
            with pytest.raises(Behind):
                await here.auditor.promise(WORKER, STEP, Receipt.from_row)

    run_virtual(main)
