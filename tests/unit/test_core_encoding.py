"""Canonical encoding: every other spelling of a value is refused, and so is what has no spelling."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.core.encoding import MAX_DEPTH, MAX_INT_BITS, decode, encode, hex_bytes
from tessera.core.errors import Invalid

OTHER_SPELLINGS = {
    "space after a colon": b'{"a": 1}',
    "space around": b" 1",
    "newline at the end": b"1\n",
    "unsorted keys": b'{"b":1,"a":2}',
    "duplicate keys": b'{"a":1,"a":1}',
    "escaped ASCII": b'"\\u0041"',
    "escaped letter": b'"\\u00e9"',
    "escaped slash": b'"\\/"',
    "upper-case escape": b'"\\u001F"',
    "exponent": b"1e0",
    "long float": b"1.00",
    "upper-case exponent": b"1E+16",
    "negative zero integer": b"-0",
    "NaN": b"NaN",
    "infinity": b"Infinity",
    "float beyond range": b"1e999",
    "byte order mark": b"\xef\xbb\xbf1",
    "UTF-16": "{}".encode("utf-16-le"),
    "invalid UTF-8": b'"\xff"',
    "escaped lone surrogate": b'"\\ud800"',
    "raw surrogate": b'"\xed\xa0\x80"',
    "leading zero": b"01",
    "trailing comma": b"[1,]",
    "two values": b"1 2",
    "nothing": b"",
    "integer of 5,000 digits": b"9" * 5_000,
    "a hundred thousand brackets": b"[" * 100_000,
}


@pytest.mark.parametrize("data", OTHER_SPELLINGS.values(), ids=OTHER_SPELLINGS.keys())
def test_bytes_that_are_not_canonical_are_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        decode(data, 1_000_000)


@pytest.mark.parametrize(
    "value",
    [b"bytes", {1, 2}, object(), {1: "int key"}, {None: 1}, float("nan"), float("inf"), "\ud800", {"\ud800": 1}, 1j],
    ids=lambda value: type(value).__name__,
)
def test_a_value_without_a_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(Invalid):
        encode(value)


def test_a_subclass_that_prints_as_something_else_is_refused() -> None:
    class Loud(str):
        pass

    with pytest.raises(Invalid, match="cannot encode a Loud"):
        encode(Loud("x"))


def test_the_limit_counts_bytes_and_is_exact() -> None:
    assert decode(b"[1,2]", 5) == [1, 2]
    with pytest.raises(Invalid, match="5 bytes, at most 4"):
        decode(b"[1,2]", 4)


def test_nesting_is_limited_both_ways() -> None:
    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth else 0

    assert decode(encode(nested(MAX_DEPTH)), 1_000) == nested(MAX_DEPTH)
    with pytest.raises(Invalid, match="nested deeper"):
        encode(nested(MAX_DEPTH + 1))
    with pytest.raises(Invalid, match="nested deeper"):
        decode(b"[" * (MAX_DEPTH + 1) + b"0" + b"]" * (MAX_DEPTH + 1), 1_000)


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(Invalid, match="nested deeper"):
        encode(loop)


def test_integers_are_limited_both_ways() -> None:
    largest = 2**MAX_INT_BITS - 1
    assert decode(encode(-largest), 1_000) == -largest
    with pytest.raises(Invalid, match="2049 bits"):
        encode(largest + 1)
    with pytest.raises(Invalid, match="2049 bits"):
        decode(str(largest + 1).encode(), 1_000)


def test_a_number_keeps_its_type() -> None:
    assert encode(1) == b"1"
    assert encode(1.0) == b"1.0"
    assert encode(True) == b"true"
    assert type(decode(b"1.0", 10)) is float


def test_bytes_have_one_spelling() -> None:
    assert hex_bytes("00ff", 2) == b"\x00\xff"
    assert hex_bytes("", 0) == b""
    for other in (
        "00FF",
        "00fF",
        "0xff",
        "00f",
        "00ff00",
        " 0ff",
        "00 ff",
        "zzzz",
        "\uff10\uff10ff",
        b"00ff",
        255,
        None,
    ):
        with pytest.raises(Invalid, match="expected 2 bytes in lower-case hex"):
            hex_bytes(other, 2)
