"""Signing an EIP-1559 transaction, by hand: forty lines instead of a library that takes half a second to import.

A test compares every byte with eth-account's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tessera.chain.rlp_forms import rlp_encode
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

__all__ = ["Transaction", "sign"]


@dataclass(frozen=True, slots=True)
class Transaction:
    """Fees are wei per gas; `to` is None for a transaction that creates a contract."""

    chain_id: int
    nonce: int
    to: Account | None
    value: int
    data: bytes
    gas: int
    max_fee: int
    priority_fee: int


def sign(key: AccountKey, transaction: Transaction) -> tuple[bytes, str]:
    """The raw bytes that a node takes, and the transaction's hash as 0x-hex."""
    fields: list[Any] = [
        transaction.chain_id,
        transaction.nonce,
        transaction.priority_fee,
        transaction.max_fee,
        transaction.gas,
        bytes.fromhex(transaction.to[2:]) if transaction.to else b"",
        transaction.value,
        transaction.data,
        [],
    ]
    signature = key.sign_digest(keccak(b"\x02" + rlp_encode(fields)))
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    raw = b"\x02" + rlp_encode([*fields, signature[64] - 27, r, s])
    return raw, "0x" + keccak(raw).hex()
