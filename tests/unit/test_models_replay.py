"""A replay is a replay: the bytes that the trainer sent, the loss that it had, the gradients that it summed."""

from __future__ import annotations

import pytest
import torch

from audit_world import MICROBATCHES, STEP, Crew, crew, honest_step, replayer
from tessera.core.errors import Invalid
from tessera.models.replay import Replayer, Snapshot, pack_loss, params_digest, unpack_loss


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_replay_gives_the_bytes_that_were_sent(stage: int) -> None:
    done = honest_step()
    log, seen = done.logs[stage], replayer(done, stage)
    for index in range(MICROBATCHES):
        code, gradient = (log.messages(STEP, role).get(index) for role in ("code_in", "gradient_in"))
        replay = seen.replay(STEP, index, done.run.ids(STEP, index), code, gradient)
        if replay.code_BTW is not None:
            assert seen.wire.pack(replay.code_BTW) == log.messages(STEP, "code_out")[index]
        if replay.gradient_BTW is not None:
            packed = seen.wire.pack(replay.gradient_BTW, replay.gradient_noise)
            assert packed == log.messages(STEP, "gradient_out")[index]
        if replay.loss is not None:
            logged = unpack_loss(log.losses(STEP)[index])  # a difference of two sums
            assert unpack_loss(pack_loss(replay.loss)) == replay.loss == pytest.approx(logged, rel=1e-9)
    assert (replay.code_BTW is None) == (stage == 2)
    assert (replay.gradient_BTW is None) == (stage == 0)
    assert (replay.loss is None) == (stage != 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_sum_of_gradients_is_the_trainers(stage: int) -> None:
    done = honest_step()
    log, seen = done.logs[stage], replayer(done, stage)
    work = {
        i: (done.run.ids(STEP, i), *(log.messages(STEP, role).get(i) for role in ("code_in", "gradient_in")))
        for i in range(MICROBATCHES)
    }
    replays, total = seen.gradients(STEP, work)
    claimed = seen.read_gradients(log.update(STEP))
    assert sorted(replays) == list(range(MICROBATCHES))
    assert all(torch.equal(claimed[name], total[name]) for name in total)
    assert not any(parameter.requires_grad for parameter in seen.stage.parameters())


def test_the_digest_names_values_names_and_types() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.zeros(())
    base = params_digest({"a": a, "b": b})
    assert params_digest({"b": b, "a": a.clone()}) == base
    assert len(base) == 32
    others = [
        {"a": a.clone(), "c": b}, {"a": a.view(3, 2), "b": b}, {"a": a.to(torch.float64), "b": b},
        {"a": a + torch.eye(2, 3) * 1e-6, "b": b}, {"a": a}, {"a": a, "b": b.view(1)},
    ]  # fmt: skip
    assert len({base, *map(params_digest, others)}) == 1 + len(others)


def test_a_snapshot_keeps_what_training_moves() -> None:
    team: Crew = crew()
    team.workers[0].trainer.load(team.run.states[STEP][0])
    snapshot = Snapshot(team.workers[0].trainer.stage)
    with torch.no_grad():
        for parameter in team.workers[0].trainer.stage.parameters():
            parameter.add_(1)
    assert Replayer(team.run.spec, 0, snapshot.pack()).version == snapshot.version
    assert Snapshot(team.workers[0].trainer.stage).version != snapshot.version


def test_messages_at_the_wrong_end_are_refused() -> None:
    done = honest_step()
    ids, message = done.run.ids(STEP, 0), done.logs[1].messages(STEP, "code_in")[0]
    first, last = replayer(done, 0), replayer(done, 2)
    with pytest.raises(Invalid, match="no payload expected"):
        first.replay(STEP, 0, ids, message, message)
    with pytest.raises(Invalid, match="a gradient enters all stages but the last"):
        first.replay(STEP, 0, ids, None, None)
    with pytest.raises(Invalid, match="a gradient enters all stages but the last"):
        last.replay(STEP, 0, ids, message, message)
    with pytest.raises(Invalid, match="needs the message"):
        last.replay(STEP, 0, ids, None, None)


def test_another_stages_parameters_are_refused() -> None:
    done = honest_step()
    with pytest.raises(Invalid, match="stage"):
        Replayer(done.run.spec, 1, done.logs[0].params(STEP).pack())
    with pytest.raises(Invalid):
        replayer(done, 1).read_gradients(done.logs[1].params(STEP).pack())
    with pytest.raises(Invalid, match="8 bytes"):
        unpack_loss(b"1234567")
