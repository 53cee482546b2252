"""The element-wise parts of a layer as fused autograd functions, and the matrix product in the spec's precision.

torch's own CPU kernels spend most of a small model's time on these; writing the backward by hand halves it. Each
function equals its plain definition (`tests/exact/test_models_functional.py`).

Legend: B sequences, T tokens, H heads, K key-value heads, G = H + 2K, E head size, V vocabulary, N taps; D, I, O, F
widths; `...` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.models.config import RopeStretch

__all__ = ["linear", "rms_norm", "rope_tables", "split_heads", "swiglu", "token_features"]


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
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        out_gate, out_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=out_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out_gate)
        return out


def swiglu(gate_up: Float[Tensor, "... twoF"]) -> Float[Tensor, "... F"]:
    """silu(first half) · second half."""
    return _apply(_SwiGlu, gate_up)


class _SplitHeads(torch.autograd.Function):
    """One pass from the fused projection to rotated queries and keys: a layer has no costlier element-wise part."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        turned = gain.size(0) if gain is not None else heads + (qkv.size(2) - heads) // 2
        qk, v = qkv[:, :, :turned], qkv[:, :, turned:]
        inverse = None
        if gain is not None:
            inverse = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).square_().div_(qk.size(-1)).add_(eps).rsqrt_()
            qk = qk * inverse
        ctx.save_for_backward(qk if gain is not None else None, inverse, gain, cos, sin)
        qk = _rotate(qk if gain is None else qk * gain, cos, sin)
        return qk[:, :, :heads], qk[:, :, heads:], v.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse, gain, cos, sin = ctx.saved_tensors
        grad = _rotate(torch.cat((grad_q, grad_k), dim=2), cos, -sin)
        if gain is None:
            return torch.cat((grad, grad_v), dim=2), None, None, None, None, None
        product = grad * normal
        grad_gain = product.flatten(0, 1).sum(0)
        mean = product.mul_(gain).mean(-1, keepdim=True)
        grad = grad.mul_(gain).addcmul_(normal, mean, value=-1).mul_(inverse)
        return torch.cat((grad, grad_v), dim=2), grad_gain, None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + E/2}), the layout of Hugging Face's Llama."""
    first, second = x.chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def split_heads(
    qkv: Float[Tensor, "B T G E"],
    gain: Float[Tensor, "HK E"] | None,
    cos: Float[Tensor, "T 1 halfE"],
    sin: Float[Tensor, "T 1 halfE"],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, E], keys and values [B, T, K, E] of the fused projection with G = H + 2K heads.

    Queries and keys are normalised and scaled by `gain` where it is given, then turned by their position: the token
    at position t by t · base^(-2i/E) in plane i.
    """
    call: Callable[..., tuple[Tensor, Tensor, Tensor]] = _SplitHeads.apply  # torch leaves it untyped
    return call(qkv, gain, cos, sin, heads, eps)


class _TokenFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, taps: Tensor, ids: Tensor) -> Tensor:
        e = F.embedding(ids, rows)
        ctx.save_for_backward(e, taps, ids)
        ctx.count = rows.size(0)
        out = e.clone()
        for back in range(1, taps.size(0) + 1):
            out[:, back:].addcmul_(e[:, :-back], taps[back - 1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        e, taps, ids = ctx.saved_tensors
        grad_e, grad_taps = grad.clone(), torch.empty_like(taps)
        for back in range(1, taps.size(0) + 1):
            later = grad[:, back:]
            grad_e[:, :-back].addcmul_(later, taps[back - 1])
            torch.sum((later * e[:, :-back]).flatten(0, 1), 0, out=grad_taps[back - 1])
        # The kernel of torch's own embedding: equal sums on every run, also on a GPU, unlike index_add_.
        return torch.ops.aten.embedding_dense_backward(grad_e, ids, ctx.count, -1, False), grad_taps, None


def token_features(
    rows: Float[Tensor, "V D"], taps: Float[Tensor, "N D"], ids: Int[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """rows[id_t] + Σ_n taps_n · rows[id_(t-n)]: a table, and a causal convolution over it, channel by channel."""
    return _apply(_TokenFeatures, rows, taps, ids)


def rope_tables(context: int, head_dim: int, base: float, stretch: RopeStretch | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin for every position, [context, 1, head_dim / 2]; computed in float64, kept in float32."""
    cpu = torch.device("cpu")  # known numbers, also where parameters are blank
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=cpu) / head_dim)
    if stretch is not None:
        turns = stretch.trained * frequency / (2 * math.pi)
        kept = ((turns - stretch.slow) / (stretch.fast - stretch.slow)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / stretch.factor)
    angle = torch.outer(torch.arange(context, dtype=torch.float64, device=cpu), frequency)[:, None, :]
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
