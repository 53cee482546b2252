"""Models to start from: the default run's, and a tiny one that trains in seconds. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tessera.models.config import CodecConfig, ModelConfig, ModelSpec, OptimizerConfig

__all__ = ["DEFAULT_BATCH", "TINY_BATCH", "Batch", "Compute", "Kind", "default_spec", "preset_codec", "tiny_spec"]

Kind = Literal["codec", "reparam", "ssn", "control", "dense"]
Compute = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Batch:
    """How a step's tokens are cut: `microbatches` of `sequences` × `length` tokens, for `steps` steps."""

    sequences: int
    length: int
    microbatches: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.length * self.microbatches


DEFAULT_BATCH = Batch(sequences=2, length=256, microbatches=8, steps=400)
TINY_BATCH = Batch(sequences=2, length=32, microbatches=4, steps=20)


def preset_codec(kind: Kind, k: int) -> CodecConfig:
    """The usual settings of each kind; `k` matters to codec and reparam."""
    if kind in ("dense", "control"):
        return CodecConfig(kind=kind, wire="bfloat16")
    if kind in ("reparam", "ssn"):
        return CodecConfig(kind=kind, k=k, wire="bfloat16", conv=False)
    return CodecConfig(kind="codec", k=k)


def default_spec(
    stages: int = 4,
    *,
    codec: Kind = "codec",
    compute: Compute = "float32",
    seed: int = 0,
    vocab_size: int = 1024,
) -> ModelSpec:
    """The default run's model: 2.9 million parameters in 4 layers; more stages than that get a layer each.

    The code is as wide as 1/20 of the dense bfloat16 stream allows, scale and 0.3 bytes of envelope included.

    Args:
        compute: "bfloat16" is 1.6 times as fast where `tessera.models.device.native_bfloat16()` says so, and slow
            elsewhere. Part of the spec, because peers must round alike.
    """
    model = ModelConfig(
        vocab_size=vocab_size,
        width=256,
        layers=max(4, stages),
        heads=4,
        kv_heads=2,
        ffn=256,
        context=256,
        compute=compute,
    )
    return ModelSpec(model=model, codec=preset_codec(codec, 23), optimizer=OptimizerConfig(), stages=stages, seed=seed)


def tiny_spec(stages: int = 2, *, codec: Kind = "codec", seed: int = 0, vocab_size: int = 300) -> ModelSpec:
    """For tests: 1 to 4 stages, 67,000 parameters, a step of `TINY_BATCH` in about 20 ms."""
    model = ModelConfig(vocab_size=vocab_size, width=32, layers=4, heads=2, kv_heads=1, ffn=64, context=64)
    return ModelSpec(model=model, codec=preset_codec(codec, 8), optimizer=OptimizerConfig(), stages=stages, seed=seed)
