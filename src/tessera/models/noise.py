"""Random numbers by name: equal on every machine, for initial values, batches and rounding.

Numbers come from Philox 4x64, a counter-based generator, keyed by the SHA-256 of a name. Only its raw integers are
used and everything derived from them is exact in float32 (no logarithm, no library's idea of a normal
distribution), so two peers that never talked agree to the last bit. No global generator is read or advanced.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core.encoding import encode
from tessera.core.hashing import sha256

__all__ = ["integers", "orthonormal", "symmetric", "uniform"]


def _words(count: int, name: tuple[Any, ...]) -> NDArray[np.uint64]:
    key = int.from_bytes(sha256(b"tessera/noise/1", encode(list(name)))[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


def uniform(shape: tuple[int, ...], *name: Any) -> NDArray[np.float32]:
    """Multiples of 2^-24 in [0, 1). `name` is any canonical-encodable list of parts."""
    count = math.prod(shape)
    words = _words((count + 1) // 2, name).astype("<u8", copy=False).view("<u4")[:count]
    return ((words >> 8).astype(np.float32) * np.float32(2**-24)).reshape(shape)


def symmetric(shape: tuple[int, ...], std: float, *name: Any) -> NDArray[np.float32]:
    """Uniform on an interval around 0 with standard deviation `std`."""
    half = np.float32(std * math.sqrt(3.0))
    return (uniform(shape, *name) * np.float32(2) - np.float32(1)) * half


def integers(count: int, below: int, *name: Any) -> NDArray[np.int64]:
    """`count` integers in [0, below). The bias of the remainder is under below / 2^64."""
    return (_words(count, name) % np.uint64(below)).astype(np.int64)


def orthonormal(rows: int, columns: int, *name: Any) -> NDArray[np.float32]:
    """A rows × columns matrix with orthonormal columns.

    The factorisation runs in float64 and is rounded to float32, so LAPACK's freedom in the last float64 bits shows
    in about one entry in 10^8.
    """
    q, r = np.linalg.qr(symmetric((rows, columns), 1.0, *name).astype(np.float64))
    return (q * np.sign(np.diag(r))).astype(np.float32)
