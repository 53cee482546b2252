"""One stage of the model: its layers, its ends of the boundaries, and the head on the last one.

Every initial value follows from (seed, name of the parameter in the whole model), so each peer builds its stage
alone, and one process with all layers starts from the same values as many processes with some. Names are global:
stage 2 of 4 holds `layers.4.qkv`, not `layers.0.qkv`.

Legend: B sequences, T tokens, S = T + those skipped, X = V or W, D width, V vocabulary, W message width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tessera.core.errors import Invalid
from tessera.models.codec import Codec, make_codec, shared_basis
from tessera.models.config import ModelSpec
from tessera.models.decoder import Layer, LayerCache
from tessera.models.functional import linear, rms_norm, rope_tables

__all__ = ["Stage"]


class Stage(nn.Module):
    """`forward` maps (token ids, message) to the next message, or to logits on the last stage.

    Raises: Invalid: the model has no such stage.
    """

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        if not 0 <= stage < spec.stages:
            raise Invalid(f"stage {stage} does not exist: the model has {spec.stages}, counted from 0")
        self.spec, self.index = spec, stage
        self.first, self.last = stage == 0, stage == spec.stages - 1
        m = spec.model
        basis = shared_basis(spec) if spec.codec.kind == "reparam" and not self.last else None
        self.layers = nn.ModuleDict({str(i): Layer(m, spec.seed, f"layers.{i}", basis) for i in spec.cuts()[stage]})
        # Keyed by the stage, so that names stay unique when stages' parameters are put side by side.
        self.codecs = nn.ModuleDict({str(stage): make_codec(spec, stage)})
        if self.last:
            self.head = nn.Parameter(torch.zeros(m.vocab_size, m.width))  # zero: the first loss is ln V
            self.head_gain = nn.Parameter(torch.ones(m.width))
        cos, sin = rope_tables(m.context, m.head_dim, m.rope_base, m.rope_stretch)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("cos").device

    def forward(
        self,
        ids: Int[Tensor, "B S"],
        message: Float[Tensor, "B T W"] | None,
        caches: list[LayerCache] | None = None,
        filled: int = 0,
        skip: int = 0,
    ) -> Float[Tensor, "B T X"]:
        """Logits [B, T, V] on the last stage, the message [B, T, W] on the others.

        Args:
            caches: one for each layer, when decoding; `filled` tokens of them are in use.
            skip: the first `skip` ids are history for the token features, not input.
        """
        codec = self._codec()
        x_BTD, known = codec.enter(ids, message, skip)
        length = x_BTD.size(1)
        rotation = (self.get_buffer("cos")[filled : filled + length], self.get_buffer("sin")[filled : filled + length])
        for i, layer in enumerate(self._layers()):
            x_BTD = layer(x_BTD, rotation, None if caches is None else caches[i], filled)
        if not self.last:
            return codec.leave(x_BTD, known)
        low = self.spec.model.compute == "bfloat16"
        return linear(rms_norm(x_BTD, self.head_gain, self.spec.model.norm_eps), self.head, low)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """How each fused matrix, by its full name, splits by rows."""
        return {
            f"layers.{i}.{name}": rows
            for i, layer in self.layers.items()
            if isinstance(layer, Layer)
            for name, rows in layer.fused_rows().items()
        }

    def _layers(self) -> Iterator[nn.Module]:
        return iter(self.layers.values())

    def _codec(self) -> Codec:
        return cast(Codec, self.codecs[str(self.index)])  # ModuleDict forgets the class
