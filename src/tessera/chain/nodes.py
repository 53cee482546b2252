"""The store behind all states of one chain: trie nodes and code by their hash, in memory, never changed.

It grows with every block, because old states stay readable; `compacted` copies what one root needs and drops the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import rlp
from eth.constants import BLANK_ROOT_HASH, EMPTY_SHA3
from eth.db.atomic import AtomicDB
from eth.db.backends.memory import MemoryDB
from eth.rlp.accounts import Account

__all__ = ["Nodes"]


class Nodes:
    """`len` counts entries. Safe to read while one thread writes."""

    def __init__(self) -> None:
        self._memory = MemoryDB()
        self.db = AtomicDB(self._memory)

    def __len__(self) -> int:
        return len(self._memory.kv_store)

    def compacted(self, root: bytes) -> Nodes:
        """A new store with nothing but what `root` needs.  Cost: O(state), about 20 µs an account or slot."""
        other, old = Nodes(), self._memory.kv_store
        for name in _reachable(old, root):
            other._memory.kv_store[name] = old[name]
        return other


def _reachable(store: dict[bytes, bytes], root: bytes) -> Iterator[bytes]:
    for name, values in _walk(store, root):
        yield name
        for value in values:
            account = rlp.decode(value, sedes=Account)
            if account.code_hash != EMPTY_SHA3:
                yield account.code_hash
            yield from (inner for inner, _ in _walk(store, account.storage_root))


def _walk(store: dict[bytes, bytes], root: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    """Every node of a trie: its hash, and the values of the leaves in it."""
    pending = [] if root == BLANK_ROOT_HASH else [root]
    while pending:
        name = pending.pop()
        values: list[bytes] = []
        _take_apart(rlp.decode(store[name]), pending, values)
        yield name, values


def _take_apart(node: Any, children: list[bytes], values: list[bytes]) -> None:
    """Collect the hashes of child nodes and the values in a node; small children are embedded in it."""
    if len(node) == 2 and node[0][0] & 0x20:  # a leaf
        values.append(bytes(node[1]))
        return
    for item in [node[1]] if len(node) == 2 else node[:16]:
        if isinstance(item, (list, tuple)):
            _take_apart(item, children, values)
        elif item:
            children.append(bytes(item))
    if len(node) == 17 and node[16]:
        values.append(bytes(node[16]))
