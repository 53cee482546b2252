"""EIP-712: hashes of named fields, which a wallet can show to its owner and a contract can compute itself.

Written here because eth-account takes half a second to import; tests compare with it and with the contracts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account, parse_account

__all__ = ["domain", "struct_hash", "typed_digest"]

_FIELD = re.compile(r"([a-z]+\d*(?:\[\])?) \w+")
_UINT = re.compile(r"uint(\d+)")


def domain(name: str, version: str, chain_id: int | None = None, contract: Account | None = None) -> bytes:
    """The separator of whoever checks the signature: what is left out binds to nothing."""
    fields, values = ["string name", "string version"], [name, version]
    for field, value in (("uint256 chainId", chain_id), ("address verifyingContract", contract)):
        if value is not None:
            fields.append(field)
            values.append(value)  # type: ignore[arg-type]
    return struct_hash(f"EIP712Domain({','.join(fields)})", values)


def typed_digest(separator: bytes, definition: str, values: Sequence[object]) -> bytes:
    """The 32 bytes that are signed: `values` as a struct of `definition`, for the domain of `separator`."""
    return keccak(b"\x19\x01" + separator + struct_hash(definition, values))


def struct_hash(definition: str, values: Sequence[object]) -> bytes:
    """hashStruct of a struct without structs inside, such as `"Pay(address to,uint256 amount)"`.

    Raises: Invalid: a value that its field cannot hold.
    """
    name, kinds = _read(definition)
    return keccak(name + b"".join([_word(kind, value) for kind, value in zip(kinds, values, strict=True)]))


@lru_cache(maxsize=256)
def _read(definition: str) -> tuple[bytes, tuple[str, ...]]:
    """The definition's hash, and the types of its fields."""
    return keccak(definition.encode()), tuple(_FIELD.findall(definition.partition("(")[2]))


def _word(kind: str, value: object) -> bytes:
    """32 bytes."""
    if kind.endswith("[]") and isinstance(value, (list, tuple)):
        return keccak(b"".join([_word(kind[:-2], item) for item in value]))
    if kind == "string" and isinstance(value, str):
        return keccak(value.encode())
    if kind == "bytes" and isinstance(value, bytes):
        return keccak(value)
    if kind == "bytes32" and isinstance(value, bytes) and len(value) == 32:
        return value
    if kind == "address" and isinstance(value, str):
        return bytes(12) + bytes.fromhex(parse_account(value)[2:])
    if kind == "bool" and isinstance(value, bool):
        return int(value).to_bytes(32, "big")
    if (size := _UINT.fullmatch(kind)) and type(value) is int and 0 <= value < 1 << int(size[1]):
        return value.to_bytes(32, "big")
    raise Invalid(f"a {kind} cannot hold {value!r}"[:200])
