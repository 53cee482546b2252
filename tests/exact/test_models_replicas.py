"""Replicas of a stage against one trainer that sees all microbatches, and against each other.

Replicas are equal to the bit. Against one trainer the sums run in another order: 1e-5 of the largest entry.
"""

import numpy as np
import pytest
import torch

from tessera.core.errors import Conflict, Invalid
from tessera.models.config import AveragingConfig, CodecConfig, ModelSpec
from tessera.models.pipeline import Pipeline
from tessera.models.presets import tiny_spec
from tessera.models.swarm import Swarm
from tessera.models.trainer import StageTrainer

STEPS = 3
SPARSE = AveragingConfig(partitions=4, state="float32", moments=True)


def spec(codec: str = "codec") -> ModelSpec:
    return tiny_spec(2, codec=codec)  # type: ignore[arg-type]


def lossless() -> ModelSpec:
    return tiny_spec(2).model_copy(update={"codec": CodecConfig(kind="dense", wire="float32")})


def batch(step: int, microbatches: int = 4) -> list[np.ndarray]:
    return [np.random.default_rng([step, m]).integers(0, 300, (2, 17)) for m in range(microbatches)]


def learn(swarm: Swarm, step: int, microbatches: int = 4) -> None:
    for index, ids in enumerate(batch(step, microbatches)):
        swarm.learn(step, index, ids)


