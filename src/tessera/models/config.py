"""What a model is, as plain data: everything that two peers must agree on to compute the same numbers.

A `ModelSpec` travels inside a run's manifest, so it is frozen, strict, refuses unknown fields and imports no torch.
`digest()` names it. All costs that follow from shapes alone (cuts, FLOPs, bytes on the wire) are computed here, so
that a payer and a worker can never count differently.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tessera.core.encoding import encode
from tessera.core.errors import Invalid
from tessera.core.hashing import sha256

__all__ = ["AveragingConfig", "CodecConfig", "ModelConfig", "ModelSpec", "OptimizerConfig", "RopeStretch", "parse_spec"]

_NUMBER_BYTES = {"bfloat16": 2, "float32": 4}
CODE_BITS = {"int4": 4, "int5": 5, "int6": 6, "int8": 8}
SCALE_BYTES = 2  # a message of integer codes carries one bfloat16 scale for each token


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RopeStretch(_Frozen):
    """Positions for a longer context than a model was first trained on, as Llama 3.1 turns them.

    Planes that turn at least `fast` times within `trained` tokens stay; those that turn at most `slow` times turn
    `factor` times slower; between the two it is a mixture.
    """

    factor: float = Field(gt=1.0, le=1024.0)
    slow: float = Field(gt=0.0, le=1024.0)  # turns within `trained` tokens
    fast: float = Field(gt=0.0, le=1024.0)
    trained: int = Field(ge=2, le=2**20)  # tokens of the context before

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.slow >= self.fast:
            raise ValueError(f"slow must be below fast, not {self.slow} and {self.fast}")
        return self


class ModelConfig(_Frozen):
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    The last four fields are what models made elsewhere differ in. One at its default is left out of the canonical form.
    """

    vocab_size: int = Field(ge=2, le=2**20)  # tokens
    width: int = Field(ge=8, le=16_384)  # numbers in the residual stream, for each token
    layers: int = Field(ge=1, le=512)
    heads: int = Field(ge=1, le=256)
    kv_heads: int = Field(ge=1, le=256)  # heads share keys and values in equal groups
    ffn: int = Field(ge=8, le=65_536)  # hidden width of the SwiGLU feed-forward part
    context: int = Field(ge=2, le=131_072)  # tokens; positions beyond it do not exist
    rope_base: float = Field(default=10_000.0, gt=1.0)
    norm_eps: float = Field(default=1e-6, gt=0.0, lt=1e-2)
    qk_norm: bool = True  # normalise queries and keys for each head, as Qwen3 does; Muon's high rates want it
    table_std: float = Field(default=0.3, gt=0.0, le=10.0)  # initial spread of the token tables
    compute: Literal["float32", "bfloat16"] = "float32"  # operands of matrix products; sums are float32 in both
    head_size: int = Field(default=0, ge=0, le=1024, exclude_if=operator.not_)  # numbers in a head; 0 = width / heads
    qkv_bias: bool = Field(default=False, exclude_if=operator.not_)  # add a vector to queries, keys, values: Qwen2
    window: int = Field(default=0, ge=0, exclude_if=operator.not_)  # a token sees so many, itself included; 0 = all
    rope_stretch: RopeStretch | None = Field(default=None, exclude_if=operator.not_)

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_size == 0 and self.width % self.heads:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads: give head_size")
        if self.head_size * self.heads == self.width:
            raise ValueError(f"head_size {self.head_size} is width / heads: leave it out")
        if self.head_dim % 2:
            raise ValueError(f"a head has an even size, not {self.head_dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads equally")
        return self

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    @property
    def attended(self) -> int:
        """Numbers of all heads together: what the attention gives its output matrix."""
        return self.heads * self.head_dim


class CodecConfig(_Frozen):
    """What crosses a boundary between stages.

    dense: the residual stream itself.  control: dense, with a codec's token tables: what a code is measured against,
    because trained tables help any model.  reparam: output matrices are U C, so that the stream lies in a k-dimensional
    subspace plus a fixed token table.  ssn: the same, by projecting the matrices after each step.  codec: weights are
    free; learned encoder and decoder, and a token table per stage that both ends know (`research`: 18 bytes instead
    of 512 for a token).
    """

    kind: Literal["codec", "reparam", "ssn", "control", "dense"] = "codec"
    k: int = Field(default=0, ge=0)  # numbers in a code; 0 for dense and control, which send `width` of them
    wire: Literal["int4", "int5", "int6", "int8", "bfloat16", "float32"] = "int8"  # codes: a 2-byte scale each token
    conv: bool = True  # add a causal 3-tap convolution over the token table; costs no bytes
    pairs: int = Field(default=0, ge=0, le=2**22)  # rows of a hashed table for pairs of tokens, 0 = none; no bytes

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        if self.whole and self.k != 0:
            raise ValueError(f"{self.kind} sends the whole width: k must be 0, not {self.k}")
        if not self.whole and self.k == 0:
            raise ValueError(f"{self.kind} needs k, the numbers in a code")
        if self.subspace and (self.conv or self.pairs):
            raise ValueError(f"{self.kind} has a fixed token table: conv must be false and pairs 0")
        return self

    @property
    def whole(self) -> bool:
        """Whether the stream's whole width crosses, and no code."""
        return self.kind in ("dense", "control")

    @property
    def subspace(self) -> bool:
        """Whether the layers write into a k-dimensional subspace only."""
        return self.kind in ("reparam", "ssn")


