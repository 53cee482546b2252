"""What crosses a decode stream: a canonical JSON header, then token ids, then the boundary's code bytes.

    4 bytes   length of the header, big-endian
    header    canonical JSON object; "ids" counts the token ids that follow
    4·ids     token ids, unsigned little-endian
    rest      code bytes, empty at stage 0

Tokens with log-probabilities carry them where the code bytes would be; `pack_logprobs` says how. Hidden states lie
there too, as little-endian float32.

Everything is checked against limits before it is used; what does not fit is `Misbehaviour` of the peer that sent it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.serving.engine import MAX_LOGPROBS, Token

__all__ = [
    "HEADER_LIMIT", "LOGPROB_BYTES", "Frame", "frame_limit", "pack", "pack_hidden", "pack_logprobs", "unpack",
    "unpack_hidden", "unpack_logprobs",
]  # fmt: skip

HEADER_LIMIT = 4_096  # bytes
LOGPROB_BYTES = 8 + 12 * MAX_LOGPROBS  # most for one token
_LENGTH = struct.Struct(">I")
_OWN, _LIKELY = struct.Struct("<d"), struct.Struct("<Id")


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


def pack_logprobs(tokens: Sequence[Token]) -> bytes:
    """Of each token: its own log-probability as float64, then (uint32, float64) for each of the likeliest.

    Empty when there are none.
    """
    parts = list[bytes]()
    for token in tokens:
        if token.logprob is not None:
            parts.append(_OWN.pack(token.logprob))
            parts += [_LIKELY.pack(*likely) for likely in token.top]
    return b"".join(parts)


def unpack_logprobs(ids: Sequence[int], data: bytes, count: int | None) -> list[Token]:
    """The tokens `ids` with `count` likeliest each. Raises: Misbehaviour: other bytes than `pack_logprobs` makes."""
    size = 0 if count is None else _OWN.size + _LIKELY.size * count
    if len(data) != size * len(ids):
        raise Misbehaviour(f"expected {size * len(ids)} bytes of log-probabilities, not {len(data)}")
    if count is None:
        return [Token(token) for token in ids]
    tokens = list[Token]()
    for place, token in enumerate(ids):
        (own,) = _OWN.unpack_from(data, place * size)
        top = tuple(_LIKELY.iter_unpack(data[place * size + _OWN.size : (place + 1) * size]))
        if not all(-math.inf < value <= 0 for value in (own, *(value for _, value in top))):
            raise Misbehaviour("a log-probability is a number of at most 0")
        tokens.append(Token(token, own, top))
    return tokens


def pack_hidden(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def unpack_hidden(data: bytes) -> list[float]:
    """Raises: Misbehaviour for anything but finite numbers."""
    values = list(struct.unpack(f"<{len(data) // 4}f", data[: len(data) // 4 * 4]))
    if not values or len(data) % 4 or not all(math.isfinite(value) for value in values):
        raise Misbehaviour(f"expected a hidden state, not {len(data)} bytes of something else")
    return values


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
