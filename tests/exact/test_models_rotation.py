"""A turned boundary: the same function, the same learning, and nothing that fits a shard of another time.

Losses are in nats per token. The wire is float32 where a drift is measured, because codes are rounded along the axes
of the moment, and a turn changes those.
"""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tessera.core.errors import Conflict, Invalid
from tessera.core.ids import RunId
from tessera.models.config import ModelSpec
from tessera.models.pipeline import Pipeline
from tessera.models.presets import preset_codec, tiny_spec
from tessera.models.rotation import boundary_rotation, check_rotation, turned
from tessera.models.trainer import StageTrainer

RUN, SECRET = RunId("ab" * 32), bytes(range(32))
STEPS = 60


def described(wire: str = "float32", stages: int = 3) -> ModelSpec:
    spec = tiny_spec(stages, vocab_size=23)
    return spec.model_copy(update={"codec": spec.codec.model_copy(update={"wire": wire})})


def matrix(boundary: int, epoch: int, k: int = 8) -> torch.Tensor:
    return boundary_rotation(SECRET, RUN, boundary, epoch, k)


def rotate(trainers: list[StageTrainer], epoch: int) -> None:
    """Every boundary, by both owners."""
    for stage, trainer in enumerate(trainers):
        trainer.rotate(
            entering=matrix(stage - 1, epoch) if stage else None,
            leaving=matrix(stage, epoch) if stage < len(trainers) - 1 else None,
        )


