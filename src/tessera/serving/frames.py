"""What crosses a decode stream: a canonical JSON header, then token ids, then the boundary's code bytes.

    4 bytes   length of the header, big-endian
    header    canonical JSON object; "ids" counts the token ids that follow
    4·ids     token ids, unsigned little-endian
    rest      code bytes, empty at stage 0

Everything is checked against limits before it is used; what does not fit is `Misbehaviour` of the peer that sent it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour

__all__ = ["HEADER_LIMIT", "Frame", "frame_limit", "pack", "unpack"]

HEADER_LIMIT = 4_096  # bytes
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between stages."""

    header: dict[str, Any]
    ids: list[int]
    payload: bytes

    @property
    def op(self) -> object:
        return self.header.get("op")


def frame_limit(tokens: int, payload: int) -> int:
    """The most bytes of a frame with `tokens` ids and `payload` code bytes."""
    return _LENGTH.size + HEADER_LIMIT + 4 * tokens + payload


def pack(header: dict[str, Any], ids: Sequence[int] = (), payload: bytes = b"") -> bytes:
    """The bytes of a frame. Raises: Invalid when the header is too long or an id is no uint32."""
    head = encoding.encode({**header, "ids": len(ids)})
    if len(head) > HEADER_LIMIT:
        raise Invalid(f"a header of {len(head)} bytes, at most {HEADER_LIMIT} expected")
    try:
        packed = struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise Invalid(f"a token id does not fit 32 bits: {error}") from error
    return _LENGTH.pack(len(head)) + head + packed + payload


def unpack(data: bytes, *, max_tokens: int, vocab_size: int) -> Frame:
    """The frame in `data`. Raises: Misbehaviour naming what is wrong."""
    try:
        return _unpack(bytes(data), max_tokens, vocab_size)
    except (Invalid, struct.error) as error:
        raise Misbehaviour(f"a bad decode frame: {error}", evidence=bytes(data[:64]).hex()) from error


def _unpack(data: bytes, max_tokens: int, vocab_size: int) -> Frame:
    (length,) = _LENGTH.unpack_from(data)
    if length > HEADER_LIMIT:
        raise Invalid(f"a header of {length} bytes, at most {HEADER_LIMIT} expected")
    start = _LENGTH.size + length
    if start > len(data):
        raise Invalid(f"the header ends at byte {start} of {len(data)}")
    header = encoding.decode(data[_LENGTH.size : start], HEADER_LIMIT)
    if not isinstance(header, dict):
        raise Invalid("the header is not an object")
    count = header.pop("ids", None)
    if type(count) is not int or not 0 <= count <= max_tokens:
        raise Invalid(f"0 to {max_tokens} ids expected, not {count!r}")
    ids = list(struct.unpack_from(f"<{count}I", data, start))
    if any(token >= vocab_size for token in ids):
        raise Invalid(f"a token id outside the vocabulary of {vocab_size}")
    return Frame(header, ids, data[start + 4 * count :])