def worst(ours: StageTrainer, theirs: StageTrainer) -> float:
    """The largest difference of any parameter, in parts of that parameter's largest entry."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(ours.stage.parameters(), theirs.stage.parameters(), strict=True)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_replicas_train_like_one(replicas: int) -> None:
    one, many = Pipeline(lossless(), steps=STEPS), Swarm(lossless(), replicas, steps=STEPS)
    for step in range(STEPS):
        assert many.train_step(step, batch(step)) == pytest.approx(one.train_step(step, batch(step)), rel=1e-6)
    for row, alone in zip(many.trainers, one.trainers, strict=True):
        assert worst(row[0], alone) < 1e-5
        assert len({trainer.save() for trainer in row}) == 1, "replicas differ"


@pytest.mark.parametrize("number", ["float32", "bfloat16"])
@pytest.mark.parametrize("robust", [False, True])
def test_a_ghost_with_the_parts_of_the_steps_that_it_missed_equals_its_replicas(number: str, robust: bool) -> None:
    averaging = AveragingConfig(gradient=number, robust=robust)  # type: ignore[arg-type]
    swarm = Swarm(spec(), 3, steps=STEPS, averaging=averaging)
    swarm.train_step(0, batch(0))
    for row in swarm.trainers:
        ghost = StageTrainer(spec(), row[0].stage.index, steps=STEPS, averaging=averaging)
        ghost.load(row[0].save())
        row.append(ghost)
    losses = []
    for step in (1, 2):
        learn(swarm, step)
        for first, *others, ghost in swarm.trainers:
            parts = [trainer.gradient() for trainer in (first, *others)]
            losses = [trainer.finish_step_with(step, parts) for trainer in (first, *others, ghost)]
    assert len(set(losses)) == 1
    assert losses[0] is not None
    for row in swarm.trainers:
        assert len({trainer.save() for trainer in row}) == 1


def test_an_idle_replica_takes_part_with_zeros() -> None:
    """One microbatch and two replicas: the step is that of one trainer, to the bit."""
    one, two = Pipeline(spec(), steps=1), Swarm(spec(), 2, steps=1)
    two.train_step(0, batch(0, 1))
    one.train_step(0, batch(0, 1))
    for row, alone in zip(two.trainers, one.trainers, strict=True):
        assert [trainer.save() for trainer in row] == [alone.save()] * 2


def test_a_step_in_which_nobody_did_anything_is_refused() -> None:
    trainer = StageTrainer(spec(), 0, steps=1)
    with pytest.raises(Conflict, match="any replica"):
        trainer.finish_step_with(0, [trainer.gradient(), trainer.gradient()])
    assert trainer.step == 0


def test_a_part_may_be_asked_for_again_after_more_microbatches() -> None:
    """A neighbour died, and what it had begun comes to us: our first part is void, the second holds everything."""
    spared, whole = (Swarm(spec(), 1, steps=1) for _ in range(2))
    learn(spared, 0, 1)
    early = [row[0].gradient() for row in spared.trainers]
    spared.learn(0, 1, batch(0)[1])
    learn(whole, 0, 2)
    late = [row[0].gradient() for row in spared.trainers]
    assert late != early
    assert late == [row[0].gradient() for row in whole.trainers]


def test_a_gradient_waits_for_the_microbatches_in_flight() -> None:
    trainer = StageTrainer(spec(), 0, steps=1)
    trainer.forward(0, 0, batch(0)[0], None)
    with pytest.raises(Conflict, match="in flight"):
        trainer.gradient()
    with pytest.raises(Conflict, match="in flight"):
        trainer.finish_step_with(0, [])


def drifted() -> list[StageTrainer]:
    """Two replicas of stage 0 after two steps each of their own: in the first, the head passes no gradient back."""
    swarm = Swarm(spec(), 2, steps=STEPS, averaging=SPARSE)
    for step in range(2):
        learn(swarm, step)
        for row in swarm.trainers:
            for trainer in row:
                trainer.finish_step(step, 10_000)
    a, b = swarm.trainers[0]
    assert worst(a, b) > 1e-4
    return [a, b]


def state(trainer: StageTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer._engine.state().items()}


def test_all_partitions_together_make_replicas_equal() -> None:
    a, b = drifted()
    before = state(a), state(b)
    sizes = 0
    for round_ in range(4):
        parts = a.partition(round_), b.partition(round_)
        assert len(parts[0]) == len(parts[1]) == a.partition_bytes(round_)
        sizes += len(parts[0])
        a.merge(round_, parts[0], [parts[1]])
        b.merge(round_, parts[1], [parts[0]])
    averaged = [n for n in before[0] if not n.startswith("adam.step")]
    assert sizes == 4 * sum(before[0][name].numel() for name in averaged), "each entry goes once"
    for name in averaged:
        mean = (before[0][name] + before[1][name]) / 2
        torch.testing.assert_close(state(a)[name], mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state(b)[name], mean, rtol=1e-5, atol=1e-7)


def test_an_average_that_arrives_late_keeps_what_was_learned_meanwhile() -> None:
    """The delta rule, entry by entry: θ_now + (mean − θ_then)."""
    a, b = drifted()
    own, other, then = a.partition(0), b.partition(0), state(a)
    theirs = state(b)
    code = a.forward(2, 0, batch(2)[0], None)
    assert code is not None
    a.backward(2, 0, code)  # any bytes of the right size are a gradient
    with pytest.raises(Conflict, match="under way"):
        a.merge(0, own, [other])
    a.finish_step(2, 32)
    now = state(a)
    a.merge(0, own, [other])
    moved = 0
    for name, tensor in state(a).items():
        hit = tensor != now[name]
        moved += int(hit.sum())
        expected = now[name] + (theirs[name] - then[name]) / 2
        if name.startswith("adam.exp_avg_sq"):
            expected = expected.clamp(min=0)
        torch.testing.assert_close(tensor[hit], expected[hit], rtol=1e-5, atol=1e-7)
    assert moved > 0


@pytest.mark.parametrize("number", ["bfloat16", "int8"])
def test_equal_replicas_are_not_moved_by_what_rounding_does_on_the_wire(number: str) -> None:
    a, _ = drifted()
    averaging = AveragingConfig(partitions=4, state=number, moments=True)  # type: ignore[arg-type]
    rounded = StageTrainer(spec(), 0, steps=STEPS, averaging=averaging)
    rounded.load(a.save())
    before = rounded.save()
    for round_ in range(4):
        own = rounded.partition(round_)
        rounded.merge(round_, own, [own, own])
    assert rounded.save() == before


@pytest.mark.parametrize("number", ["float32", "bfloat16", "int8"])
def test_wrong_bytes_from_a_replica_change_nothing(number: str) -> None:
    averaging = AveragingConfig(partitions=4, robust=number == "int8", state=number)  # type: ignore[arg-type]
    trainer = StageTrainer(spec(), 0, steps=STEPS, averaging=averaging)
    before = trainer.save()
    own, part = trainer.partition(0), trainer.gradient()
    nan = b"\xff" * len(own)
    for bad in (own[:-1], own + b"\0", b"", nan):
        with pytest.raises(Invalid):
            trainer.check_partition(0, bad)
        with pytest.raises(Invalid):
            trainer.merge(0, own, [bad])
    for bad in (part[:-1], part + b"\0", b"", b"\xff" * len(part), part[:16] + b"\xff" * (len(part) - 16)):
        with pytest.raises(Invalid):
            trainer.check_gradient(bad, 2**50)
        with pytest.raises(Invalid):
            trainer.finish_step_with(0, [part, bad])
    assert trainer.save() == before


def test_a_part_may_not_claim_more_tokens_than_the_step_has() -> None:
    trainer = StageTrainer(spec(), 0, steps=1)
    liar = (65).to_bytes(8, "little") + trainer.gradient()[8:]
    with pytest.raises(Invalid, match="65 tokens: the step has 64"):
        trainer.check_gradient(liar, 64)
    assert trainer.check_gradient(liar, 65) == 65


def test_squares_under_zero_are_refused() -> None:
    trainer = StageTrainer(spec(), 0, steps=1, averaging=AveragingConfig(partitions=1, state="float32", moments=True))
    minus = np.full(trainer.partition_bytes(0) // 4, -1.0, "<f4").tobytes()
    with pytest.raises(Invalid, match="mean of squares"):
        trainer.check_partition(0, minus)


def test_numbers_that_overflow_in_the_sum_are_refused() -> None:
    trainer = StageTrainer(spec(), 0, steps=1, averaging=AveragingConfig(partitions=1, state="float32", moments=True))
    huge = np.full(trainer.partition_bytes(0) // 4, 3e38, "<f4").tobytes()
    before = trainer.save()
    with pytest.raises(Invalid, match="not finite"):
        trainer.merge(0, trainer.partition(0), [huge, huge, huge])
    part = trainer.gradient()
    head, numbers = (32).to_bytes(8, "little") + bytes(8), np.full((len(part) - 16) // 4, 3e38, "<f4").tobytes()
    with pytest.raises(Invalid, match="not finite"):
        trainer.finish_step_with(0, [head + numbers, head + numbers])
    assert trainer.save() == before
