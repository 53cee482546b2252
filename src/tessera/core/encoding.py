"""Canonical encoding: one value, one byte string. What is hashed or signed goes through here.

The form is JSON with sorted keys, no spaces, UTF-8, integers of up to 2,048 bits, and finite floats in their
shortest round-trip form. `decode` refuses every other spelling of the same value (duplicate keys, spaces, `1e0`,
`NaN`), so a signature covers exactly one text. Bytes travel as lower-case hex strings. specs/encoding.md says it
for other languages, with test vectors.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tessera.core.errors import Invalid

__all__ = ["decode", "encode", "hex_bytes"]

MAX_DEPTH = 32
MAX_INT_BITS = 2_048  # 617 digits: within the 640 that every Python setting prints and parses, and in linear time


def encode(value: Any) -> bytes:
    """The canonical bytes of None, bool, int, finite float, str, and lists, tuples and str-keyed dicts of them.

    Raises: Invalid for anything else.  Cost: O(size).

    >>> encode({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    _check(value, 0)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise Invalid(f"text with a lone surrogate cannot be encoded: {error}") from error


def decode(data: bytes, limit: int) -> Any:
    """The value of canonical `data`.

    Args:
        limit: most bytes to look at; anything from a peer has one.

    Raises: Invalid for too many bytes, bad JSON, or bytes that are not the canonical form of their value.
    """
    if len(data) > limit:
        raise Invalid(f"{len(data)} bytes, at most {limit} expected")
    try:
        value = json.loads(data)
        canonical = encode(value)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not canonical JSON: {error}") from error
    if canonical != data:
        raise Invalid("not in canonical form: keys sorted, no spaces, no duplicate keys, shortest numbers")
    return value


def hex_bytes(text: object, size: int) -> bytes:
    """The bytes of their one spelling: lower-case hex, no spaces.

    Raises: Invalid for anything but `size` bytes.

    >>> hex_bytes("6162", 2)
    b'ab'
    """
    try:
        data = bytes.fromhex(text) if isinstance(text, str) and len(text) == 2 * size else b""
    except ValueError:
        data = b""
    if len(data) != size or data.hex() != text:
        raise Invalid(f"expected {size} bytes in lower-case hex, not {str(text)[:40]!r}")
    return data


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Invalid(f"nested deeper than {MAX_DEPTH}")
    if value is None or type(value) in (bool, str):
        return
    if type(value) is int:
        if value.bit_length() > MAX_INT_BITS:
            raise Invalid(f"an integer of {value.bit_length()} bits, at most {MAX_INT_BITS} expected")
    elif type(value) is float:
        if not math.isfinite(value):
            raise Invalid(f"{value} has no canonical form")
    elif type(value) in (list, tuple):
        for item in value:
            _check(item, depth + 1)
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise Invalid(f"a key must be a str, not {key!r}")
            _check(item, depth + 1)
    else:
        raise Invalid(f"cannot encode a {type(value).__name__}: {value!r}")
