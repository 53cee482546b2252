"""A model cut into stages against the same model in one piece: losses, gradients, text.

`dense` with a float32 wire loses nothing at a boundary, so four stages must equal one. Tolerance: 1e-6 relative on
losses, 1e-5 of the largest entry on gradients; the sums behind both are the same, in another order at most.
"""

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.pipeline import Pipeline
from tessera.models.presets import tiny_spec
from tessera.models.trainer import StageTrainer

STEPS, MICROBATCHES = 3, 2


def spec(stages: int) -> ModelSpec:
    return tiny_spec(stages).model_copy(update={"codec": CodecConfig(kind="dense", wire="float32")})


def ids(step: int, index: int) -> np.ndarray:
    return np.random.default_rng(step * 100 + index).integers(0, 300, (2, 17))


def parameters(pipeline: Pipeline) -> dict[str, Tensor]:
    return {n: p.detach() for t in pipeline.trainers for n, p in t.stage.named_parameters()}


def train(pipeline: Pipeline) -> list[float]:
    return [pipeline.train_step(s, [ids(s, i) for i in range(MICROBATCHES)]) for s in range(STEPS)]


def gradients(pipeline: Pipeline) -> dict[str, Tensor]:
    """Of one microbatch, before any step is finished."""
    payload: bytes | None = None
    for trainer in pipeline.trainers:
        payload = trainer.forward(0, 0, ids(0, 0), payload)
    for trainer in reversed(pipeline.trainers):
        payload = trainer.backward(0, 0, payload)
    return {n: p.grad.clone() for t in pipeline.trainers for n, p in t.stage.named_parameters() if p.grad is not None}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        worst = float((ours[name] - tensor).abs().max())
        assert worst <= relative * float(tensor.abs().max()) + 1e-12, f"{name} differs by {worst}"


def warm(pipeline: Pipeline) -> Pipeline:
    """Output matrices and head start at zero, which would hide most gradients."""
    for trainer in pipeline.trainers:
        for name, parameter in trainer.stage.named_parameters():
            if name.endswith(("out", "down", "head", "pairs")):
                generator = torch.Generator().manual_seed(len(name) * 1_000 + parameter.numel())
                parameter.data.normal_(std=0.1, generator=generator)
    return pipeline


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_start_from_the_values_of_one_process(stages: int) -> None:
    whole, cut = parameters(Pipeline(spec(1), steps=1)), parameters(Pipeline(spec(stages), steps=1))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_have_the_gradients_of_one_process(stages: int) -> None:
    whole, cut = warm(Pipeline(spec(1), steps=1)), warm(Pipeline(spec(stages), steps=1))
    theirs = gradients(whole)
    assert all(float(g.abs().max()) > 0 for n, g in theirs.items() if not n.endswith("taps"))
    assert_near(gradients(cut), theirs, 1e-5)


def test_four_stages_train_like_one_process() -> None:
    whole, cut = Pipeline(spec(1), steps=STEPS), Pipeline(spec(4), steps=STEPS)
    assert train(cut) == pytest.approx(train(whole), rel=1e-6)
    assert_near(parameters(cut), parameters(whole), 1e-5)


