"""Which tensors of the plain form a stage's parameters are made of: names, shapes, and how they are joined.

A parameter of ours is one tensor of theirs, or several put one under the other (`qkv`, `gate_up`). Numbers are never
changed but in their type; so this one table reads a checkpoint and writes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tessera.models.config import ModelConfig, ModelSpec

__all__ = ["EMBEDDING", "HEAD", "Piece", "number_type", "stage_pieces"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MATRICES = ("qkv", "out", "gate_up", "down", "rows", "head")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the plain form."""

    name: str
    shape: tuple[int, ...]


def number_type(name: str, model: ModelConfig) -> torch.dtype:
    """What a served stage keeps a parameter in: matrices as they are multiplied, the rest in float32."""
    matrix = name.rpartition(".")[2] in _MATRICES
    return torch.bfloat16 if matrix and model.compute == "bfloat16" else torch.float32


def stage_pieces(spec: ModelSpec, stage: int, *, tied: bool) -> dict[str, tuple[Piece, ...]]:
    """The stage's parameters, each with what lies in it from top to bottom.

    Args:
        tied: the head is read from the token table; the last stage then holds a copy of it.
    """
    m = spec.model
    table = (m.vocab_size, m.width)
    pieces: dict[str, tuple[Piece, ...]] = {}
    if stage == 0:
        pieces[f"codecs.{stage}.table.rows"] = (Piece(EMBEDDING, table),)
    for layer in spec.cuts()[stage]:
        pieces |= {f"layers.{layer}.{name}": found for name, found in _layer(m, layer)}
    if stage == spec.stages - 1:
        pieces["head"] = (Piece(EMBEDDING if tied else HEAD, table),)
        pieces["head_gain"] = (Piece("model.norm.weight", (m.width,)),)
    return pieces


def _layer(m: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    at, kv, d = f"model.layers.{layer}", m.kv_heads * m.head_dim, m.width
    heads = (("q", m.attended), ("k", kv), ("v", kv))
    yield "qkv", tuple(Piece(f"{at}.self_attn.{name}_proj.weight", (rows, d)) for name, rows in heads)
    if m.qkv_bias:
        yield "qkv_bias", tuple(Piece(f"{at}.self_attn.{name}_proj.bias", (rows,)) for name, rows in heads)
    yield "out", (Piece(f"{at}.self_attn.o_proj.weight", (d, m.attended)),)
    yield "gate_up", tuple(Piece(f"{at}.mlp.{name}_proj.weight", (m.ffn, d)) for name in ("gate", "up"))
    yield "down", (Piece(f"{at}.mlp.down_proj.weight", (d, m.ffn)),)
    yield "attention_gain", (Piece(f"{at}.input_layernorm.weight", (d,)),)
    yield "ffn_gain", (Piece(f"{at}.post_attention_layernorm.weight", (d,)),)
    if m.qk_norm:
        for name in ("q", "k"):
            yield f"{name}_gain", (Piece(f"{at}.self_attn.{name}_norm.weight", (m.head_dim,)),)
