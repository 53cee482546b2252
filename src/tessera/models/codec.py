"""The boundary codec: how a stage turns an incoming message into its stream, and its stream into a message.

One interface, five kinds (k numbers cross for each token; K, K' are what both ends know from the token ids alone):

    dense     message = y                     x' = message
    control   message = y - K                 x' = message + K'           full width, so nothing is lost
    ssn       message = Uᵀ (y - F)            x' = U message + F          U, F fixed, from the seed
    reparam   the same
    codec     message = Eᵀ (y - K)            x' = D message + K'         all four trained

The K of `control` and `codec` is the stage's own token table, plus a causal 3-tap convolution over it, plus a row of
a hashed table for the last two tokens. At the start E = D = U and all tables are equal, without a byte exchanged:
their values follow from the run's seed. Reasons and measurements: research/codec_study and
benchmarks/results/codec_*.md.

Legend: B sequences, T tokens, S = T + those skipped, V vocabulary, D width, k code width, W message width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tessera.models.config import ModelSpec
from tessera.models.functional import linear, token_features
from tessera.models.initial import initial
from tessera.models.noise import orthonormal, symmetric

__all__ = ["HISTORY", "Codec", "make_codec", "shared_basis"]

HISTORY = 3  # tokens before the first new one that a codec must see: the taps of the convolution
_HASH = (31_337, 7_919)  # odd, so that pairs which differ in one token alone share none of 2^n ≥ V rows


class Codec(nn.Module, ABC):
    """Both ends of a stage. `known` passes from `enter` to `leave`, so that it is computed once."""

    @abstractmethod
    def enter(self, ids: Tensor, message: Tensor | None, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """(stream [B, T, D], known). `message` is None at stage 0.

        The first `skip` ids, none or `HISTORY`, are history, not input; of a text's beginning some of them are -1.
        """

    @abstractmethod
    def leave(self, y: Tensor, known: Tensor | None) -> Tensor:
        """The message [B, T, W] for the next stage."""


def make_codec(spec: ModelSpec, stage: int) -> Codec:
    if spec.codec.kind == "dense":
        return DenseCodec(spec, stage)
    if spec.codec.kind == "control":
        return ControlCodec(spec)
    if spec.codec.subspace:
        return SubspaceCodec(spec, stage)
    return BoundaryCodec(spec, stage)


def shared_basis(spec: ModelSpec) -> Tensor:
    """U [D, k], orthonormal columns; every stage derives the same one."""
    return torch.from_numpy(orthonormal(spec.model.width, spec.codec.k, spec.seed, "basis"))


class TokenTable(nn.Module):
    """A trained row for each token; with `conv`, plus per-channel multiples of the three rows before it.

    With `pairs` = P, plus row (p · id_t + q · id_(t-1)) mod P of a hashed table; before the text lies id 0. A look-up:
    no products, no bytes.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        m = spec.model
        # One name for all stages: their tables start equal (tied), which lets a code start as a small difference.
        self.rows = nn.Parameter(initial((m.vocab_size, m.width), m.table_std, spec.seed, "table"))
        self.taps = nn.Parameter(torch.zeros(HISTORY, m.width)) if spec.codec.conv else None
        self.pairs = nn.Parameter(torch.zeros(spec.codec.pairs, m.width)) if spec.codec.pairs else None

    def forward(self, ids: Int[Tensor, "B S"], skip: int = 0) -> Float[Tensor, "B T D"]:
        if skip:
            return self._after(ids, skip)
        known = self._rows(ids) if self.taps is None else token_features(self.rows, self.taps, ids)
        return known if self.pairs is None else known + self._of_pairs(self.pairs, ids, F.pad(ids, (1, 0))[:, :-1])

    def _after(self, ids: Tensor, skip: int) -> Tensor:
        """The same for what follows `skip` ids of history, for decoding: ids before the text are -1."""
        seen = ids.clamp(min=0)
        if self.taps is None:
            known = self._rows(seen[:, skip:])
        else:
            e = self._rows(seen).mul_((ids >= 0)[..., None])
            known = e[:, skip:].clone()
            for back in range(1, HISTORY + 1):
                known.addcmul_(e[:, skip - back : -back], self.taps[back - 1])
        if self.pairs is None:
            return known
        return known + self._of_pairs(self.pairs, seen[:, skip:], seen[:, skip - 1 : -1])

    def _rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows).to(torch.float32)  # an imported table may be bfloat16

    def _of_pairs(self, pairs: Tensor, ids: Tensor, before: Tensor) -> Tensor:
        return F.embedding((ids * _HASH[0] + before * _HASH[1]) % pairs.size(0), pairs)


