"""Messages as bytes: what crosses a boundary, in either direction, and nothing else.

A message is a tensor [B, T, width]; shape and direction are known from the name of the microbatch, so the bytes
carry no header and their number is exact. Layout of n-bit codes (int4 to int8): B·T bfloat16 scales, then B·T·width
codes in [-L, L], L = 2^(n-1) - 1, each as n bits, two's complement, the highest bit first, without gaps. Float layouts:
the numbers, little-endian. Bytes from a peer are checked for size, finiteness and range.

Legend: B sequences, T tokens, W numbers for each token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import CODE_BITS, SCALE_BYTES, ModelSpec
from tessera.models.noise import uniform
from tessera.models.numbers import (
    LEVELS,
    TINY,
    Number,
    from_bfloat16,
    pack_numbers,
    round_up_to_bfloat16,
    to_bfloat16,
    unpack_numbers,
)

__all__ = ["Wire"]


class Wire:
    """Packs and unpacks the messages of one spec. Stateless."""

    def __init__(self, spec: ModelSpec) -> None:
        self.width = spec.message_width
        self.number = spec.codec.wire
        self._bits = CODE_BITS.get(self.number, 0)
        self._levels = 2 ** (self._bits - 1) - 1 if self._bits else LEVELS
        self._floats: Number = "bfloat16" if self.number == "bfloat16" else "float32"  # where there are no codes
        self._token_bytes = spec.message_bytes_per_token()

    @property
    def coded(self) -> bool:
        """Whether messages are integer codes with a scale for each token."""
        return self._bits > 0

    def size(self, batch: int, length: int) -> int:
        """Exact bytes of a message of `batch` × `length` tokens."""
        return batch * length * self._token_bytes

    def pack(self, x_BTW: Float[Tensor, "B T W"], noise: tuple[object, ...] | None = None) -> bytes:
        """The bytes of a message.

        Args:
            noise: a name for the rounding noise. With one, codes round up or down at random, so that the mean is
                exact (gradients); equal names give equal bytes. Without, to the nearest code (activations).

        Raises: Invalid: a number that is not finite, that is, training diverged.
        """
        x_BTW = x_BTW.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(x_BTW).all()):
            raise Invalid("a message holds numbers that are not finite: the training diverged, lower its rates")
        if self._bits:
            return self._pack_codes(x_BTW, noise)
        return pack_numbers(x_BTW, self._floats)

    def unpack(self, data: bytes, batch: int, length: int) -> Float[Tensor, "B T W"]:
        """The float32 message in `data`. Raises: Invalid for a wrong size, or numbers that no `pack` writes."""
        expected = self.size(batch, length)
        if len(data) != expected:
            raise Invalid(f"a message of {batch} x {length} tokens has {expected} bytes, not {len(data)}")
        shape = (batch, length, self.width)
        if self._bits:
            return self._unpack_codes(data, shape)
        return unpack_numbers(data, math.prod(shape), self._floats).reshape(shape)

    def split(self, data: bytes, lengths: Sequence[int]) -> list[bytes]:
        """The messages of consecutive runs of tokens, out of one of them all. A look at bytes: nothing is rounded."""
        total, scale = sum(lengths), SCALE_BYTES if self.coded else 0
        numbers, size, start = total * scale, self._token_bytes - scale, 0
        parts = []
        for length in lengths:
            end = start + length
            parts.append(data[start * scale : end * scale] + data[numbers + start * size : numbers + end * size])
            start = end
        return parts

    def join(self, parts: Sequence[bytes]) -> bytes:
        """The inverse of `split`."""
        if not self.coded:
            return b"".join(parts)
        cuts = [len(part) // self._token_bytes * SCALE_BYTES for part in parts]
        heads = [part[:cut] for part, cut in zip(parts, cuts, strict=True)]
        return b"".join(heads + [part[cut:] for part, cut in zip(parts, cuts, strict=True)])

    def scales(self, data: bytes, batch: int, length: int) -> Float[Tensor, "B T 1"]:
        """One step of each token's codes, in a message of codes whose size is right. Not checked further."""
        return from_bfloat16(data[: batch * length * SCALE_BYTES]).reshape(batch, length, 1)

    def step_sizes(self, x_BTW: Float[Tensor, "B T W"]) -> Float[Tensor, "B T 1"]:
        """The scale that `pack` gives each token: a bfloat16 number with which no code exceeds the largest."""
        scale = round_up_to_bfloat16(x_BTW.abs().amax(-1, keepdim=True) / self._levels)
        return torch.where(scale < TINY, 0.0, scale)

    def quantise(
        self, x_BTW: Float[Tensor, "B T W"], scale_BT1: Float[Tensor, "B T 1"], noise: tuple[object, ...] | None
    ) -> Float[Tensor, "B T W"]:
        """x in whole steps of `scale`, within the codes' range; 0 where the scale is. `noise` is as in `pack`."""
        x = torch.where(scale_BT1 > 0, x_BTW / scale_BT1, 0.0)
        code = x.round_() if noise is None else x.add_(torch.from_numpy(uniform(tuple(x.shape), *noise))).floor_()
        return code.clamp_(-self._levels, self._levels)  # 127 + 0.9999999 rounds to 128 in float32

    def _pack_codes(self, x_BTW: Tensor, noise: tuple[object, ...] | None) -> bytes:
        scale = self.step_sizes(x_BTW)
        code = self.quantise(x_BTW, scale, noise).to(torch.int8)
        return to_bfloat16(scale) + _to_bits(code.contiguous().numpy().ravel(), self._bits)

    def _unpack_codes(self, data: bytes, shape: tuple[int, int, int]) -> Tensor:
        cut = math.prod(shape[:2]) * SCALE_BYTES
        scale = self.scales(data, *shape[:2])
        if not bool(torch.isfinite(scale).all()) or bool(torch.signbit(scale).any()):
            raise Invalid("a message holds a scale that is negative or not finite")
        code = _from_bits(data[cut:], self._bits)
        if code.size and code.min() < -self._levels:
            raise Invalid(f"a message holds the code {-self._levels - 1}, which is never sent")
        x_BTW = torch.from_numpy(code.astype(np.float32)).reshape(shape) * scale
        if not bool(torch.isfinite(x_BTW).all()):
            raise Invalid("a message holds codes that overflow with their scale")
        return x_BTW


def _to_bits(code: NDArray[np.int8], bits: int) -> bytes:
    """Codes, `bits` each. Their number times `bits` is a multiple of 8."""
    if bits == 8:
        return code.tobytes()
    return np.packbits(np.unpackbits(code.view(np.uint8)[:, None], axis=1)[:, 8 - bits :]).tobytes()


def _from_bits(data: bytes, bits: int) -> NDArray[np.int8]:
    if bits == 8:
        return np.frombuffer(data, np.int8)
    high = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, bits), axis=1)[:, 0]
    return high.view(np.int8) >> (8 - bits)  # the shift keeps the sign