def worker(stages: int, stage: int, before: Connection | None, after: Connection | None, report: Connection) -> None:
    """One stage, alone with its pipes."""
    torch.set_num_threads(1)
    trainer = StageTrainer(spec(stages), stage, steps=STEPS)
    losses = []
    for step in range(STEPS):
        for index in range(MICROBATCHES):
            out = trainer.forward(step, index, ids(step, index), before.recv_bytes() if before else None)
            if after is not None:
                assert out is not None
                after.send_bytes(out)
        for index in range(MICROBATCHES):
            out = trainer.backward(step, index, after.recv_bytes() if after else None)
            if before is not None:
                assert out is not None
                before.send_bytes(out)
        losses.append(trainer.finish_step(step, MICROBATCHES * 32))
    report.send((losses, {n: p.detach().numpy() for n, p in trainer.stage.named_parameters()}))


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 4])
def test_as_many_processes_as_stages_train_like_one(stages: int) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(stages - 1)]
    reports = [context.Pipe(duplex=False) for _ in range(stages)]
    processes = [
        context.Process(
            target=worker,
            args=(stages, s, pipes[s - 1][1] if s else None, pipes[s][0] if s < stages - 1 else None, reports[s][1]),
            daemon=True,
        )
        for s in range(stages)
    ]
    for process in processes:
        process.start()
    results = []
    for receive, _ in reports:
        assert receive.poll(90), "a stage did not report in time"
        results.append(receive.recv())
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    whole = Pipeline(spec(1), steps=STEPS)
    assert results[-1][0] == pytest.approx(train(whole), rel=1e-6)
    values = {name: torch.from_numpy(value) for _, part in results for name, value in part.items()}
    assert_near(values, parameters(whole), 1e-5)


@pytest.mark.parametrize("kind", ["codec", "control", "reparam", "ssn"])
def test_a_boundary_passes_the_gradient_of_the_joined_stages(kind: str) -> None:
    """With a float32 wire the bytes carry exactly what autograd would carry across."""
    base = tiny_spec(2, codec=kind)  # type: ignore[arg-type]
    free = base.model_copy(update={"codec": base.codec.model_copy(update={"wire": "float32"})})
    wired, joined = warm(Pipeline(free, steps=1)), warm(Pipeline(free, steps=1))
    theirs = torch.from_numpy(ids(0, 0))
    first, last = (t.stage for t in joined.trainers)
    logits = last(theirs[:, :-1], first(theirs[:, :-1], None))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), theirs[:, 1:].flatten(), reduction="sum").backward()
    plain = {n: p.grad for s in (first, last) for n, p in s.named_parameters() if p.grad is not None}
    assert_near(gradients(wired), plain, 1e-5)


@pytest.mark.parametrize("kind", ["control", "dense", "reparam", "ssn"])
def test_nothing_is_lost_where_the_stream_is_made_to_fit_the_message(kind: str) -> None:
    """Whole streams, and streams that the optimiser or the layers keep in a subspace, arrive as they were."""
    pipeline = Pipeline(tiny_spec(3, codec=kind), steps=4)  # type: ignore[arg-type]
    for step in range(3):
        pipeline.train_step(step, [ids(step, 0)])
    first, second = (trainer.stage for trainer in pipeline.trainers[:2])
    tokens = torch.from_numpy(ids(9, 9))[:, :-1]
    with torch.no_grad():
        message = first(tokens, None)
        entered, known = second.codec.enter(tokens, message)
        x, before = first.codec.enter(tokens, None)
        x = first.through(x, first.rotation(slice(0, x.size(1))))
    expected = x if kind != "control" else x - before + known
    torch.testing.assert_close(entered, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pairs"), [("codec", 0), ("codec", 64), ("control", 64), ("dense", 64), ("reparam", 0), ("ssn", 0)]
)
def test_token_by_token_decoding_equals_reading_the_whole_text(kind: str, pairs: int) -> None:
    spec = tiny_spec(3, codec=kind)  # type: ignore[arg-type]
    codec = spec.codec.model_copy(update={"pairs": pairs})
    pipeline = warm(Pipeline(spec.model_copy(update={"codec": codec}), steps=1))
    prompt = [int(i) for i in ids(0, 0)[0, :9]]
    text = prompt + pipeline.generate(prompt, 12)
    for end in range(len(prompt), len(text)):
        payload: bytes | None = None
        row = torch.tensor([text[:end]])
        for trainer in pipeline.trainers[:-1]:
            result = trainer.evaluate(torch.cat((row, row[:, :1]), 1), payload)
            assert isinstance(result, bytes)
            payload = result
        last = pipeline.trainers[-1]
        with torch.no_grad():
            logits = last.stage(row, last._wire.unpack(payload or b"", 1, end))
        assert int(logits[0, -1].argmax()) == text[end]
