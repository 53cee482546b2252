"""Messages as bytes: what crosses a boundary, in either direction, and nothing else.

A message is a tensor [B, T, width]; shape and direction are known from the name of the microbatch, so the bytes
carry no header and their number is exact. int8 layout: B·T bfloat16 scales, then B·T·width codes in [-127, 127].
Float layouts: the numbers, little-endian. Bytes from a peer are checked for size, finiteness and range.

Legend: B sequences, T tokens, W numbers for each token.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import SCALE_BYTES, ModelSpec
from tessera.models.noise import uniform
from tessera.models.numbers import (
    LEVELS,
    TINY,
    from_bfloat16,
    pack_numbers,
    round_up_to_bfloat16,
    to_bfloat16,
    unpack_numbers,
)

__all__ = ["Wire", "quantise", "step_sizes"]


class Wire:
    """Packs and unpacks the messages of one spec. Stateless."""

    def __init__(self, spec: ModelSpec) -> None:
        self.width = spec.message_width
        self.number = spec.codec.wire
        self._token_bytes = spec.message_bytes_per_token()

    def size(self, batch: int, length: int) -> int:
        """Exact bytes of a message of `batch` × `length` tokens."""
        return batch * length * self._token_bytes

    def pack(self, x_BTW: Float[Tensor, "B T W"], noise: tuple[object, ...] | None = None) -> bytes:
        """The bytes of a message.

        Args:
            noise: a name for the rounding noise. With one, int8 rounds up or down at random, so that the mean is
                exact (gradients); equal names give equal bytes. Without, to the nearest code (activations).

        Raises: Invalid: a number that is not finite, that is, training diverged.
        """
        x_BTW = x_BTW.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(x_BTW).all()):
            raise Invalid("a message holds numbers that are not finite: the training diverged, lower its rates")
        if self.number == "int8":
            return self._pack_int8(x_BTW, noise)
        return pack_numbers(x_BTW, self.number)

    def unpack(self, data: bytes, batch: int, length: int) -> Float[Tensor, "B T W"]:
        """The float32 message in `data`. Raises: Invalid for a wrong size, or numbers that no `pack` writes."""
        expected = self.size(batch, length)
        if len(data) != expected:
            raise Invalid(f"a message of {batch} x {length} tokens has {expected} bytes, not {len(data)}")
        shape = (batch, length, self.width)
        if self.number == "int8":
            return self._unpack_int8(data, shape)
        return unpack_numbers(data, math.prod(shape), self.number).reshape(shape)

    def scales(self, data: bytes, batch: int, length: int) -> Float[Tensor, "B T 1"]:
        """One step of each token's codes, in an int8 message whose size is right. Not checked further."""
        return from_bfloat16(data[: batch * length * SCALE_BYTES]).reshape(batch, length, 1)

    def _pack_int8(self, x_BTW: Tensor, noise: tuple[object, ...] | None) -> bytes:
        scale = step_sizes(x_BTW)
        code = quantise(x_BTW, scale, noise).to(torch.int8)
        return to_bfloat16(scale) + code.contiguous().numpy().tobytes()

    def _unpack_int8(self, data: bytes, shape: tuple[int, int, int]) -> Tensor:
        cut = math.prod(shape[:2]) * SCALE_BYTES
        scale = self.scales(data, *shape[:2])
        if not bool(torch.isfinite(scale).all()) or bool(torch.signbit(scale).any()):
            raise Invalid("a message holds a scale that is negative or not finite")
        code = np.frombuffer(data, np.int8, offset=cut)
        if code.size and code.min() < -LEVELS:
            raise Invalid("a message holds the code -128, which is never sent")
        x_BTW = torch.from_numpy(code.astype(np.float32)).reshape(shape) * scale
        if not bool(torch.isfinite(x_BTW).all()):
            raise Invalid("a message holds codes that overflow with their scale")
        return x_BTW


def step_sizes(x_BTW: Float[Tensor, "B T W"]) -> Float[Tensor, "B T 1"]:
    """The scale that `Wire.pack` gives each token: a bfloat16 number with which no code exceeds 127."""
    scale = round_up_to_bfloat16(x_BTW.abs().amax(-1, keepdim=True) / LEVELS)
    return torch.where(scale < TINY, 0.0, scale)


def quantise(
    x_BTW: Float[Tensor, "B T W"], scale_BT1: Float[Tensor, "B T 1"], noise: tuple[object, ...] | None
) -> Float[Tensor, "B T W"]:
    """x in whole steps of `scale`, in [-127, 127]; 0 where the scale is. `noise` is as in `Wire.pack`."""
    x = torch.where(scale_BT1 > 0, x_BTW / scale_BT1, 0.0)
    code = x.round_() if noise is None else x.add_(torch.from_numpy(uniform(tuple(x.shape), *noise))).floor_()
    return code.clamp_(-LEVELS, LEVELS)  # 127 + 0.9999999 rounds to 128 in float32
