"""ABI in and out, in our own types: an address is a checksummed `Account`, an integer an int, bytes are bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eth_abi import abi as eth_abi
from eth_abi import decoding, encoding, grammar
from eth_abi.codec import ABIDecoder
from eth_abi.exceptions import DecodingError, EncodingError, ParseError
from eth_abi.registry import ABIRegistry, BaseEquals, registry

from tessera.core.errors import Invalid
from tessera.core.ids import parse_account

__all__ = ["decode", "decode_told", "encode", "plain", "type_of"]


class _AnyText(decoding.StringDecoder):
    @staticmethod
    def decoder_fn(data: bytes, handle_string_errors: str = "") -> str:
        return data.decode("utf-8", errors="replace")


def _forgiving() -> ABIDecoder:
    kinds: ABIRegistry = registry.copy()  # type: ignore[no-untyped-call]
    kinds.unregister("string")
    is_text = BaseEquals("string")  # type: ignore[no-untyped-call]
    kinds.register(is_text, encoding.TextStringEncoder, _AnyText, label="string")
    return ABIDecoder(kinds)


_TOLD = _forgiving()


def type_of(item: Mapping[str, Any]) -> str:
    """The type of an ABI entry's input or output as signatures write it: a struct is its fields in parentheses."""
    kind: str = item["type"]
    if kind.startswith("tuple"):
        return "(" + ",".join(type_of(part) for part in item["components"]) + ")" + kind.removeprefix("tuple")
    return kind


def encode(types: Sequence[str], values: Sequence[Any]) -> bytes:
    """The ABI bytes of `values`. Raises `Invalid` for a value that its type cannot hold."""
    try:
        return eth_abi.encode(types, values)
    except (EncodingError, ParseError, TypeError, ValueError, OverflowError) as error:
        raise Invalid(f"cannot encode ({', '.join(types)}): {error}") from error


def decode(types: Sequence[str], data: bytes) -> tuple[Any, ...]:
    """The values in a contract's answer. Raises `Invalid` when the bytes are not of these types."""
    return _decode(eth_abi.default_codec, types, data)


def decode_told(types: Sequence[str], data: bytes) -> tuple[Any, ...]:
    """The values in an event. Contracts pass on texts that are no UTF-8, and an event stays: U+FFFD stands for what
    cannot be read in one, so that whoever writes nonsense does not stop who reads on.
    """
    return _decode(_TOLD, types, data)


def _decode(decoder: ABIDecoder, types: Sequence[str], data: bytes) -> tuple[Any, ...]:
    try:
        values = decoder.decode(types, data)
    except (DecodingError, ParseError, ValueError, OverflowError) as error:
        raise Invalid(f"expected ({', '.join(types)}), the contract sent {len(data)} bytes: {error}") from error
    return tuple(plain(kind, value) for kind, value in zip(types, values, strict=True))


def plain(kind: str, value: Any) -> Any:
    """A decoded value with checksummed addresses, those in structs included."""
    if kind == "address":
        return parse_account(value)
    if kind == "address[]":
        return [parse_account(item) for item in value]
    if kind.endswith("]"):
        return list(value)
    if kind.startswith("("):
        parts = grammar.parse(kind).components
        return tuple(plain(part.to_type_str(), item) for part, item in zip(parts, value, strict=True))
    return value
