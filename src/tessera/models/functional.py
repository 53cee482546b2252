"""The element-wise parts of a layer as fused autograd functions, and the matrix product in the spec's precision.

torch's own CPU kernels spend most of a small model's time on these; writing the backward by hand halves it. Each
function equals its plain definition (`tests/exact/test_models_functional.py`).

Legend: B sequences, T tokens, H heads, D head size; `...` any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear", "rms_norm", "rope", "rope_tables", "swiglu"]


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    call: Callable[..., Tensor] = function.apply  # torch leaves it untyped
    return call(*args)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, gain)
        return normal * gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, gain = ctx.saved_tensors
        product = grad * normal
        grad_gain = product.flatten(0, -2).sum(0)
        mean = product.mul_(gain).mean(-1, keepdim=True)
        return torch.addcmul(grad * gain, normal, mean, value=-1).mul_(inverse), grad_gain, None


def rms_norm(x: Float[Tensor, "... D"], gain: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """x / sqrt(mean(x²) + eps) · gain, over the last axis."""
    return _apply(_RmsNorm, x, gain, eps)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        ctx.save_for_backward(gate_up, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, sigmoid = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        silu = gate * sigmoid
        torch.mul(grad, silu, out=out.narrow(-1, gate.size(-1), gate.size(-1)))
        # d silu / d gate = sigmoid + silu · (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        torch.mul(slope.mul_(up), grad, out=out.narrow(-1, 0, gate.size(-1)))
        return out


def swiglu(gate_up: Float[Tensor, "... twoF"]) -> Float[Tensor, "... F"]:
    """silu(first half) · second half."""
    return _apply(_SwiGlu, gate_up)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + D/2}), the layout of Hugging Face's Llama."""
    first, second = x.chunk(2, -1)
    out = torch.empty_like(x)
    half = first.size(-1)
    torch.mul(first, cos, out=out.narrow(-1, 0, half)).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out.narrow(-1, half, half)).addcmul_(first, sin)
    return out


def rope(
    x: Float[Tensor, "B T H D"], cos: Float[Tensor, "T 1 halfD"], sin: Float[Tensor, "T 1 halfD"]
) -> Float[Tensor, "B T H D"]:
    """Rotary positions: the token at position t is turned by t · base^(-2i/D) in plane i."""
    return _apply(_Rope, x, cos, sin)


def rope_tables(context: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin for every position, [context, 1, head_dim / 2]; computed in float64, kept in float32."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)[:, None, :]
    return angle.cos().to(torch.float32), angle.sin().to(torch.float32)


class _LowLinear(torch.autograd.Function):
    """x Wᵀ with bfloat16 operands, float32 sums and results, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight).to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(torch.bfloat16)
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return (grad @ weight).to(torch.float32), grad_weight.to(torch.float32)


def linear(x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"], low: bool) -> Float[Tensor, "... O"]:
    """x Wᵀ; `low` takes bfloat16 operands. float32 in, float32 out."""
    return _apply(_LowLinear, x, weight) if low else F.linear(x, weight)
