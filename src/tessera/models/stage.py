"""One stage of the model: its layers, its ends of the boundaries, and the head on the last one.

Every initial value follows from (seed, name of the parameter in the whole model), so each peer builds its stage
alone, and one process with all layers starts from the same values as many processes with some. Names are global:
stage 2 of 4 holds `layers.4.qkv`, not `layers.0.qkv`.

Legend: B sequences, T tokens, X = V or W, D width, V vocabulary, W message width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tessera.core.errors import Invalid
from tessera.models.codec import Codec, make_codec, shared_basis
from tessera.models.config import ModelSpec
from tessera.models.decoder import Attention, Layer, Rotation
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

    def forward(self, ids: Int[Tensor, "B T"], message: Float[Tensor, "B T W"] | None) -> Float[Tensor, "B T X"]:
        """Logits [B, T, V] on the last stage, the message [B, T, W] on the others."""
        x_BTD, known = self.codec.enter(ids, message)
        x_BTD = self.through(x_BTD, self.rotation(slice(0, x_BTD.size(1))))
        return self.logits(self.hidden(x_BTD)) if self.last else self.codec.leave(x_BTD, known)

    @property
    def codec(self) -> Codec:
        return cast(Codec, self.codecs[str(self.index)])  # ModuleDict forgets the class

    def rotation(self, positions: slice | Tensor) -> Rotation:
        """What turns queries and keys at these positions."""
        return self.get_buffer("cos")[positions], self.get_buffer("sin")[positions]

    def through(
        self, x_BTD: Float[Tensor, "B T D"], rotation: Rotation, attentions: Sequence[Attention] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The stream after all layers. `attentions`, one for each layer, see more than the tokens at hand."""
        for i, layer in enumerate(self.layers.values()):
            x_BTD = layer(x_BTD, rotation, None if attentions is None else attentions[i])
        return x_BTD

    def hidden(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The last stage's stream after the final norm."""
        return rms_norm(x, self.head_gain, self.spec.model.norm_eps)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        return linear(hidden, self.head, self.spec.model.compute == "bfloat16")

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """How each fused matrix, by its full name, splits by rows."""
        return {
            f"layers.{i}.{name}": rows
            for i, layer in self.layers.items()
            if isinstance(layer, Layer)
            for name, rows in layer.fused_rows().items()
        }
