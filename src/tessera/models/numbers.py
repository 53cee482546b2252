"""Rows of numbers as bytes, without headers: the receiver knows how many there are, so the size is exact.

    float32, bfloat16   the numbers, little-endian
    int8                a bfloat16 scale for each block of 256, then a code in [-127, 127] for each number

Bytes from a peer are checked for size, finiteness and range.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Invalid

__all__ = ["LEVELS", "TINY", "Number", "from_bfloat16", "pack_numbers", "packed_bytes", "round_up_to_bfloat16",
           "to_bfloat16", "unpack_numbers"]  # fmt: skip

Number = Literal["float32", "bfloat16", "int8"]

LEVELS = 127
TINY = 2.0**-100  # scales under it are sent as zero: dividing by them could overflow
BLOCK = 256  # numbers that share a scale
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def packed_bytes(count: int, number: Number) -> int:
    """Exact bytes of `count` numbers."""
    return count * _BYTES[number] + (2 * -(-count // BLOCK) if number == "int8" else 0)


def pack_numbers(x: Tensor, number: Number) -> bytes:
    """The numbers of a finite float32 tensor in RAM; int8 takes the nearest code."""
    if number == "bfloat16":
        return to_bfloat16(x)
    if number == "float32":
        return x.contiguous().numpy().astype("<f4", copy=False).tobytes()
    count = x.numel()
    blocks = torch.nn.functional.pad(x.flatten(), (0, -count % BLOCK)).view(-1, BLOCK)
    scale = round_up_to_bfloat16(blocks.abs().amax(-1, keepdim=True) / LEVELS)
    scale = torch.where(scale < TINY, 0.0, scale)
    code = torch.where(scale > 0, blocks / scale, 0.0).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return to_bfloat16(scale) + code.flatten()[:count].numpy().tobytes()


def unpack_numbers(data: bytes | memoryview, count: int, number: Number) -> Float[Tensor, " N"]:
    """The float32 numbers in `data`. Raises: Invalid: another size, or numbers that no `pack_numbers` writes."""
    if len(data) != packed_bytes(count, number):
        raise Invalid(f"{count} numbers in {number} have {packed_bytes(count, number)} bytes, not {len(data)}")
    if number == "bfloat16":
        x = from_bfloat16(data)
    elif number == "float32":
        x = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    else:
        x = _unpack_blocks(data, count)
    if not bool(torch.isfinite(x).all()):
        raise Invalid("a message holds numbers that are not finite")
    return x


def to_bfloat16(x: Tensor) -> bytes:
    return x.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()


def from_bfloat16(data: bytes | memoryview) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(torch.bfloat16).to(torch.float32)


def round_up_to_bfloat16(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not under x ≥ 0. Rounding down would clip the largest number of every block,
    and a clipped gradient is a biased one."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _unpack_blocks(data: bytes | memoryview, count: int) -> Tensor:
    cut = 2 * -(-count // BLOCK)
    scale, code = from_bfloat16(data[:cut]), np.frombuffer(data, np.int8, offset=cut)
    if bool(torch.signbit(scale).any()):
        raise Invalid("a message holds a scale under zero")
    if code.size and code.min() < -LEVELS:
        raise Invalid("a message holds the code -128, which is never sent")
    return torch.from_numpy(code.astype(np.float32)) * scale.repeat_interleave(BLOCK)[:count]
