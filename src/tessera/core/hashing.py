"""The two hash functions: SHA-256 for our own names, Keccak-256 for whatever a contract must recompute."""

from __future__ import annotations

import hashlib

from eth_hash.auto import keccak as _keccak

__all__ = ["keccak", "sha256"]


def sha256(*parts: bytes) -> bytes:
    """SHA-256 of the concatenation."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def keccak(data: bytes) -> bytes:
    return bytes(_keccak(data))