class OptimizerConfig(_Frozen):
    """Muon for hidden matrices, AdamW for the rest. Rates are peaks: warm-up, then linear decay to zero at the end."""

    muon_rate: float = Field(default=0.04, gt=0.0, le=1.0)
    muon_decay: float = Field(default=0.05, ge=0.0, le=1.0)  # weight decay, times the rate
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    momentum_start: float = Field(default=0.85, ge=0.0, lt=1.0)  # grows to `momentum` over `momentum_warmup` steps
    momentum_warmup: int = Field(default=100, ge=1)
    newton_schulz: int = Field(default=5, ge=1, le=12)  # iterations
    table_rate: float = Field(default=0.1, gt=0.0, le=1.0)  # token tables and their convolution
    head_rate: float = Field(default=0.01, gt=0.0, le=1.0)
    code_rate: float = Field(default=0.001, gt=0.0, le=1.0)  # the boundary's encoder and decoder
    gain_rate: float = Field(default=0.01, gt=0.0, le=1.0)  # gains of the norms
    adam_decay: float = Field(default=0.001, ge=0.0, le=1.0)  # of tables and head only
    beta1: float = Field(default=0.8, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    adam_eps: float = Field(default=1e-10, gt=0.0, lt=1e-2)
    warmup: int = Field(default=10, ge=1)  # steps


class AveragingConfig(_Frozen):
    """What the replicas of a stage send each other. All replicas of a run need the same."""

    every: int = Field(default=0, ge=0, le=10_000)  # steps of a round; 0: gradients are summed in each step
    gradient: Literal["float32", "bfloat16"] = "float32"  # on the wire, when each step averages gradients
    state: Literal["float32", "bfloat16", "int8"] = "int8"  # on the wire, when each round averages a part of the state
    partitions: int = Field(default=13, ge=1, le=65_536)  # parts of the state: each round averages one
    moments: bool = False  # average the optimiser's moments too; only worth it when each entry's turn comes often
    robust: bool = False  # CenteredClip: a minority may send anything, and moves the average by a bounded amount


class ModelSpec(_Frozen):
    """A model, its codec, its optimiser, its cut into stages and the seed of everything random in it."""

    model: ModelConfig
    codec: CodecConfig = CodecConfig(kind="dense", wire="bfloat16")
    optimizer: OptimizerConfig = OptimizerConfig()
    stages: int = Field(ge=1, le=512)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _cut_fits(self) -> Self:
        if self.stages > self.model.layers:
            raise ValueError(f"{self.stages} stages need at least as many layers, not {self.model.layers}")
        if self.codec.k > self.model.width:
            raise ValueError(f"a code of {self.codec.k} numbers is wider than the stream of {self.model.width}")
        if self.message_width * CODE_BITS.get(self.codec.wire, 8) % 8:
            raise ValueError(f"{self.message_width} numbers of {self.codec.wire} do not fill whole bytes")
        return self

    def cuts(self) -> list[range]:
        """The layers of each stage: contiguous, sizes differ by one at most, the longer ones first.

        The last stage also pays for the head, so it never gets the extra layer.
        """
        base, extra = divmod(self.model.layers, self.stages)
        starts = [stage * base + min(stage, extra) for stage in range(self.stages + 1)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]

    @property
    def message_width(self) -> int:
        """Numbers for one token in a message that crosses a boundary."""
        return self.model.width if self.codec.whole else self.codec.k

    def message_bytes_per_token(self) -> int:
        """Bytes of one token's message, in either direction, without any envelope."""
        if bits := CODE_BITS.get(self.codec.wire):
            return self.message_width * bits // 8 + SCALE_BYTES
        return self.message_width * _NUMBER_BYTES[self.codec.wire]

    def dense_bytes_per_token(self) -> int:
        """Bytes that the uncompressed stream would need for one token and direction, in bfloat16."""
        return 2 * self.model.width

    def flops_per_token(self, stage: int) -> int:
        """Floating-point operations of `stage` for one training token, forward and backward.

        Counted from shapes, so that it is the same for everybody: a matrix of m × n numbers costs 2 m n forward and
        4 m n backward; causal attention looks back at context / 2 tokens on average, or at its window, with two
        products of all heads' numbers for each. Element-wise work, recomputation and the optimiser are not counted.

        Raises: Invalid: no such stage.
        """
        self._check_stage(stage)
        m = self.model
        kv = m.kv_heads * m.head_dim
        rank_cost = self._output_matrices(stage)
        layer = m.width * (m.attended + 2 * kv) + m.width * 2 * m.ffn + rank_cost
        attention = 2 * m.attended * min(m.context // 2, m.window or m.context)
        total = len(self.cuts()[stage]) * (layer + attention)
        if not self.codec.whole:
            total += m.width * self.codec.k * ((stage > 0) + (stage < self.stages - 1))
        if stage == self.stages - 1:
            total += m.width * m.vocab_size
        return 6 * total

    def digest(self) -> str:
        """SHA-256 of the canonical encoding, 64 hex digits."""
        return sha256(encode(self.model_dump())).hex()

    def _output_matrices(self, stage: int) -> int:
        """Multiplications for one token in a layer's two output matrices."""
        m, k = self.model, self.codec.k
        if self.codec.kind == "reparam" and stage < self.stages - 1:
            return k * (m.attended + m.ffn) + 2 * k * m.width
        return m.width * (m.attended + m.ffn)

    def _check_stage(self, stage: int) -> None:
        if not 0 <= stage < self.stages:
            raise Invalid(f"stage {stage} does not exist: the model has {self.stages}, counted from 0")


def parse_spec(data: Any) -> ModelSpec:
    """The spec in a decoded manifest. Raises: Invalid naming the first wrong field."""
    try:
        return ModelSpec.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "spec"
        raise Invalid(f"model spec: {where}: {first['msg']}") from error