class DenseCodec(Codec):
    """The stream itself crosses. Only stage 0 has a token table."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        self.table = TokenTable(spec) if stage == 0 else None

    def enter(self, ids: Tensor, message: Tensor | None, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        if self.table is not None:
            return self.table(ids, skip), None
        return _present(message), None

    def leave(self, y: Tensor, known: Tensor | None) -> Tensor:
        return y


class ControlCodec(Codec):
    """A token table for each stage, as in `BoundaryCodec`, and the whole width crosses.

    Trained tables help any model, so a code has to be compared with this as well as with `dense`.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.table = TokenTable(spec)

    def enter(self, ids: Tensor, message: Tensor | None, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        known = self.table(ids, skip)
        return (known if message is None else message + known), known

    def leave(self, y: Tensor, known: Tensor | None) -> Tensor:
        return y - _present(known)


class SubspaceCodec(Codec):
    """The stream lies in span(U) plus a fixed token table, because the layers write only into span(U).

    In `reparam` they can do nothing else. In `ssn` their output matrices and the trained table are projected onto
    span(U) after each step (`StageOptimizer`); source: node0 of Pluralis, models/llama/layers.py and server/optim.py.
    """

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        m = spec.model
        fixed = symmetric((m.vocab_size, m.width), m.table_std, spec.seed, "table")
        self.register_buffer("fixed", torch.from_numpy(fixed), persistent=False)
        self.register_buffer("basis", shared_basis(spec), persistent=False)
        self.free = spec.codec.kind == "ssn"
        width = m.width if self.free else spec.codec.k
        self.rows = nn.Parameter(torch.zeros(m.vocab_size, width)) if stage == 0 else None

    def enter(self, ids: Tensor, message: Tensor | None, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        ids = ids[:, skip:]
        known = F.embedding(ids, self.get_buffer("fixed"))
        code = F.embedding(ids, self.rows) if self.rows is not None else _present(message)
        if self.free and self.rows is not None:
            return code + known, known
        return code @ self.get_buffer("basis").T + known, known

    def leave(self, y: Tensor, known: Tensor | None) -> Tensor:
        return (y - _present(known)) @ self.get_buffer("basis")


class BoundaryCodec(Codec):
    """Own token table per stage, learned decoder at the entry and encoder at the exit."""

    def __init__(self, spec: ModelSpec, stage: int) -> None:
        super().__init__()
        self.low = spec.model.compute == "bfloat16"
        self.table = TokenTable(spec)
        basis = shared_basis(spec) if spec.stages > 1 else None
        self.decode = nn.Parameter(_present(basis).clone()) if stage > 0 else None  # [D, k]
        self.encode = nn.Parameter(_present(basis).T.contiguous()) if stage < spec.stages - 1 else None  # [k, D]

    def enter(self, ids: Tensor, message: Tensor | None, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        known = self.table(ids, skip)
        if self.decode is None:
            return known, known
        return linear(_present(message), self.decode, self.low) + known, known

    def leave(self, y: Tensor, known: Tensor | None) -> Tensor:
        return linear(y - _present(known), _present(self.encode), self.low)


def _present(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("a stage after the first needs a message, and only the last has no encoder")
    return value
