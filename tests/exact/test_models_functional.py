"""The fused functions against their plain definitions, values and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.models.functional import linear, rms_norm, rope_tables, split_heads, swiglu, token_features


def random(*shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    ).requires_grad_()


def tables(length: int, size: int) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(length, size, 10_000.0)
    return cos.double(), sin.double()


def plain_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def plain_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation as a product of complex numbers."""
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), -1)


def plain_split(
    qkv: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, ...]:
    kv_heads = (qkv.size(2) - heads) // 2
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    if gain is not None:
        q, k = plain_norm(q, gain[:heads], eps), plain_norm(k, gain[heads:], eps)
    return plain_turn(q, cos, sin), plain_turn(k, cos, sin), v


def test_rms_norm_and_swiglu_equal_their_definitions() -> None:
    x, gain = random(2, 3, 8), random(8)
    torch.testing.assert_close(rms_norm(x, gain, 1e-6), plain_norm(x, gain, 1e-6))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up)


def test_gradients_of_rms_norm_and_swiglu_equal_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda x, g: rms_norm(x, g, 1e-3), (random(2, 3, 4), random(4)))
    assert torch.autograd.gradcheck(swiglu, (random(2, 3, 8),))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (2, 1)])
def test_split_heads_equals_norm_then_rotation(normalised: bool, heads: int, kv_heads: int) -> None:
    qkv = random(2, 5, heads + 2 * kv_heads, 6)
    gain = random(heads + kv_heads, 6) if normalised else None
    inputs = [qkv] if gain is None else [qkv, gain]
    fused = split_heads(qkv, gain, *tables(5, 6), heads, 1e-6)
    plain = plain_split(qkv, gain, *tables(5, 6), heads, 1e-6)
    seeds = [torch.randn_like(y) for y in plain]
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        torch.autograd.grad(fused, inputs, seeds), torch.autograd.grad(plain, inputs, seeds), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_token_features_are_a_table_and_a_convolution_over_it(length: int) -> None:
    rows, taps = random(6, 4), random(3, 4)
    ids = torch.randint(0, 6, (2, length), generator=torch.Generator().manual_seed(length))
    e = F.embedding(ids, rows)
    plain = e + sum(taps[n - 1] * F.pad(e, (0, 0, n, 0))[:, :length] for n in (1, 2, 3))
    fused, seed = token_features(rows, taps, ids), torch.randn(2, length, 4, dtype=torch.float64)
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fused, (rows, taps), seed), torch.autograd.grad(plain, (rows, taps), seed), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_positions_turn_only_relatively() -> None:
    """The product of a query at t and a key at s depends on t - s alone."""
    cos, sin = rope_tables(32, 8, 10_000.0)
    x = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0))

    def score(t: int, s: int) -> float:
        q, _, _ = split_heads(x, None, cos[t : t + 1], sin[t : t + 1], 1, 1e-6)
        _, k, _ = split_heads(x, None, cos[s : s + 1], sin[s : s + 1], 1, 1e-6)
        return float((q * k).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_bfloat16_products_stay_within_their_rounding_of_float32() -> None:
    x, weight = random(3, 16).float().detach().requires_grad_(), random(7, 16).float().detach().requires_grad_()
    exact, low = linear(x, weight, False), linear(x, weight, True)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.02, atol=0.05)
    for theirs, ours in zip(
        torch.autograd.grad(exact.sum(), (x, weight)), torch.autograd.grad(low.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)
