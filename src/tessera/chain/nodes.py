"""The store behind all states of one chain: trie nodes and code by their hash, in memory, never changed.

It grows with every block, because old states stay readable; `compacted` copies what one root needs and drops the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import rlp
from eth.constants import BLANK_ROOT_HASH, EMPTY_SHA3
from eth.db.atomic import AtomicDB
from eth.db.backends.memory import MemoryDB
from eth.rlp.accounts import Account

__all__ = ["Nodes"]


class Nodes:
    """`len` counts entries. Safe to read while one thread writes."""

    def __init__(self, content: Mapping[bytes, bytes] | None = None) -> None:
        self._memory = MemoryDB(dict(content or {}))
        self.db = AtomicDB(self._memory)

    def __len__(self) -> int:
        return len(self._memory.kv_store)

    def compacted(self, root: bytes) -> Nodes:
        """A new store with nothing but what `root` needs.  Cost: O(state), about 20 µs an account or slot."""
        return Nodes(dict(self.reachable(root)))

    def reachable(self, root: bytes, known: Collection[bytes] = ()) -> Iterator[tuple[bytes, bytes]]:
        """Name and content of what `root` needs, without what hangs below `known` names.

        Raises: KeyError when something is missing.
        """
        store = self._memory.kv_store
        for name, values in _walk(store, root, known):
            yield name, store[name]
            for value in values:
                account = rlp.decode(value, sedes=Account)
                if account.code_hash != EMPTY_SHA3 and account.code_hash not in known:
                    yield account.code_hash, store[account.code_hash]
                yield from ((inner, store[inner]) for inner, _ in _walk(store, account.storage_root, known))


def _walk(store: dict[bytes, bytes], root: bytes, known: Collection[bytes]) -> Iterator[tuple[bytes, list[bytes]]]:
    """Every node of a trie: its hash, and the values of the leaves in it."""
    pending = [] if root == BLANK_ROOT_HASH else [root]
    while pending:
        name = pending.pop()
        if name in known:
            continue
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
