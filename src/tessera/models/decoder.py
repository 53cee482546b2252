"""The layers of a Llama-family decoder. `tessera.models.plain` reads and writes Hugging Face's form of them.

Differences in storage only: q, k, v lie in one matrix (`qkv`, rows in that order) and gate, up in one (`gate_up`),
which saves a third of the small-model overhead. Each layer says how its fused matrices split (`fused_rows`).
Output matrices start at zero, so an untrained layer is the identity.

Legend: B sequences, T tokens, D width, H heads, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tessera.models.config import ModelConfig
from tessera.models.functional import linear, rms_norm, split_heads, swiglu
from tessera.models.initial import initial

__all__ = ["Attention", "Layer", "Rotation"]

Rotation = tuple[Tensor, Tensor]  # cos, sin of the positions at hand
# Queries [B, T, H, E], keys and values [B, T, K, E] to [B, T, H, E]: what each query sees up to its own token. While
# decoding, one that keeps the keys and values of earlier calls sees those too.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Attention and feed-forward part, each added to the stream.

    Args:
        name: of the layer in the whole model; initial values follow from it and `seed`.
        basis_Dk: where given, both output matrices are basis · C with C trained (`reparam`).
    """

    def __init__(self, config: ModelConfig, seed: int, name: str, basis_Dk: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.low = config.compute == "bfloat16"
        self.register_buffer("basis_Dk", basis_Dk, persistent=False)
        d, kv, attended = config.width, config.kv_heads * config.head_dim, config.attended
        rows = d if basis_Dk is None else basis_Dk.size(1)
        std = (3 * d) ** -0.5
        self.qkv = _matrix((attended + 2 * kv, d), std, seed, f"{name}.qkv")
        self.qkv_bias = nn.Parameter(torch.zeros(attended + 2 * kv)) if config.qkv_bias else None
        self.out = nn.Parameter(torch.zeros(rows, attended))
        self.gate_up = _matrix((2 * config.ffn, d), std, seed, f"{name}.gate_up")
        self.down = nn.Parameter(torch.zeros(rows, config.ffn))
        self.attention_gain = nn.Parameter(torch.ones(d))
        self.ffn_gain = nn.Parameter(torch.ones(d))
        if config.qk_norm:
            self.q_gain = nn.Parameter(torch.ones(config.head_dim))
            self.k_gain = nn.Parameter(torch.ones(config.head_dim))

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """How fused matrices split by rows into the matrices that they stand for."""
        c = self.config
        kv = c.kv_heads * c.head_dim
        return {"qkv": (c.attended, kv, kv), "gate_up": (c.ffn, c.ffn)}

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], rotation: Rotation, attention: Attention | None = None
    ) -> Float[Tensor, "B T D"]:
        eps = self.config.norm_eps
        x_BTD = x_BTD + self._attend(rms_norm(x_BTD, self.attention_gain, eps), rotation, attention)
        hidden = swiglu(linear(rms_norm(x_BTD, self.ffn_gain, eps), self.gate_up, self.low))
        return x_BTD + self._project(hidden, self.down)

    def _attend(self, x_BTD: Tensor, rotation: Rotation, attention: Attention | None) -> Tensor:
        c = self.config
        batch, length, _ = x_BTD.shape
        qkv = linear(x_BTD, self.qkv, self.low)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias
        qkv = qkv.view(batch, length, c.heads + 2 * c.kv_heads, c.head_dim)
        q, k, v = split_heads(qkv, self._qk_gain(), *rotation, c.heads, c.norm_eps)
        y = _causal(q, k, v, c.window) if attention is None else attention(q, k, v)
        return self._project(y.reshape(batch, length, c.attended), self.out)

    def _qk_gain(self) -> Tensor | None:
        """One row for each query and key head. [H + K, E]"""
        c = self.config
        if not c.qk_norm:
            return None
        return torch.cat((self.q_gain.expand(c.heads, -1), self.k_gain.expand(c.kv_heads, -1)))

    def _project(self, x: Tensor, weight: Tensor) -> Tensor:
        y = linear(x, weight, self.low)
        basis_Dk = self._buffers["basis_Dk"]
        return y if basis_Dk is None else linear(y, basis_Dk, self.low)


def _matrix(shape: tuple[int, int], std: float, seed: int, name: str) -> nn.Parameter:
    return nn.Parameter(initial(shape, std, seed, name))


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Each token sees those at hand up to itself; of those, with a `window`, the last so many."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if k.size(1) != q.size(1):
        k, v = (z.repeat_interleave(q.size(1) // k.size(1), dim=1) for z in (k, v))
    length, mask = q.size(2), None
    if 0 < window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    causal = mask is None and length > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)
