"""Laws of averages that a minority cannot drag away."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import AveragingConfig
from tessera.models.gradients import GradientForm
from tessera.models.presets import tiny_spec
from tessera.models.robust import DistanceHistory, agreeing, centered_clip, clipped_pair
from tessera.models.trainer import StageTrainer

seeds = st.integers(0, 2**32)
huge = st.floats(-38, 38).map(lambda exponent: 10.0**exponent)


def normal(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) + 3 * torch.randn(columns, generator=generator)


def spread(x_ND: Tensor) -> float:
    """The largest distance of two rows."""
    return float(torch.cdist(x_ND[None], x_ND[None]).max())


@given(seeds, st.integers(1, 8), st.integers(1, 200), st.randoms(use_true_random=False))
def test_the_order_of_replicas_does_not_matter(seed: int, rows: int, columns: int, random: object) -> None:
    x = normal(seed, rows, columns)
    other = list(range(rows))
    random.shuffle(other)  # type: ignore[attr-defined]
    torch.testing.assert_close(centered_clip(x[other]), centered_clip(x), rtol=1e-4, atol=1e-4)


@given(seeds, st.integers(1, 8), st.integers(64, 300), st.floats(-3, 3))
def test_honest_replicas_get_their_mean(seed: int, rows: int, columns: int, exponent: float) -> None:
    """In 64 dimensions and more, independent noise puts all of them at about one distance."""
    x = normal(seed, rows, columns) * 10.0**exponent
    torch.testing.assert_close(centered_clip(x), x.mean(0), rtol=1e-4, atol=1e-4 * 10.0**exponent)


@given(seeds, st.integers(64, 300), st.lists(st.integers(1, 9), min_size=3, max_size=6))
def test_honest_replicas_with_weights_get_their_weighted_mean(seed: int, columns: int, weights: list[int]) -> None:
    x, w = normal(seed, len(weights), columns), torch.tensor(weights, dtype=torch.float32)
    torch.testing.assert_close(centered_clip(x, [float(v) for v in weights]), w @ x / w.sum(), rtol=1e-4, atol=1e-4)


@given(seeds, st.integers(1, 100), st.integers(0, 3), huge, st.booleans())
def test_one_of_four_moves_the_average_by_a_bounded_amount(
    seed: int, columns: int, place: int, size: float, alike: bool
) -> None:
    """Whatever it sends; also beside honest replicas that happen to agree."""
    honest = normal(seed, 3, columns) * (1e-6 if alike else 1.0)
    bad = (normal(seed + 1, 1, columns) * size).clamp(-3e38, 3e38)
    x = torch.cat((honest[:place], bad, honest[place:]))
    away = float(torch.linalg.vector_norm(centered_clip(x) - honest.mean(0)))
    assert away <= 2 * spread(honest) + 1e-5 * float(honest.abs().max())


@given(seeds, st.integers(1, 50), st.floats(-1e3, 1e3))
def test_moving_all_replicas_moves_the_average_with_them(seed: int, columns: int, by: float) -> None:
    x = normal(seed, 4, columns)
    x[0] *= 50
    torch.testing.assert_close(centered_clip(x + by), centered_clip(x) + by, rtol=1e-3, atol=2e-3)


@given(seeds, st.integers(1, 100), huge)
def test_of_two_the_longer_counts_twice_the_shorter_at_most(seed: int, columns: int, size: float) -> None:
    a, b = normal(seed, 2, columns)
    b = (b * size).clamp(-3e38, 3e38)
    shorter = min(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (a, b))
    length = float(torch.linalg.vector_norm(clipped_pair(torch.stack((a, b))), dtype=torch.float64))
    assert length <= 1.5 * shorter * (1 + 1e-5)


def test_two_honest_replicas_get_their_mean() -> None:
    a, b = normal(0, 2, 100)
    torch.testing.assert_close(clipped_pair(torch.stack((a, b))), (a + b) / 2)
    torch.testing.assert_close(DistanceHistory().mean("x", a, b), (a + b) / 2)


@given(seeds, st.lists(huge, min_size=1, max_size=30))
def test_a_second_replica_moves_us_little_more_than_it_ever_did(seed: int, lies: list[float]) -> None:
    """After an honest past, lies of any length move us by the usual half distance, doubled; a long row of them, which
    becomes the past, by twice that in every eight rounds."""
    history, own = DistanceHistory(), torch.zeros(64)
    for round_ in range(16):
        history.mean("x", own, normal(seed + round_, 1, 64)[0])
    usual = max(float(torch.linalg.vector_norm(normal(seed + r, 1, 64)[0])) for r in range(16))
    for number, lie in enumerate(lies):
        other = (normal(seed - 1, 1, 64)[0] * lie).clamp(-3e38, 3e38)
        moved = float(torch.linalg.vector_norm(history.mean("x", own, other)))
        assert moved <= usual * 2 ** (2 * (number // 8) + 1)


@given(seeds, st.integers(3, 8), st.integers(0, 7), huge, st.floats(0.3, 2))
def test_a_row_that_is_turned_around_is_left_out(seed: int, rows: int, place: int, size: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, generator=generator) + noise * torch.randn(rows, 400, generator=generator)
    liar = place % rows
    assert agreeing([x]) == list(range(rows)), "all honest"
    x[liar] *= -min(size, 1e30)
    assert agreeing([x]) == [i for i in range(rows) if i != liar]


def test_weak_evidence_in_many_tensors_is_strong_evidence() -> None:
    """A signal so weak that no single tensor convicts a row that is turned around."""
    generator, signs = torch.Generator().manual_seed(0), torch.tensor([[1.0], [1.0], [-1.0], [1.0]])
    tensors = [
        (0.25 * torch.randn(400, generator=generator) + torch.randn(4, 400, generator=generator)) * signs
        for _ in range(20)
    ]
    assert sum(agreeing([x]) != [0, 1, 3] for x in tensors) > 10
    assert agreeing(tensors) == [0, 1, 3]


@given(seeds, st.integers(1, 9), st.integers(1, 300))
def test_more_than_half_are_always_left(seed: int, rows: int, columns: int) -> None:
    signs = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed)).sign()
    left = agreeing([normal(seed, 1, columns) * signs])
    assert 2 * len(left) > rows
    assert left == sorted(set(left))
    assert agreeing([torch.zeros(rows, columns)]) == list(range(rows))


def test_an_equal_past_says_nothing() -> None:
    """Moments start at zero everywhere; that must not forbid them ever to differ."""
    history, own = DistanceHistory(), torch.zeros(4)
    for _ in range(10):
        history.mean("x", own, own)
    torch.testing.assert_close(history.mean("x", own, torch.ones(4)), torch.full((4,), 0.5))


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(Invalid, match="weights"):
        centered_clip(torch.zeros(2, 3), weights)


def test_no_rows_have_no_average() -> None:
    with pytest.raises(Invalid, match="at least one"):
        centered_clip(torch.zeros(0, 3))


def test_who_claims_most_of_the_tokens_weighs_no_more_than_the_others() -> None:
    form = GradientForm({"x": torch.Size([100])}, "float32")
    honest = [form.unpack(form.pack(32, 32.0, {"x": normal(0, 3, 100)[i] * 32})) for i in range(3)]
    modest, greedy = (form.unpack(form.pack(n, 1.0 * n, {"x": torch.full((100,), -9.0 * n)})) for n in (32, 32_000))
    for loud in (modest, greedy):
        tokens, loss, sums = form.total([*honest, loud], robust=True)
        assert (tokens, loss) == (1, 1.0)
        mean = normal(0, 3, 100).mean(0)
        assert float((sums["x"] - mean).norm()) <= 2 * spread(normal(0, 3, 100))
    plain = form.total([*honest, greedy], robust=False)[2]["x"] / (96 + 32_000)
    assert float((plain - mean).norm()) > 10 * spread(normal(0, 3, 100)) / 2


def test_a_robust_step_resists_one_of_four() -> None:
    """The same step with a liar moves the parameters about as without; a plain one it drives anywhere."""
    spec, moved = tiny_spec(1), dict[bool, float]()
    ids = torch.randint(0, 300, (4, 2, 17), generator=torch.Generator().manual_seed(0))
    for robust in (True, False):
        averaging = AveragingConfig(robust=robust)
        honest, lied = (StageTrainer(spec, 0, steps=2, averaging=averaging) for _ in range(2))
        parts = []
        for number in range(4):
            worker = StageTrainer(spec, 0, steps=2)
            worker.forward(0, number, ids[number], None)
            worker.backward(0, number, None)
            parts.append(worker.gradient())
        numbers = torch.frombuffer(bytearray(parts[3][16:]), dtype=torch.float32)
        liar = parts[3][:16] + (numbers * -1e6).numpy().tobytes()
        before, step = lied.stage.head.detach().clone(), []
        for trainer, last in ((honest, parts[3]), (lied, liar)):
            trainer.finish_step_with(0, [*parts[:3], last])
            step.append(trainer.stage.head.detach() - before)
        moved[robust] = float((step[1] * step[0]).sum() / (step[0] * step[0]).sum())
    assert moved[True] > 0.1  # forward, still
    assert moved[False] < -0.3
