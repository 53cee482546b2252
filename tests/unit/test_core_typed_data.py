"""Typed data hashes as eth-account has it."""

from __future__ import annotations

from typing import Any

import pytest
from eth_account.messages import encode_typed_data

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey
from tessera.core.typed_data import domain, struct_hash, typed_digest

PAYEE = AccountKey(keccak(b"payee")).account
FIELDS = (
    "address to,uint256 amount,uint16 bps,bytes32 intent,bytes note,bool once,"
    "string purpose,string[] words,bytes32[] ids"
)
VALUES = (PAYEE, 2**256 - 1, 10_000, b"\1" * 32, b"\xff\0", True, "für", ["a", ""], [bytes(32)])


@pytest.mark.parametrize("contract", [PAYEE, None])
@pytest.mark.parametrize("chain_id", [8453, None])
def test_a_digest_is_what_a_wallet_signs(contract: Account | None, chain_id: int | None) -> None:
    names: dict[str, Any] = {"name": "Tessera test", "version": "1"}
    names |= {} if chain_id is None else {"chainId": chain_id}
    names |= {} if contract is None else {"verifyingContract": contract}
    kinds = [field.split(" ") for field in FIELDS.split(",")]
    types = {"Pay": [{"name": name, "type": kind} for kind, name in kinds]}
    message = {name: value for (_, name), value in zip(kinds, VALUES, strict=True)}
    theirs = encode_typed_data(names, types, message)
    ours = typed_digest(domain("Tessera test", "1", chain_id, contract), f"Pay({FIELDS})", VALUES)
    assert ours == keccak(b"\x19\x01" + theirs.header + theirs.body)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uint8", 256), ("uint256", -1), ("uint256", 2**256), ("uint256", True), ("uint256", "1"),
        ("bytes32", b"short"), ("bytes32", "0" * 32), ("address", "0x12"), ("address", bytes(20)),
        ("string", b"bytes"), ("bytes", "text"), ("uint256[]", 5), ("uint256[]", [1, -1]), ("bool", 1), ("int256", 1),
    ],
)  # fmt: skip
def test_a_value_that_its_field_cannot_hold_is_refused(kind: str, value: object) -> None:
    with pytest.raises(Invalid):
        struct_hash(f"One({kind} value)", (value,))
