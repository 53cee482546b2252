"""Blocks of one transaction, hashed as Ethereum hashes them.

A block's hash is Keccak-256 over its RLP header, and the header commits to the parent, the transaction, the receipt and
the state: two ledgers with the same hash at one height have the same history. Nobody mines: difficulty, nonce and fee
recipient are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tessera.chain.engine import GAS_LIMIT, SignedTx, decode_transaction
from tessera.chain.rlp_forms import rlp_encode, rlp_list
from tessera.core.hashing import keccak, sha256

__all__ = ["Block", "RawLog", "Result", "bloom", "make_block", "restore_block"]

RawLog = tuple[bytes, tuple[bytes, ...], bytes]  # address, topics, data

EMPTY_TRIE = keccak(rlp_encode(b""))
EMPTY_LIST = keccak(rlp_encode([]))
EMPTY_REQUESTS = sha256(b"")
EXTRA_DATA = b"tessera"
NO_BLOOM = bytes(256)
# Headers and receipts are RLP lists whose fields are mostly of one length. Put together by hand they take less time, of
# which a start from a checkpoint mostly consists; tests compare them with two other implementations.
_NOBODY = rlp_encode(EMPTY_LIST) + rlp_encode(bytes(20))  # no uncles, no fee recipient
_GAS_LIMIT = rlp_encode(GAS_LIMIT)
_TAIL = b"".join(  # extra data, randomness, nonce, base fee, withdrawals, blob gas twice, beacon root, requests
    rlp_encode(field) for field in (EXTRA_DATA, bytes(32), bytes(8), 0, EMPTY_TRIE, 0, 0, bytes(32), EMPTY_REQUESTS)
)
_ONLY_KEY = b"\x20\x80"  # the hex-prefix form of rlp(0): the path of a trie's single entry


class Result(Protocol):
    """What a block tells of its transaction's outcome. An `Outcome` is one, and so is a `Block`."""

    @property
    def ok(self) -> bool: ...
    @property
    def gas_used(self) -> int: ...
    @property
    def logs(self) -> Sequence[RawLog]: ...


@dataclass(frozen=True, slots=True)
class Block:
    """One block; `raw` and `tx_hash` are None for genesis and for blocks mined empty by hand.

    Everything but the cache is committed to by `hash`.
    """

    number: int
    timestamp: int
    parent: bytes
    hash: bytes
    state_root: bytes
    transactions_root: bytes
    receipts_root: bytes
    bloom: bytes
    size: int  # of header and transaction in bytes
    raw: bytes | None
    tx_hash: bytes | None
    ok: bool
    gas_used: int
    logs: Sequence[RawLog]
    _transaction: SignedTx | None = field(default=None, repr=False, compare=False)

    @property
    def transaction(self) -> SignedTx | None:
        """Decoded when it is first asked for: that costs more than all the rest of a block."""
        if self._transaction is None and self.raw is not None:
            object.__setattr__(self, "_transaction", replace(decode_transaction(self.raw), inner=None))
        return self._transaction

    @property
    def contract(self) -> bytes | None:
        """The account that the transaction created."""
        transaction = self.transaction
        if transaction is None or transaction.to is not None or not self.ok:
            return None
        return keccak(rlp_encode([transaction.sender, transaction.nonce]))[12:]


def make_block(
    number: int,
    timestamp: int,
    parent: bytes,
    state_root: bytes,
    transaction: SignedTx | None = None,
    result: Result | None = None,
) -> Block:
    """Compute roots and hash.  Cost: a dozen Keccaks."""
    if transaction is None or result is None:
        return _assemble(number, timestamp, parent, state_root)
    kept = (result.ok, result.gas_used, result.logs)
    bits = bloom(result.logs)
    block = _assemble(number, timestamp, parent, state_root, transaction.raw, transaction.hash, kept, bits)
    object.__setattr__(block, "_transaction", replace(transaction, inner=None))
    return block


def restore_block(
    number: int,
    timestamp: int,
    parent: bytes,
    state_root: bytes,
    raw: bytes | None,
    kept: tuple[bool, int, Sequence[RawLog]],
    bits: bytes,
) -> Block:
    """A block again, from what was kept of it. Compare its hash with the known one: that checks every argument.

    Args:
        kept: whether the transaction succeeded, the gas that it used, its events.
        bits: the bloom over the events, which is not computed again: the hash commits to it.
    """
    if raw is None:
        return _assemble(number, timestamp, parent, state_root)
    return _assemble(number, timestamp, parent, state_root, raw, keccak(raw), kept, bits)


def bloom(logs: Iterable[RawLog]) -> bytes:
    """The 2,048-bit filter over addresses and topics: three bits each, from the first six bytes of their hash."""
    bits = 0
    for address, topics, _ in logs:
        for item in (address, *topics):
            digest = keccak(item)
            for i in (0, 2, 4):
                bits |= 1 << (int.from_bytes(digest[i : i + 2], "big") & 2047)
    return bits.to_bytes(256, "big")


def _assemble(
    number: int,
    timestamp: int,
    parent: bytes,
    state_root: bytes,
    raw: bytes | None = None,
    tx_hash: bytes | None = None,
    kept: tuple[bool, int, Sequence[RawLog]] = (True, 0, ()),
    bits: bytes = NO_BLOOM,
) -> Block:
    ok, gas_used, logs = kept
    transactions_root = receipts_root = EMPTY_TRIE
    if raw is not None:
        numbers = (b"\x01" if ok else b"\x80") + rlp_encode(gas_used)
        receipt = rlp_list(numbers + b"\xb9\x01\x00" + bits + rlp_list(b"".join(map(_log, logs))))
        transactions_root = _trie_of_one(raw)
        receipts_root = _trie_of_one(receipt if raw[0] >= 0xC0 else raw[:1] + receipt)
    roots = b"\xa0" + state_root + b"\xa0" + transactions_root + b"\xa0" + receipts_root + b"\xb9\x01\x00" + bits
    numbers = b"\x80" + rlp_encode(number) + _GAS_LIMIT + rlp_encode(gas_used) + rlp_encode(timestamp)
    body = b"\xa0" + parent + _NOBODY + roots + numbers + _TAIL
    header = b"\xf9" + len(body).to_bytes(2, "big") + body
    return Block(
        number, timestamp, parent, keccak(header), state_root, transactions_root, receipts_root, bits,
        len(header) + len(raw or b""), raw, tx_hash, ok, gas_used, logs,
    )  # fmt: skip


def _log(log: RawLog) -> bytes:
    address, topics, data = log
    return rlp_list(b"\x94" + address + rlp_list(b"".join([b"\xa0" + topic for topic in topics])) + rlp_encode(data))


def _trie_of_one(value: bytes) -> bytes:
    """The root of a Merkle-Patricia trie that maps rlp(0) to `value`, which has 32 bytes or more."""
    return keccak(rlp_encode([_ONLY_KEY, value]))
