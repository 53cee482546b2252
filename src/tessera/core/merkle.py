"""Merkle trees as the contracts fold them: Keccak-256, sorted pairs, an odd node moves up unchanged.

A share leaf is hashed twice, so that 64 bytes of two nodes can never pass for a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account

__all__ = ["MerkleTree", "fold", "share_leaf"]

MAX_DEPTH = 32  # as in contracts/model_share.vy


class MerkleTree:
    """A tree over 1 to 2^32 leaves of 32 bytes. Building costs n - 1 hashes; a proof has at most ceil(log2 n) nodes."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise Invalid("a Merkle tree needs a leaf")
        if any(len(leaf) != 32 for leaf in leaves):
            raise Invalid("a leaf has 32 bytes")
        self._rows: list[list[bytes]] = [list(leaves)]
        while len(self._rows[-1]) > 1:
            row = self._rows[-1]
            pairs = [_join(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
            self._rows.append(pairs + ([row[-1]] if len(row) % 2 else []))

    @property
    def root(self) -> bytes:
        return self._rows[-1][0]

    def proof(self, index: int) -> list[bytes]:
        """The siblings from leaf `index` up to the root."""
        if not 0 <= index < len(self._rows[0]):
            raise Invalid(f"leaf {index} of {len(self._rows[0])}")
        path = []
        for row in self._rows[:-1]:
            if index ^ 1 < len(row):
                path.append(row[index ^ 1])
            index //= 2
        return path


def fold(leaf: bytes, proof: Sequence[bytes]) -> bytes:
    """The root that `leaf` and `proof` lead to. Raises `Invalid` for a proof that no tree of ours can have."""
    if len(proof) > MAX_DEPTH or any(len(node) != 32 for node in (leaf, *proof)):
        raise Invalid(f"a proof is at most {MAX_DEPTH} nodes of 32 bytes")
    node = leaf
    for sibling in proof:
        node = _join(node, sibling)
    return node


def share_leaf(epoch: int, account: Account, shares: int) -> bytes:
    """keccak(keccak(abi.encode(uint256 epoch, address account, uint256 shares))).

    Raises: Invalid for a number outside uint256.  Cost: two hashes; no ABI library, whose import takes 0.15 s.
    """
    if not (0 <= epoch < 2**256 and 0 <= shares < 2**256):
        raise Invalid(f"an epoch and its shares are uint256, not {epoch} and {shares}")
    address = bytes.fromhex(account[2:])
    return keccak(keccak(epoch.to_bytes(32, "big") + bytes(12) + address + shares.to_bytes(32, "big")))


def _join(a: bytes, b: bytes) -> bytes:
    return keccak(a + b) if a < b else keccak(b + a)
