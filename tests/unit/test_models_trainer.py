"""What a worker may call, in which order, and what it gets back."""

import dataclasses
import math

import numpy as np
import pytest

from tessera.core.errors import Conflict, Invalid, Missing
from tessera.models.config import ModelSpec
from tessera.models.pipeline import Pipeline
from tessera.models.presets import DEFAULT_BATCH, tiny_spec
from tessera.models.trainer import StageTrainer

SPEC = tiny_spec(2)


def ids(seed: int = 0, sequences: int = 2, length: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SPEC.model.vocab_size, (sequences, length + 1))


def pair(spec: ModelSpec = SPEC, steps: int = 10) -> tuple[StageTrainer, StageTrainer]:
    first, last = (StageTrainer(spec, stage, steps=steps) for stage in range(2))
    return first, last


def round_trip(first: StageTrainer, last: StageTrainer, step: int, index: int) -> tuple[bytes, bytes]:
    code = first.forward(step, index, ids(index), None)
    assert code is not None
    assert last.forward(step, index, ids(index), code) is None
    gradient = last.backward(step, index, None)
    assert gradient is not None
    assert first.backward(step, index, gradient) is None
    return code, gradient


def test_an_untrained_model_guesses_evenly() -> None:
    assert Pipeline(SPEC, steps=1).evaluate(ids()) == pytest.approx(math.log(SPEC.model.vocab_size), abs=1e-5)


def test_messages_have_exactly_the_announced_size() -> None:
    first, last = pair()
    for message in round_trip(first, last, 0, 0):
        assert len(message) == first.payload_limit(2, 16) == 2 * 16 * SPEC.message_bytes_per_token()


def test_a_replayed_step_gives_the_same_bytes() -> None:
    def run() -> list[tuple[bytes, bytes]]:
        first, last = pair()
        messages = []
        for step in range(3):
            messages += [round_trip(first, last, step, index) for index in range(2)]
            assert first.finish_step(step, 64) is None
            last.finish_step(step, 64)
        return messages

    assert run() == run()


def test_rounding_noise_differs_between_microbatches() -> None:
    """Equal gradients of two microbatches are rounded differently, so that errors average out."""
    spec = SPEC.model_copy(update={"seed": 5})
    first, last = pair(spec)
    round_trip(first, last, 0, 0)
    for trainer in (first, last):
        trainer.finish_step(0, 32)
    gradients = []
    for index in (0, 1):
        code = first.forward(1, index, ids(), None)
        last.forward(1, index, ids(), code)
        gradients.append(last.backward(1, index, None))
    assert gradients[0] != gradients[1]


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened() -> None:
    first, last = pair()
    for step in range(2):
        round_trip(first, last, step, 0)
        first.finish_step(step, 32)
        last.finish_step(step, 32)
    saved = first.save(), last.save()
    expected = round_trip(first, last, 2, 0)
    again = pair()
    for trainer, data in zip(again, saved, strict=True):
        trainer.load(data)
        assert trainer.step == 2
        assert trainer.save() == data
    assert round_trip(*again, 2, 0) == expected


def test_a_dropped_step_starts_again_from_its_first_microbatch() -> None:
    first, last = pair()
    code, gradient = round_trip(first, last, 0, 0)
    first.forward(0, 1, ids(1), None)
    first.reset_step()
    last.reset_step()
    assert round_trip(first, last, 0, 0) == (code, gradient)
    loss = last.finish_step(0, 32)
    assert loss == pytest.approx(math.log(SPEC.model.vocab_size), abs=1e-5)


def test_the_mean_gradient_does_not_depend_on_how_a_step_is_cut() -> None:
    spec = SPEC.model_copy(update={"codec": SPEC.codec.model_copy(update={"wire": "float32"})})
    whole, parts = Pipeline(spec, steps=2), Pipeline(spec, steps=2)
    rows = ids(sequences=4)
    for step in range(2):
        together = whole.train_step(step, [rows])
        apart = parts.train_step(step, [rows[:1], rows[1:4]])
    assert apart == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 1), np.int64),
        [[1, 2, 3], [1, 2]],
        [[2**70, 1]],
        "text",
        None,
        np.zeros((0, 8), np.int64),
        np.zeros((1, SPEC.model.context + 2), np.int64),
        np.zeros(8, np.int64),
        np.zeros((2, 8), np.float32),
        np.zeros((2, 8), np.bool_),
        np.full((2, 8), -1),
        np.full((2, 8), SPEC.model.vocab_size),
    ],
)
def test_ids_that_do_not_fit_the_model_are_refused(bad: np.ndarray) -> None:
    first, _ = pair()
    with pytest.raises(Invalid, match="token ids"):
        first.forward(0, 0, bad, None)
    round_trip(*pair(), 0, 0)