def text(seed: int, count: int = 8) -> NDArray[np.int64]:
    """Windows of a text with memory: each token is the last one plus what the one before that says."""
    jumps = np.random.default_rng(seed).integers(1, 3, 33 * count // 2).repeat(2)
    return (np.cumsum(jumps) % 23)[: 32 * count + count].reshape(count, 33)


def train(pipeline: Pipeline, steps: range, *, turn: bool) -> list[float]:
    losses = []
    for step in steps:
        losses.append(pipeline.train_step(step, [text(2 * step), text(2 * step + 1)]))
        if turn:
            rotate(pipeline.trainers, step)
    return losses


@pytest.fixture(scope="module")
def trained() -> list[bytes]:
    """The stages' checkpoints in the middle of a run."""
    pipeline = Pipeline(described(), steps=STEPS)
    losses = train(pipeline, range(40), turn=False)
    assert losses[-1] < 0.8 * losses[0]
    return [trainer.save() for trainer in pipeline.trainers]


def loaded(saved: list[bytes]) -> Pipeline:
    pipeline = Pipeline(described(), steps=STEPS)
    for trainer, data in zip(pipeline.trainers, saved, strict=True):
        trainer.load(data)
    return pipeline


@pytest.mark.slow
def test_a_thousand_turns_leave_the_loss_where_it_was(trained: list[bytes]) -> None:
    pipeline, windows = loaded(trained), text(996, 16)
    before = pipeline.evaluate(windows)
    for epoch in range(1000):
        rotate(pipeline.trainers, epoch)
    assert abs(pipeline.evaluate(windows) - before) <= 1e-5


@pytest.mark.slow
def test_a_turn_changes_the_messages_and_not_the_logits(trained: list[bytes]) -> None:
    pipeline, ids = loaded(trained), text(5, 2)
    code = pipeline.trainers[0].evaluate(ids, None)
    assert isinstance(code, bytes)
    before = pipeline.evaluate(ids)
    rotate(pipeline.trainers, 1)
    other = pipeline.trainers[0].evaluate(ids, None)
    assert isinstance(other, bytes)
    was, now = (np.frombuffer(data, "<f4").reshape(-1, 8) for data in (code, other))
    np.testing.assert_allclose(now, was @ matrix(0, 1).numpy().astype(np.float32), atol=1e-5)
    assert np.abs(now - was).max() > 0.1
    assert pipeline.evaluate(ids) == pytest.approx(before, abs=1e-6)


@pytest.mark.slow
def test_training_goes_on_as_if_nothing_had_turned(trained: list[bytes]) -> None:
    """Not to the bit, as the second moment turns only about right. With first moments left behind: off by 1.5e-4."""
    plain, turning = loaded(trained), loaded(trained)
    expected = train(plain, range(40, STEPS), turn=False)
    found = train(turning, range(40, STEPS), turn=True)
    assert found == pytest.approx(expected, abs=5e-5)
    assert found != expected


def test_shards_of_two_times_do_not_fit(trained: list[bytes]) -> None:
    pipeline, windows = loaded(trained), text(7, 16)
    before = pipeline.evaluate(windows)
    rotate(pipeline.trainers, 1)
    pipeline.trainers[1].load(trained[1])  # the thief's older copy
    assert pipeline.evaluate(windows) > before + 0.1


@pytest.mark.slow
def test_replicas_that_know_the_secret_stay_equal(trained: list[bytes]) -> None:
    one, two = loaded(trained), loaded(trained)
    assert train(one, range(40, 44), turn=True) == train(two, range(40, 44), turn=True)
    assert [t.save() for t in one.trainers] == [t.save() for t in two.trainers]


def test_a_checkpoint_keeps_the_turn_and_its_moments(trained: list[bytes]) -> None:
    pipeline = loaded(trained)
    rotate(pipeline.trainers, 3)
    again = loaded([trainer.save() for trainer in pipeline.trainers])
    assert train(again, range(40, 43), turn=True) == train(pipeline, range(40, 43), turn=True)


@pytest.mark.slow
def test_int8_codes_are_about_as_exact_along_turned_axes() -> None:
    plain, turning = (Pipeline(described("int8"), steps=STEPS) for _ in range(2))
    losses, windows = train(plain, range(30), turn=False), text(996, 16)
    train(turning, range(30), turn=True)
    assert losses[-1] < 0.8 * losses[0]
    assert turning.evaluate(windows) == pytest.approx(plain.evaluate(windows), abs=0.02)


# --- the matrices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 23, 64])
def test_a_rotation_is_orthogonal_and_has_a_name(k: int) -> None:
    check_rotation(matrix(0, 0, k), k)
    assert torch.equal(matrix(0, 0, k), matrix(0, 0, k))
    if k > 1:  # of one number there are only 1 and -1: the first stays 1 by the sign rule
        others = [matrix(0, 1, k), matrix(1, 0, k), boundary_rotation(bytes(32), RUN, 0, 0, k)]
        others.append(boundary_rotation(SECRET, RunId("cd" * 32), 0, 0, k))
        assert all(float((other - matrix(0, 0, k)).abs().max()) > 1e-2 for other in others)


def test_a_rotation_stays_what_it_was() -> None:
    """Workers of different versions derive it: these numbers are part of the protocol."""
    expected = [[0.6211, 0.2168, -0.7532], [-0.5990, -0.4884, -0.6345], [0.5054, -0.8453, 0.1734]]
    np.testing.assert_allclose(matrix(0, 0, 3).numpy(), expected, atol=1e-4)


def test_rotations_point_everywhere() -> None:
    """The mean square of every entry is 1/k, as for any direction-free choice; the mean is 0 but for the diagonal."""
    many = torch.stack([matrix(0, epoch, 4) for epoch in range(2000)])
    assert float((many.square().mean(0) - 0.25).abs().max()) < 0.03


def test_moments_turn_as_documented() -> None:
    """Gradients with independent components: m is exact, and v is the mean square along the new axes."""
    rotation, random = matrix(0, 0, 4), np.random.default_rng(0)
    spread = np.array([1.0, 2.0, 4.0, 8.0])
    gradients = torch.from_numpy(random.standard_normal((200_000, 4)) * spread)
    mean, square = gradients.mean(0)[None], gradients.square().mean(0)[None]
    along = gradients @ rotation
    torch.testing.assert_close(turned("adam.exp_avg.codecs.1.decode", mean, rotation), along.mean(0)[None])
    found = turned("adam.exp_avg_sq.codecs.1.decode", square, rotation)
    torch.testing.assert_close(found, along.square().mean(0)[None], rtol=0.02, atol=0.0)
    assert float(found.sum()) == pytest.approx(float(square.sum()))
    torch.testing.assert_close(turned("params.codecs.0.encode", mean.T, rotation), (mean @ rotation).T)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_turn_is_refused_and_nothing_changes() -> None:
    first, middle = (StageTrainer(described(), stage, steps=5) for stage in (0, 1))
    saved, good = middle.save(), matrix(0, 0)
    with pytest.raises(Invalid, match="no boundary"):
        first.rotate(entering=good)
    with pytest.raises(Invalid, match="no boundary"):
        StageTrainer(described(), 2, steps=5).rotate(leaving=good)
    for wrong in (good[:4], good.to(torch.float32), good * 1.001, good * math.nan):
        with pytest.raises(Invalid, match="a rotation is"):
            middle.rotate(entering=good, leaving=wrong)
    assert middle.save() == saved
    for kind in ("dense", "reparam"):
        spec = tiny_spec(3).model_copy(update={"codec": preset_codec(kind, 8)})  # type: ignore[arg-type]
        with pytest.raises(Invalid, match=f"not {kind}"):
            StageTrainer(spec, 1, steps=5).rotate(entering=good)
    with pytest.raises(Invalid, match="32 bytes, not 31"):
        boundary_rotation(SECRET[:31], RUN, 0, 0, 8)
    with pytest.raises(Invalid, match="at least one number"):
        boundary_rotation(SECRET, RUN, 0, 0, 0)


def test_a_step_that_has_begun_does_not_turn() -> None:
    trainer = StageTrainer(described(), 0, steps=5)
    trainer.forward(0, 0, text(0), None)
    with pytest.raises(Conflict, match="has begun"):
        trainer.rotate(leaving=matrix(0, 0))
    trainer.reset_step()
    trainer.rotate(leaving=matrix(0, 0))
