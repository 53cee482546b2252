"""Makes iroh 1.2.0's Python wheel fast, or refuses to load.

The generated code copies every outgoing byte in a Python loop: 7 MB/s and 140 CPU-seconds per GB. One `memmove` in its
place gives 20 times that (n0-computer/iroh-ffi#229; fixed upstream in uniffi 0.32, which this wheel does not have).

It replaces one private method, so iroh is pinned, and the replacement is compared with the original at import: a wheel
with another layout stops here, with the reason, rather than corrupting data.
"""

from __future__ import annotations

import ctypes
from typing import Any

import iroh.iroh_ffi as generated

__all__ = ["install"]

_PROBES = (b"", b"x", bytes(range(256)) * 9)


def install() -> None:
    """Replace the slow copy. Safe to repeat. Raises `ImportError` when this is not the wheel that we know."""
    try:
        builder = generated._UniffiRustBufferBuilder
        if builder.write is _write:
            return
        expected = [_encoded(probe) for probe in _PROBES]
        slow, builder.write = builder.write, _write
        if [_encoded(probe) for probe in _PROBES] != expected:
            builder.write = slow
            raise ImportError("the installed iroh copies bytes in another layout: install iroh==1.2.0")
    except (AttributeError, TypeError) as error:
        raise ImportError(f"the installed iroh has another inside ({error}): install iroh==1.2.0") from error


def _write(self: Any, value: bytes | bytearray | memoryview) -> None:
    """`_UniffiRustBufferBuilder.write` in one copy. `_reserve` has made the room before we look at the address."""
    source = value if isinstance(value, bytes) else bytes(value)
    with self._reserve(len(source)):
        if source:
            ctypes.memmove(_address(self.rbuf) + self.rbuf.len, source, len(source))


def _address(buffer: Any) -> int:
    """Where a RustBuffer's data lies."""
    address = ctypes.cast(buffer.data, ctypes.c_void_p).value
    if address is None:
        raise TypeError("a RustBuffer without memory")
    return address


def _encoded(value: bytes) -> bytes:
    """`value` as it crosses to Rust, its length included; the buffer is given back."""
    buffer = generated._UniffiFfiConverterBytes.lower(value)
    try:
        return ctypes.string_at(_address(buffer), buffer.len)
    finally:
        buffer.free()


install()
