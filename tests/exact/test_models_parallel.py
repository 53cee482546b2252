"""Two processes behind one worker against one process: bytes to the neighbours, losses, parameters, checkpoints.

Rank 0 is this process; the other is a real one, and they talk over gloo. Tolerances: a first forward to the bit; losses
and parameters within 1e-5 relative after some steps over a lossless wire, because gradients are summed in another
order; the codes of an int8 wire within one level.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rank_world import two_ranks
from tessera.core.errors import Conflict, Invalid
from tessera.core.ids import RunId
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.decode import StageDecoder
from tessera.models.parallel import LeadEngine, build_trainer
from tessera.models.parallel_link import RankLink
from tessera.models.presets import preset_codec, tiny_spec
from tessera.models.rotation import boundary_rotation
from tessera.models.trainer import StageTrainer
from tessera.models.wire import Wire

STEPS, MICROBATCHES, SEQUENCES, LENGTH = 3, 3, 3, 16  # three sequences on two ranks: an uneven deal


@pytest.fixture(scope="module")
def link() -> Iterator[RankLink]:
    with two_ranks() as (link, _):
        yield link


def spec(codec: CodecConfig, compute: str = "float32") -> ModelSpec:
    base = tiny_spec(3)
    return base.model_copy(update={"codec": codec, "model": base.model.model_copy(update={"compute": compute})})


LOSSLESS = CodecConfig(kind="dense", wire="float32")
CODES = preset_codec("codec", 8)


def shared(link: RankLink, described: ModelSpec, stage: int, mode: str, graphs: int = 9) -> StageTrainer:
    engine = LeadEngine(link, described, stage, STEPS, mode == "shard")
    return StageTrainer(described, stage, steps=STEPS, graphs=graphs, engine=engine)


def inputs(described: ModelSpec, stage: int, step: int, index: int) -> tuple[Any, bytes | None, bytes | None]:
    """Ids, what enters, and the gradient that comes back; the same for whoever asks."""
    random, wire = np.random.default_rng([stage, step, index]), Wire(described)
    shape = (SEQUENCES, LENGTH, described.message_width)
    ids = random.integers(0, described.model.vocab_size, (SEQUENCES, LENGTH + 1))
    entered, gradient = (torch.from_numpy(random.standard_normal(shape).astype(np.float32)) for _ in range(2))
    last = stage == described.stages - 1
    return ids, wire.pack(entered) if stage else None, None if last else wire.pack(gradient * 1e-2)


def train(trainer: StageTrainer, steps: int = STEPS) -> tuple[list[bytes], list[bytes], list[float]]:
    """Everything that left: forwards, gradients, losses."""
    described, stage = trainer.spec, trainer.stage.index
    forwards, gradients, losses = list[bytes](), list[bytes](), list[float]()
    for step in range(trainer.step, steps):
        asked = [inputs(described, stage, step, index) for index in range(MICROBATCHES)]
        for index, (ids, entered, _) in enumerate(asked):
            if (out := trainer.forward(step, index, ids, entered)) is not None:
                forwards.append(out)
        for index in (1, 0, 2):
            if (back := trainer.backward(step, index, asked[index][2])) is not None:
                gradients.append(back)
        loss = trainer.finish_step(step, MICROBATCHES * SEQUENCES * LENGTH)
        losses += [] if loss is None else [loss]
    return forwards, gradients, losses


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        worst = float((ours[name].to(torch.float32) - tensor.to(torch.float32)).abs().max())
        assert worst <= relative * float(tensor.abs().max()) + 1e-9, f"{name} differs by {worst}"


def unpacked(described: ModelSpec, messages: list[bytes]) -> dict[str, Tensor]:
    wire = Wire(described)
    return {str(i): wire.unpack(data, SEQUENCES, LENGTH) for i, data in enumerate(messages)}


@pytest.mark.slow
def test_two_processes_are_one_worker(link: RankLink) -> None:
    """In short what the slow tests take apart: both modes, the last stage, a checkpoint that changes sides."""
    for mode in ("replicate", "shard"):
        check_training(link, 2, mode)
    check_checkpoints(link, "shard")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_processes_train_like_one(link: RankLink, stage: int, mode: str) -> None:
    check_training(link, stage, mode)


def check_training(link: RankLink, stage: int, mode: str) -> None:
    described = spec(LOSSLESS)
    alone, both = StageTrainer(described, stage, steps=STEPS), shared(link, described, stage, mode)
    theirs, ours = train(alone), train(both)
    assert ours[0][:MICROBATCHES] == theirs[0][:MICROBATCHES], "the first forwards, before any sum differs"
    assert_near(unpacked(described, ours[0]), unpacked(described, theirs[0]))
    assert_near(unpacked(described, ours[1]), unpacked(described, theirs[1]))
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)
    assert_near(both._engine.state(), alone._engine.state())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_codes_are_the_same_bytes_as_long_as_the_parameters_are(link: RankLink, mode: str) -> None:
    described = spec(CODES)
    theirs = train(StageTrainer(described, 1, steps=STEPS), 1)
    ours = train(shared(link, described, 1, mode), 1)
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    again = train(shared(link, described, 1, mode, graphs=1), 1)
    assert again == ours


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_shared_stage_turns_its_boundaries_like_one_process(link: RankLink, mode: str) -> None:
    described = spec(CODES)
    alone, both = StageTrainer(described, 1, steps=STEPS), shared(link, described, 1, mode)
    train(alone, 1)
    both.load(alone.save())
    turns = [boundary_rotation(bytes(32), RunId("ab" * 32), boundary, 1, 8) for boundary in (0, 1)]
    before = both.save()
    for trainer in (alone, both):
        trainer.rotate(entering=turns[0], leaving=turns[1])
        trainer.rotate(leaving=turns[0])
    assert both.save() == alone.save() != before
    train(both)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_checkpoint_of_either_loads_in_the_other(link: RankLink, mode: str) -> None:
    check_checkpoints(link, mode)


def check_checkpoints(link: RankLink, mode: str) -> None:
    described = spec(CODES)
    alone, both = StageTrainer(described, 2, steps=STEPS), shared(link, described, 2, mode)
    train(alone, 2)
    both.load(alone.save())
    assert both.step == 2
    assert both.save() == alone.save()
    train(both)
    other = StageTrainer(described, 2, steps=STEPS)
    other.load(both.save())
    assert other.save() == both.save()
    train(alone)
    assert_near(both._engine.state(), alone._engine.state())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_evaluating_and_starting_again_leave_nothing_behind(link: RankLink, mode: str) -> None:
    """In a sharded stage, parameters that stay put together would hide the next step."""
    described = spec(LOSSLESS)
    alone, both = StageTrainer(described, 2, steps=STEPS), shared(link, described, 2, mode)
    for trainer in (alone, both):
        train(trainer, 1)
        ids, entered, _ = inputs(described, 2, 9, 9)
        trainer.evaluate(ids, entered)
        trainer.forward(1, 0, ids, entered)
        trainer.reset_step()
        train(trainer, 2)
    ids, entered, _ = inputs(described, 2, 8, 8)
    ours, theirs = both.evaluate(ids, entered), alone.evaluate(ids, entered)
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_rank_without_a_sequence_changes_nothing(link: RankLink, mode: str) -> None:
    described = spec(LOSSLESS)
    alone, both = StageTrainer(described, 2, steps=STEPS), shared(link, described, 2, mode)
    for trainer in (alone, both):
        ids, entered, _ = inputs(described, 2, 0, 0)
        one = None if entered is None else entered[: len(entered) // SEQUENCES]
        for step in range(2):
            trainer.forward(step, 0, ids[:1], one)
            trainer.backward(step, 0, None)
            trainer.finish_step(step, LENGTH)
    assert_near(both._engine.state(), alone._engine.state())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_errors_are_raised_at_rank_0_and_both_go_on(link: RankLink, mode: str) -> None:
    described = spec(LOSSLESS)
    both = shared(link, described, 2, mode)
    ids, entered, _ = inputs(described, 2, 0, 0)
    assert entered is not None
    with pytest.raises(Invalid, match="needs the message"):
        both.forward(0, 0, ids, None)
    with pytest.raises(Conflict, match="no gradient"):
        both._engine.finish(0, 1)
    huge = np.frombuffer(entered, "<f4").copy()
    state = both._engine.state()
    state["params.head"] = torch.full_like(state["params.head"], 3e38)
    both._engine.load(state)
    with pytest.raises(Invalid, match="diverged"):
        both.forward(0, 0, ids, huge.tobytes())
    with pytest.raises(Invalid, match="checkpoint"):
        both.load(b"nonsense")
    both.load(StageTrainer(described, 2, steps=STEPS).save())
    train(both, 1)
    with pytest.raises(Conflict, match="is over"):
        both._engine.finish(STEPS, 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_shared_stage_decodes_like_one_process(link: RankLink, mode: str) -> None:
    described = spec(CODES)
    alone, both = StageTrainer(described, 0, steps=STEPS), shared(link, described, 0, mode)
    both.load(alone.save())
    texts = [StageDecoder(trainer, max_sessions=1).step("s", [5, 6, 7], None) for trainer in (alone, both)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_trainer_is_built_on_all_ranks(link: RankLink) -> None:
    described = spec(CODES)
    schedule = {"steps": STEPS, "sequences": 3, "length": 16, "microbatches": 3, "device": "cpu"}
    both = build_trainer(described, 1, **schedule, link=link)  # type: ignore[arg-type]
    assert type(both._engine) is LeadEngine
    assert not both._engine._shard
    assert build_trainer(described, 1, **schedule, link=link, parallel="shard")._engine._shard  # type: ignore
    assert build_trainer(described, 1, **schedule).graphs == 3  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="parallel is one of"):
        build_trainer(described, 1, **schedule, parallel="both")  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="RAM"):
        build_trainer(described, 1, **schedule, link=link, limit_bytes=1000)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="does not exist"):
        build_trainer(described, 3, **schedule, link=link)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stage_on_two_processes_is_a_replica_like_any_other(link: RankLink) -> None:
    """Its parts count in the others' steps, theirs in its own, and so do partitions of the state."""
    described = spec(LOSSLESS)
    for mode in ("replicate", "shard"):
        alone, both = StageTrainer(described, 1, steps=STEPS), shared(link, described, 1, mode)
        for step in range(STEPS):
            for index in range(2 * MICROBATCHES):
                trainer = (alone, both)[index % 2]
                ids, entered, gradient = inputs(described, 1, step, index)
                trainer.forward(step, index, ids, entered)
                trainer.backward(step, index, gradient)
            parts = [alone.gradient(), both.gradient()]
            assert parts[1] == both.gradient(), "asking changes nothing"
            for trainer in (alone, both):
                trainer.finish_step_with(step, parts)
            assert_near(both._engine.state(), alone._engine.state())
        check_merge(alone, both)


def check_merge(alone: StageTrainer, both: StageTrainer) -> None:
    """One has gone astray; half of the way back is the other's."""
    before = {name: tensor.detach().clone() for name, tensor in alone._engine.state().items()}
    with torch.no_grad():
        for parameter in alone.stage.parameters():
            parameter += 1.0
    for round_ in range(alone.averaging.partitions):
        parts = alone.partition(round_), both.partition(round_)
        alone.merge(round_, parts[0], [parts[1]])
        both.merge(round_, parts[1], [parts[0]])
    middle = {name: t + 0.5 if name.startswith("params.") else t for name, t in before.items()}
    for trainer in (alone, both):
        assert_near(trainer._engine.state(), middle, 1e-2)  # bfloat16 on the wire