def test_payloads_are_expected_exactly_where_a_boundary_is() -> None:
    first, last = pair()
    code = first.forward(0, 0, ids(), None)
    with pytest.raises(Invalid, match="no payload expected"):
        first.forward(0, 1, ids(), code)
    with pytest.raises(Invalid, match="needs the message"):
        last.forward(0, 0, ids(), None)
    last.forward(0, 0, ids(), code)
    with pytest.raises(Invalid, match="no payload expected"):
        last.backward(0, 0, code)
    with pytest.raises(Invalid, match="needs the gradient"):
        first.backward(0, 0, None)
    assert first.backward(0, 0, last.backward(0, 0, None)) is None


def test_calls_out_of_order_are_refused_and_change_nothing() -> None:
    first, last = pair()
    with pytest.raises(Conflict, match="step 1 is not open"):
        first.forward(1, 0, ids(), None)
    with pytest.raises(Missing, match="not in flight"):
        first.backward(0, 0, b"")
    code = first.forward(0, 0, ids(), None)
    with pytest.raises(Conflict, match="already"):
        first.forward(0, 0, ids(), None)
    with pytest.raises(Conflict, match="still in flight"):
        first.finish_step(0, 32)
    last.forward(0, 0, ids(), code)
    first.backward(0, 0, last.backward(0, 0, None))
    with pytest.raises(Conflict, match="already"):
        first.forward(0, 0, ids(), None)
    with pytest.raises(Invalid, match="at least one token"):
        first.finish_step(0, 0)
    with pytest.raises(Conflict, match="31 tokens, but 32 came"):
        last.finish_step(0, 31)
    assert first.finish_step(0, 32) is None
    assert last.finish_step(0, 32) is not None


def test_a_step_without_microbatches_is_refused() -> None:
    first, _ = pair()
    with pytest.raises(Conflict, match="no microbatch"):
        first.finish_step(0, 32)
    assert first.step == 0


def test_a_microbatch_that_got_lost_weighs_nothing() -> None:
    """Two came and one of them never returned: the step is that of the other alone."""
    lost, alone = pair(), pair()
    assert lost[0].forward(0, 1, ids(1), None) is not None
    with pytest.raises(Missing, match="not in flight"):
        lost[0].drop(0, 7)
    lost[0].drop(0, 1)
    for first, last in (lost, alone):
        round_trip(first, last, 0, 0)
    losses = [lost[1].finish_step(0, 64), alone[1].finish_step(0, 32)]
    lost[0].finish_step(0, 64)
    alone[0].finish_step(0, 32)
    assert losses[0] == losses[1]
    assert [t.save() for t in lost] == [t.save() for t in alone]


def test_a_lost_microbatch_may_start_again() -> None:
    first, last = pair()
    first.forward(0, 0, ids(0), None)
    first.drop(0, 0)
    round_trip(first, last, 0, 0)
    last.forward(0, 1, ids(1), first.forward(0, 1, ids(1), None))
    last.drop(0, 1)
    with pytest.raises(Conflict, match="already"):  # the last stage has its gradient in the sums
        last.forward(0, 1, ids(1), pair()[0].forward(0, 1, ids(1), None))
    assert last.finish_step(0, 64) is not None


def test_a_run_ends_after_its_steps() -> None:
    first, last = pair(steps=1)
    round_trip(first, last, 0, 0)
    first.finish_step(0, 32)
    first.forward(1, 0, ids(), None)
    first.reset_step()
    round_trip_loss = last.finish_step(0, 32)
    assert round_trip_loss is not None
    code = first.forward(1, 0, ids(), None)
    last.forward(1, 0, ids(), code)
    last.backward(1, 0, None)
    with pytest.raises(Conflict, match="is over"):
        last.finish_step(1, 32)


def test_divergence_is_an_error_and_not_a_number() -> None:
    first, last = pair()
    first.stage.get_parameter("layers.0.out").data.fill_(float("inf"))
    with pytest.raises(Invalid, match="diverged"):
        first.forward(0, 0, ids(), None)
    code = pair()[0].forward(0, 0, ids(), None)
    last.stage.get_parameter("head").data.fill_(float("inf"))
    with pytest.raises(Invalid, match="diverged"):
        last.forward(0, 0, ids(), code)


def test_evaluating_learns_nothing() -> None:
    first, last = pair()
    before = first.save(), last.save()
    code = first.evaluate(ids(), None)
    assert isinstance(code, bytes)
    result = last.evaluate(ids(), code)
    assert isinstance(result, tuple)
    assert result[1] == 32
    assert (first.save(), last.save()) == before


def test_bad_stages_and_runs_are_refused() -> None:
    with pytest.raises(Invalid, match="does not exist"):
        StageTrainer(SPEC, 2, steps=1)
    with pytest.raises(Invalid, match="at least one step"):
        StageTrainer(SPEC, 0, steps=0)


def test_a_batch_shape_knows_its_tokens() -> None:
    assert dataclasses.replace(DEFAULT_BATCH, sequences=2, length=3, microbatches=4).tokens_per_step == 24
