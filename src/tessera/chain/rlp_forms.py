"""Ethereum's recursive length prefix, the writing half: forty lines that a block and a trie call thousands of times.

Reading foreign bytes is the `rlp` library's business. A test compares what is written here with what it writes.
"""

from __future__ import annotations

from typing import Any

__all__ = ["rlp_bytes", "rlp_encode", "rlp_list"]


def rlp_encode(item: int | bytes | list[Any]) -> bytes:
    """The form of an int ≥ 0, of bytes, or of a list of such items."""
    if isinstance(item, list):
        return rlp_list(b"".join(map(rlp_encode, item)))
    return rlp_bytes(item.to_bytes((item.bit_length() + 7) // 8, "big") if isinstance(item, int) else item)


def rlp_bytes(data: bytes) -> bytes:
    if len(data) == 1 and data[0] < 0x80:
        return data
    return _prefix(len(data), 0x80) + data


def rlp_list(items: bytes) -> bytes:
    """The list of items that are encoded already and stand one after the other."""
    return _prefix(len(items), 0xC0) + items


def _prefix(length: int, offset: int) -> bytes:
    if length < 56:
        return bytes([offset + length])
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([offset + 55 + len(size)]) + size
