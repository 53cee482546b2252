"""One replica's part of a step's gradient as bytes, and the gradient of all parts together.

    part = tokens, 8 bytes ‖ sum of losses, 8 bytes ‖ one number for each parameter, little-endian

Parameters follow in the order of their names; number and shapes are known from the stage, so the size is exact. A part
holds sums over the replica's tokens; a replica that computed nothing in this step sends zeros. Parts are added in the
order in which they are given, so replicas that add the same parts get the same bits.

Bytes from a peer are checked for size, finiteness and the number of tokens that they claim.

Legend: N parts, D numbers of one parameter.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Conflict, Invalid
from tessera.models.numbers import Number, pack_numbers, packed_bytes, unpack_numbers
from tessera.models.robust import agreeing, centered_clip, clipped_pair

__all__ = ["GradientForm", "GradientPart"]

_HEAD = struct.Struct("<Qd")
MAX_TOKENS = 2**40  # of one step


@dataclass(frozen=True, slots=True)
class GradientPart:
    """Sums over `tokens` tokens: losses in nats (0 away from the last stage), and all gradients in a row."""

    tokens: int
    loss_sum: float
    flat: Float[Tensor, " D"]


class GradientForm:
    """How one stage's gradients look on the wire.

    Args:
        shapes: of the parameters, by name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], number: Number) -> None:
        self._shapes, self._number = dict(sorted(shapes.items())), number
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self.size_bytes = _HEAD.size + packed_bytes(sum(self._sizes), number)

    def pack(self, tokens: int, loss_sum: float, sums: Mapping[str, Tensor]) -> bytes:
        """Raises: Invalid: a gradient that is not finite, that is, training diverged."""
        flat = torch.cat([sums[name].detach().to("cpu", torch.float32).flatten() for name in self._shapes])
        if not bool(torch.isfinite(flat).all()):
            raise Invalid("a gradient is not finite: the training diverged, lower its rates")
        return _HEAD.pack(tokens, loss_sum) + pack_numbers(flat, self._number)

    def unpack(self, data: bytes, most_tokens: int = MAX_TOKENS) -> GradientPart:
        """Raises: Invalid for bytes that no `pack` of a step of `most_tokens` tokens writes."""
        if len(data) != self.size_bytes:
            raise Invalid(f"a gradient part has {self.size_bytes} bytes, not {len(data)}")
        tokens, loss_sum = _HEAD.unpack_from(data)
        if tokens > most_tokens:
            raise Invalid(f"a gradient part of {tokens} tokens: the step has {most_tokens}")
        if not 0 <= loss_sum < math.inf or (tokens == 0 and loss_sum != 0):
            raise Invalid(f"a gradient part whose {tokens} tokens lose {loss_sum} nats")
        flat = unpack_numbers(memoryview(data)[_HEAD.size :], sum(self._sizes), self._number)
        if tokens == 0 and bool(flat.any()):
            raise Invalid("a gradient part of no tokens that is not zero")
        return GradientPart(tokens, loss_sum, flat)

    def total(self, parts: Sequence[GradientPart], *, robust: bool) -> tuple[int, float, dict[str, Tensor]]:
        """(tokens that the gradients are sums over, mean loss, gradients by name).

        Robust means, parameter by parameter, CenteredClip of the means of the parts that agree, each weighing as its
        tokens but no more than the median part: who claims more gets no more. What comes out is a mean, so its tokens
        are 1.

        Raises: Conflict: no part has a token.
        """
        present = [part for part in parts if part.tokens]
        if not present:
            raise Conflict("no microbatch went through any replica of this stage in this step")
        tokens = sum(part.tokens for part in present)
        if robust and len(present) > 1:
            loss = median(part.loss_sum / part.tokens for part in present)
            return 1, loss, self._split(self._robust_mean(present))
        flat = present[0].flat.clone()
        for part in present[1:]:
            flat += part.flat
        return tokens, sum(part.loss_sum for part in present) / tokens, self._split(flat)

    def _robust_mean(self, parts: list[GradientPart]) -> Tensor:
        most = sorted(part.tokens for part in parts)[(len(parts) - 1) // 2]
        weights = [float(min(part.tokens, most)) for part in parts]
        columns = zip(*(part.flat.split_with_sizes(self._sizes) for part in parts), strict=True)
        tensors = [torch.stack([sums / p.tokens for sums, p in zip(column, parts, strict=True)]) for column in columns]
        if len(parts) == 2:
            return torch.cat([clipped_pair(x_ND) for x_ND in tensors])
        trusted, means = agreeing(tensors), []
        for x_ND in tensors:  # who agrees on the whole may still lie about a little of it
            kept = [trusted[i] for i in agreeing([x_ND[trusted]])]
            means.append(centered_clip(x_ND[kept], [weights[i] for i in kept]))
        return torch.cat(means)

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        if not bool(torch.isfinite(flat).all()):
            raise Invalid("the gradients of all replicas sum to numbers that are not finite")
        pieces = zip(self._shapes.items(), flat.split_with_sizes(self._sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in pieces}
