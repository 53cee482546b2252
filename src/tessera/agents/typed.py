"""EIP-712 hashes, for the handful of structs that agents sign: wallets show their fields to whoever signs.

Checked against eth-account in tests; written here because eth-account takes half a second to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eth_abi.abi import encode as abi_encode

from tessera.core.hashing import keccak
from tessera.core.ids import Account

__all__ = ["domain_separator", "struct_hash", "typed_digest"]

_DOMAIN = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"


def domain_separator(name: str, version: str, chain_id: int, contract: Account) -> bytes:
    return struct_hash(_DOMAIN, (name, version, chain_id, contract))


def typed_digest(domain: bytes, struct: bytes) -> bytes:
    """What is signed: 32 bytes."""
    return keccak(b"\x19\x01" + domain + struct)


def struct_hash(definition: str, values: Sequence[Any]) -> bytes:
    """hashStruct of a struct without structs inside, such as `"Pay(address to,uint256 amount)"`."""
    fields = definition[definition.index("(") + 1 : -1].split(",")
    words = [_word(field.split(" ")[0], value) for field, value in zip(fields, values, strict=True)]
    return keccak(keccak(definition.encode()) + b"".join(words))


def _word(kind: str, value: Any) -> bytes:
    if kind.endswith("[]"):
        return keccak(b"".join(_word(kind[:-2], item) for item in value))
    if kind == "string":
        return keccak(value.encode())
    if kind == "bytes":
        return keccak(value)
    return bytes(abi_encode([kind], [value]))
