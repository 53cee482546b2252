"""One test for each way of not doing the work: the audit of any microbatch finds it."""

from __future__ import annotations

import pytest

from audit_world import KINDS, MICROBATCHES, STEP, Cheat, Crew, crew, honest_step, judged, replayer, worker_key
from tessera.training.audit_judge import judge

PLACES = [(0, "forward"), (1, "forward"), (1, "backward"), (2, "backward")]


@pytest.mark.parametrize(("stage", "mode"), PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cheat_fails_wherever_he_sits(kind: str, stage: int, mode: str) -> None:
    done = crew().step(STEP, Cheat(kind, stage, mode))
    for index in range(MICROBATCHES):
        finding = judged(done, stage, index)
        assert finding.outcome == "failed"
        assert finding.reason.startswith("code" if mode == "forward" else "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_int8_parameters_fail_whatever_the_manifest_declares(compute: str) -> None:
    done = crew(compute).step(STEP, Cheat("lower_precision", 1, "both", "int8"))
    assert judged(done, 1).outcome == "failed"


def test_bfloat16_where_float32_is_declared_fails() -> None:
    done = crew().step(STEP, Cheat("lower_precision", 1, "both", "compute"))
    assert judged(done, 1).outcome == "failed"


def test_honest_neighbours_of_a_cheat_pass() -> None:
    """What they got is garbage; what they made of it is right."""
    done = crew().step(STEP, Cheat("colluding_neighbours", 1))
    assert judged(done, 1).outcome == "failed"
    assert [judged(done, stage).outcome for stage in (0, 2)] == ["passed", "passed"]


def test_skipping_the_backward_pass_of_stage_0_fails_the_audit_of_the_update() -> None:
    """It shows in no message, and so in no audit of one microbatch."""
    team: Crew = crew()
    done = honest_step()
    seen, log = replayer(done, 0), done.logs[0]
    work = {i: (done.run.ids(STEP, i), None, log.messages(STEP, "gradient_in")[i]) for i in (0, 1)}
    _, half = seen.gradients(STEP, work)
    lazy = team.step(STEP, updates={0: seen.write_gradients({name: 2 * g for name, g in half.items()})})
    assert judged(lazy, 0, 1).outcome == "passed"
    finding = judged(lazy, 0, None)
    assert finding.outcome == "failed"
    assert finding.reason.startswith("update")


def test_an_update_of_nan_fails() -> None:
    done = honest_step()
    seen = replayer(done, 0)
    nothing = {name: torch_like(p, float("nan")) for name, p in seen.params().items()}
    lazy = crew().step(STEP, updates={0: seen.write_gradients(nothing)})
    assert judged(lazy, 0, None).outcome == "failed"


def test_an_invented_loss_fails() -> None:
    done = crew().step(STEP)
    log = done.logs[2]
    for index in range(MICROBATCHES):
        log.keep_loss(STEP, index, b"\x3f\xf0" + bytes(6))  # 1.0
    done.commitments[2] = log.commit(STEP, worker_key(2), log.update(STEP))
    finding = judged(done, 2)
    assert finding.outcome == "failed"
    assert finding.reason.startswith("loss")


def test_committing_to_other_parameters_in_each_receipt_fails() -> None:
    from dataclasses import replace

    done = crew().step(STEP)
    mine = worker_key(1)
    done.receipts[:] = [
        replace(r, version=bytes(32)).signed_by(mine) if r.signer == mine.id and r.direction == "forward" else r
        for r in done.receipts
    ]
    finding = judge(done.evidence(1, 0), replayer(done, 1), stage_of=done.run.stage_of, ids=done.run.ids)
    assert finding.outcome == "failed"
    assert finding.reason.startswith("version")


def torch_like(parameter: object, value: float) -> object:
    import torch

    return torch.full_like(parameter, value)  # type: ignore[call-overload]
