"""What a worker records for his auditors: a step's messages as they count at its end, and a promise signed before."""

from __future__ import annotations

import anyio
import pytest
import torch
from torch import Tensor

from audit_world import crew
from tessera.core.errors import Missing
from tessera.core.hashing import sha256
from tessera.models.replay import Snapshot, pack_sums
from tessera.models.stage import Stage
from tessera.training.audit_records import AuditRecords
from tessera.training.receipts import NO_VERSION, payloads_digest
from tessera.training.step_log import Passage, StepLog
from training_world import peer_keys, small_manifest

ME, UP, DOWN, HEIR = peer_keys()
SPEC = crew().run.spec
MANIFEST = small_manifest(stages=3).model_copy(update={"model": SPEC})


class FixedTrainer:
    """A stage that does not learn."""

    def __init__(self, stage: int) -> None:
        self.stage = Stage(SPEC, stage)

    def whole_stage(self) -> Stage:
        return self.stage

    def sums(self) -> dict[str, Tensor]:
        return {name: torch.ones_like(p.detach()) for name, p in self.stage.named_parameters()}

    def loss_of(self, index: int) -> float | None:
        return 2.5 if self.stage.last else None


def records(stage: int = 1, *, alone: bool = False) -> AuditRecords:
    return AuditRecords(MANIFEST, stage=stage, key=ME, trainer=FixedTrainer(stage), alone=lambda: alone)


def step_log() -> StepLog:
    """Microbatches 0 and 2 through, the second by way of an heir; 1 not done."""
    messages = {"code_in": b"in", "code_out": b"out", "gradient_in": b"back", "gradient_out": b"up"}
    log = StepLog(5)
    log.passages[0] = Passage(0, UP.id, DOWN.id, True, **messages, done=True)
    log.passages[1] = Passage(1, UP.id, DOWN.id, True, code_in=b"in")
    log.passages[2] = Passage(2, UP.id, HEIR.id, True, **messages, done=True)
    return log


def test_the_promise_names_who_serves_a_microbatch_at_the_end() -> None:
    async def main() -> None:
        ours = records()
        version = await ours.open(5)
        assert version == Snapshot(FixedTrainer(1).stage).version
        await ours.close(step_log())
        promise = ours.log.commitment(5)
        promise.check()
        assert (promise.worker, promise.version, promise.microbatches) == (ME.id, version, (0, 2))
        got = {(sent.direction, sent.peer): sent.digest for sent in promise.sent}
        assert got == {
            ("forward", DOWN.id): payloads_digest({0: sha256(b"out")}),
            ("forward", HEIR.id): payloads_digest({2: sha256(b"out")}),
            ("backward", UP.id): payloads_digest({0: sha256(b"up"), 2: sha256(b"up")}),
        }
        assert promise.update == sha256(pack_sums(SPEC, 1, FixedTrainer(1).sums()))

    anyio.run(main)


def test_the_last_stage_commits_to_its_losses() -> None:
    async def main() -> None:
        ours, log = records(2), StepLog(5)
        await ours.open(5)
        log.passages[0] = Passage(0, UP.id, None, True, code_in=b"in", gradient_out=b"up", done=True)
        await ours.close(log)
        assert list(ours.log.losses(5)) == [0]
        assert ours.log.commitment(5).losses != bytes(32)

    anyio.run(main)


def test_who_is_alone_or_did_nothing_records_nothing() -> None:
    async def main() -> None:
        alone = records(alone=True)
        assert await alone.open(5) == NO_VERSION
        await alone.close(step_log())
        assert alone.log.steps == []
        idle = records()
        await idle.open(5)
        await idle.close(StepLog(5))
        with pytest.raises(Missing, match="not finished"):
            idle.log.commitment(5)

    anyio.run(main)
