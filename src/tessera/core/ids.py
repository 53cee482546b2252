"""Names of things: each is a checked string, so that it prints, sorts, hashes and travels as itself."""

from __future__ import annotations

import re
from typing import NewType

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak

__all__ = ["Account", "BlobId", "PeerId", "RunId", "account_from_bytes", "parse_account", "parse_blob_id",
           "parse_peer_id", "parse_run_id"]  # fmt: skip

PeerId = NewType("PeerId", str)  # an ed25519 public key, 64 hex digits
RunId = NewType("RunId", str)  # the SHA-256 of a manifest's canonical bytes, 64 hex digits
BlobId = NewType("BlobId", str)  # the SHA-256 of a blob's index, 64 hex digits
Account = NewType("Account", str)  # an EVM address with its EIP-55 checksum

_HEX_64 = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")


def parse_peer_id(text: object) -> PeerId:
    return PeerId(_hex_64("peer id", text))


def parse_run_id(text: object) -> RunId:
    return RunId(_hex_64("run id", text))


def parse_blob_id(text: object) -> BlobId:
    return BlobId(_hex_64("blob id", text))


def parse_account(text: object) -> Account:
    """Accepts one case throughout, or a right EIP-55 checksum; returns the checksummed form."""
    if not isinstance(text, str) or _ADDRESS.fullmatch(text) is None:
        raise Invalid(f"an account is 0x and 40 hex digits, not {text!r}")
    account = account_from_bytes(bytes.fromhex(text[2:]))
    digits = text[2:]
    if digits not in (digits.lower(), digits.upper()) and text != account:
        raise Invalid(f"wrong checksum in {text}: expected {account}")
    return account


def account_from_bytes(address: bytes) -> Account:
    """The EIP-55 form of 20 bytes."""
    if len(address) != 20:
        raise Invalid(f"an address has 20 bytes, not {len(address)}")
    digits = address.hex()
    nibbles = keccak(digits.encode()).hex()
    return Account("0x" + "".join(c.upper() if int(n, 16) >= 8 else c for c, n in zip(digits, nibbles, strict=False)))


def _hex_64(what: str, text: object) -> str:
    if not isinstance(text, str) or _HEX_64.fullmatch(text) is None:
        raise Invalid(f"a {what} is 64 lower-case hex digits, not {str(text)[:80]!r}")
    return text
