"""Muon, the schedule, and the state that a checkpoint keeps."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tessera.models.config import OptimizerConfig
from tessera.models.optim import Muon, StageOptimizer, newton_schulz, schedule
from tessera.models.presets import tiny_spec
from tessera.models.stage import Stage


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rates_rise_then_fall_to_zero_at_the_end() -> None:
    factors = [schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(0.91)
    assert factors[99] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))


def test_newton_schulz_brings_all_singular_values_near_one() -> None:
    singular = torch.linalg.svdvals(newton_schulz(matrix(3, 16, 48), 5))
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


def test_newton_schulz_keeps_the_directions() -> None:
    x = matrix(1, 8, 24)
    u, _, v = torch.linalg.svd(x[0], full_matrices=False)
    alignment = u.T @ newton_schulz(x, 8)[0] @ v.T
    assert float((alignment - torch.diag(alignment.diagonal())).abs().max()) < 1e-3


def test_bfloat16_iterations_stay_near_float32_ones() -> None:
    x = matrix(2, 16, 32)
    torch.testing.assert_close(newton_schulz(x, 5, low=True), newton_schulz(x, 5), rtol=0, atol=0.05)


def test_a_fused_matrix_moves_like_its_parts() -> None:
    config, rows = OptimizerConfig(), (8, 4, 4)
    start, grads = matrix(16, 8), [matrix(16, 8, seed=s) for s in (1, 2)]
    fused = nn.Parameter(start.clone())
    parts = [nn.Parameter(p.clone()) for p in start.split(rows)]
    together = Muon({"w": fused}, {"w": rows}, config, low=False)
    apart = Muon({str(i): p for i, p in enumerate(parts)}, {}, config, low=False)
    for step, grad in enumerate(grads):
        fused.grad = grad.clone()
        for part, piece in zip(parts, grad.split(rows), strict=True):
            part.grad = piece.clone()
        together.step(step, 1.0)
        apart.step(step, 1.0)
    torch.testing.assert_close(fused.data, torch.cat([p.data for p in parts]))
    assert not torch.allclose(fused.data, start, atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_a_muon_step_has_the_size_of_its_rate(shape: tuple[int, int]) -> None:
    """Each entry moves by about rate · sqrt(max(1, rows / columns) · small / (rows · columns))."""
    config = OptimizerConfig(muon_decay=0.0, muon_rate=0.01)
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = matrix(*shape) * 1e-6  # the size of the gradient does not matter
    Muon({"w": parameter}, {}, config, low=False).step(0, 0.5)
    expected = 0.005 * max(1, shape[0] / shape[1]) ** 0.5 * 8**0.5  # Frobenius norm of 8 unit singular values
    assert float(parameter.data.norm()) == pytest.approx(expected, rel=0.2)


def test_every_parameter_of_every_kind_has_a_rate() -> None:
    for kind in ("codec", "control", "dense", "reparam", "ssn"):
        spec = tiny_spec(3, codec=kind)  # type: ignore[arg-type]
        for index in range(3):
            stage = Stage(spec, index)
            state = StageOptimizer(stage, 10).state_dict()
            for name, parameter in stage.named_parameters():
                kept = state.get(f"muon.{name}", state.get(f"adam.exp_avg.{name}"))
                assert kept is not None, name
                assert kept.shape == parameter.shape


def test_state_has_the_same_names_before_and_after_the_first_step() -> None:
    stage = Stage(tiny_spec(1), 0)
    optimizer = StageOptimizer(stage, 10)
    before = optimizer.state_dict()
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0, 1)
    after = optimizer.state_dict()
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert all(p.grad is None for p in stage.parameters())


def test_gradients_are_divided_by_tokens() -> None:
    """AdamW and Muon hardly see the scale of a constant gradient, so the moments tell."""
    stage = Stage(tiny_spec(1), 0)
    optimizer = StageOptimizer(stage, 10)
    for parameter in stage.parameters():
        parameter.grad = torch.full_like(parameter, 8.0)
    optimizer.step(0, 4)
    state = optimizer.state_dict()
    c = tiny_spec(1).optimizer
    np.testing.assert_allclose(state["adam.exp_avg.head"].numpy(), 2.0 * (1 - c.beta1), rtol=1e-6)
    np.testing.assert_allclose(state["muon.layers.0.out"].numpy(), 2.0 * (1 - c.momentum_start), rtol=1e-6)
