"""A stage sends the same bytes and learns the same numbers, however many graphs it keeps."""

import numpy as np
import pytest

from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.presets import preset_codec, tiny_spec
from tessera.models.trainer import StageTrainer
from tessera.models.wire import Wire

FLOAT_WIRE = CodecConfig(kind="dense", wire="float32")


def spec(codec: CodecConfig, compute: str) -> ModelSpec:
    base = tiny_spec(3)
    return base.model_copy(update={"codec": codec, "model": base.model.model_copy(update={"compute": compute})})


def train(trainer: StageTrainer) -> list[bytes | None]:
    """Three microbatches in flight at once, gradients in another order, two steps, one of them begun twice."""
    random, wire, shape = np.random.default_rng(3), Wire(trainer.spec), (2, 16, trainer.spec.message_width)
    messages: list[bytes | None] = []
    for step in (0, 0, 1):
        if len(messages) == 6:
            trainer.reset_step()
            random = np.random.default_rng(3)
        for index in range(3):
            ids = random.integers(0, trainer.spec.model.vocab_size, (2, 17))
            entered = None if trainer.stage.first else wire.pack(_tensor(random, shape))
            messages.append(trainer.forward(step, index, ids, entered))
        for index in (1, 0, 2):
            gradient = None if trainer.stage.last else wire.pack(_tensor(random, shape), ("test", index))
            messages.append(trainer.backward(step, index, gradient))
        if len(messages) > 6:
            trainer.finish_step(step, 96)
    return messages


def _tensor(random: np.random.Generator, shape: tuple[int, ...]):  # type: ignore[no-untyped-def]
    import torch

    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", [preset_codec("codec", 8), preset_codec("reparam", 8), FLOAT_WIRE])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_recomputing_changes_no_byte(stage: int, codec: CodecConfig, compute: str) -> None:
    described = spec(codec, compute)
    plain, *others = (StageTrainer(described, stage, steps=5, graphs=graphs) for graphs in (3, 2, 1, 0))
    sent, saved = train(plain), plain.save()
    for other in others:
        assert train(other) == sent
        assert other.save() == saved


def test_nothing_but_codes_is_in_flight() -> None:
    trainer = StageTrainer(tiny_spec(3), 1, steps=5, graphs=0)
    payload = bytes(trainer.payload_limit(2, 16))
    trainer.forward(0, 0, np.ones((2, 17), np.int64), payload)
    assert trainer._engine._open == {}  # type: ignore[attr-defined]
    assert trainer._open[0].codes is not None
    assert trainer._open[0].codes[1] is payload


def test_a_graph_that_is_used_up_makes_room_for_another() -> None:
    trainer = StageTrainer(tiny_spec(3), 1, steps=5, graphs=1)
    payload, ids = bytes(trainer.payload_limit(2, 16)), np.ones((2, 17), np.int64)

    def kept() -> list[int]:
        return sorted(trainer._engine._open)  # type: ignore[attr-defined]

    for index in range(3):
        trainer.forward(0, index, ids, payload)
        assert kept() == [0]
    trainer.backward(0, 1, payload)
    assert kept() == [0]
    trainer.backward(0, 0, payload)
    trainer.forward(0, 3, ids, payload)
    assert kept() == [3]
    trainer.reset_step()
    trainer.forward(0, 2, ids, payload)
    assert kept() == [2]


def test_fewer_than_no_graphs_are_refused() -> None:
    with pytest.raises(Invalid, match="0 or more microbatches, not of -1"):
        StageTrainer(tiny_spec(3), 1, steps=5, graphs=-1)
