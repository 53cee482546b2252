"""Blocks of one transaction, hashed as Ethereum hashes them.

A block's hash is Keccak-256 over its RLP header, and the header commits to the parent, the transaction, the receipt and
the state: two ledgers with the same hash at one height have the same history. Nobody mines: difficulty, nonce and fee
recipient are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tessera.chain.engine import GAS_LIMIT, Outcome, SignedTx
from tessera.chain.transactions import rlp_encode
from tessera.core.hashing import keccak, sha256

__all__ = ["Block", "RawLog", "bloom", "make_block"]

RawLog = tuple[bytes, tuple[bytes, ...], bytes]  # address, topics, data

EMPTY_TRIE = keccak(rlp_encode(b""))
EMPTY_LIST = keccak(rlp_encode([]))
EMPTY_REQUESTS = sha256(b"")
EXTRA_DATA = b"tessera"
_ONLY_KEY = b"\x20\x80"  # the hex-prefix form of rlp(0): the path of a trie's single entry


@dataclass(frozen=True, slots=True)
class Block:
    """One block; `transaction` and `outcome` are None for genesis and for blocks mined empty by hand."""

    number: int
    timestamp: int
    parent: bytes
    hash: bytes
    state_root: bytes
    transactions_root: bytes
    receipts_root: bytes
    bloom: bytes
    size: int  # of header and transaction in bytes
    transaction: SignedTx | None
    outcome: Outcome | None

    @property
    def gas_used(self) -> int:
        return self.outcome.gas_used if self.outcome else 0

    @property
    def logs(self) -> Sequence[RawLog]:
        return self.outcome.logs if self.outcome else ()


def make_block(
    number: int,
    timestamp: int,
    parent: bytes,
    state_root: bytes,
    transaction: SignedTx | None = None,
    outcome: Outcome | None = None,
) -> Block:
    """Compute roots and hash.  Cost: a dozen Keccaks."""
    logs = outcome.logs if outcome else ()
    bits = bloom(logs)
    transactions_root = _trie_of_one(transaction.raw) if transaction else EMPTY_TRIE
    receipts_root = _trie_of_one(_receipt(transaction, outcome, bits)) if transaction and outcome else EMPTY_TRIE
    gas_used = outcome.gas_used if outcome else 0
    header = rlp_encode(
        [
            parent, EMPTY_LIST, bytes(20), state_root, transactions_root, receipts_root, bits, 0, number, GAS_LIMIT,
            gas_used, timestamp, EXTRA_DATA, bytes(32), bytes(8), 0, EMPTY_TRIE, 0, 0, bytes(32), EMPTY_REQUESTS,
        ]
    )  # fmt: skip
    return Block(
        number, timestamp, parent, keccak(header), state_root, transactions_root, receipts_root, bits,
        len(header) + (len(transaction.raw) if transaction else 0), transaction, outcome,
    )  # fmt: skip


def bloom(logs: Iterable[RawLog]) -> bytes:
    """The 2,048-bit filter over addresses and topics: three bits each, from the first six bytes of their hash."""
    bits = 0
    for address, topics, _ in logs:
        for item in (address, *topics):
            digest = keccak(item)
            for i in (0, 2, 4):
                bits |= 1 << (int.from_bytes(digest[i : i + 2], "big") & 2047)
    return bits.to_bytes(256, "big")


def _receipt(transaction: SignedTx, outcome: Outcome, bits: bytes) -> bytes:
    logs = [[address, list(topics), data] for address, topics, data in outcome.logs]
    body = rlp_encode([int(outcome.ok), outcome.gas_used, bits, logs])
    return bytes([transaction.kind]) + body if transaction.kind else body


def _trie_of_one(value: bytes) -> bytes:
    """The root of a Merkle-Patricia trie that maps rlp(0) to `value`, which has 32 bytes or more."""
    return keccak(rlp_encode([_ONLY_KEY, value]))
