"""Messages as bytes: what crosses a boundary, in either direction, and nothing else.

A message is a tensor [B, T, width]; shape and direction are known from the name of the microbatch, so the bytes
carry no header and their number is exact. Layout of n-bit codes (int4 to int8): B·T bfloat16 scales, then B·T·width
codes in [-L, L], L = 2^(n-1) - 1, each as n bits, two's complement, the highest bit first, without gaps. Float layouts:
the numbers, little-endian. Bytes from a peer are checked for size, finiteness and range.

Legend: B sequences, T tokens, W numbers for each token.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import CODE_BITS, SCALE_BYTES, ModelSpec
from tessera.models.noise import uniform

__all__ = ["Wire"]

_TINY = 2.0**-100  # scales under it are sent as zero: dividing by them could overflow


class Wire:
    """Packs and unpacks the messages of one spec. Stateless."""

    def __init__(self, spec: ModelSpec) -> None:
        self.width = spec.message_width
        self.number = spec.codec.wire
        self._bits = CODE_BITS.get(self.number, 0)
        self._levels = 2 ** (self._bits - 1) - 1 if self._bits else 0
        self._token_bytes = spec.message_bytes_per_token()

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
        if self.number == "bfloat16":
            return x_BTW.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
        return x_BTW.contiguous().numpy().astype("<f4", copy=False).tobytes()

    def unpack(self, data: bytes, batch: int, length: int) -> Float[Tensor, "B T W"]:
        """The float32 message in `data`. Raises: Invalid for a wrong size, or numbers that no `pack` writes."""
        expected = self.size(batch, length)
        if len(data) != expected:
            raise Invalid(f"a message of {batch} x {length} tokens has {expected} bytes, not {len(data)}")
        shape = (batch, length, self.width)
        if self._bits:
            return self._unpack_codes(data, shape)
        if self.number == "bfloat16":
            x_BTW = _bfloat16(data).reshape(shape)
        else:
            x_BTW = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).reshape(shape)
        if not bool(torch.isfinite(x_BTW).all()):
            raise Invalid("a message holds numbers that are not finite")
        return x_BTW

    def _pack_codes(self, x_BTW: Tensor, noise: tuple[object, ...] | None) -> bytes:
        scale = _round_up_to_bfloat16(x_BTW.abs().amax(-1, keepdim=True) / self._levels)
        scale = torch.where(scale < _TINY, 0.0, scale)
        code = torch.where(scale > 0, x_BTW / scale, 0.0)
        if noise is None:
            code = code.round_()
        else:
            code = code.add_(torch.from_numpy(uniform(tuple(x_BTW.shape), *noise))).floor_()
        code = code.clamp_(-self._levels, self._levels).to(torch.int8)  # 127 + 0.9999999 is 128 in float32
        scales = scale.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False)
        return scales.tobytes() + _to_bits(code.numpy().ravel(), self._bits)

    def _unpack_codes(self, data: bytes, shape: tuple[int, int, int]) -> Tensor:
        cut = math.prod(shape[:2]) * SCALE_BYTES
        scale = _bfloat16(data[:cut]).reshape(*shape[:2], 1)
        if not bool(torch.isfinite(scale).all()) or bool(torch.signbit(scale).any()):
            raise Invalid("a message holds a scale that is negative or not finite")
        code = _from_bits(data[cut:], self._bits)
        if code.size and code.min() < -self._levels:
            raise Invalid(f"a message holds the code {-self._levels - 1}, which is never sent")
        x_BTW = torch.from_numpy(code.astype(np.float32)).reshape(shape) * scale
        if not bool(torch.isfinite(x_BTW).all()):
            raise Invalid("a message holds codes that overflow with their scale")
        return x_BTW


def _bfloat16(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(torch.bfloat16).to(torch.float32)


def _round_up_to_bfloat16(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not under x ≥ 0. Rounding down would clip the largest number of every token,
    and a clipped gradient is a biased one."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


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
