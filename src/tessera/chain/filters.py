"""Polling filters: what a wallet asks with eth_newFilter and eth_getFilterChanges.

Their number is bounded: the one not asked for longest makes room for the next.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

__all__ = ["Filter", "Filters"]

MAX_FILTERS = 256


@dataclass(slots=True)
class Filter:
    """`query` is None for a filter of new blocks; `next_block` is the first block not told yet."""

    query: dict[str, Any] | None
    next_block: int


class Filters:
    """Filters by id. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._filters: OrderedDict[int, Filter] = OrderedDict()

    def add(self, query: dict[str, Any] | None, next_block: int) -> int:
        with self._lock:
            name = next(self._ids)
            self._filters[name] = Filter(query, next_block)
            if len(self._filters) > MAX_FILTERS:
                self._filters.popitem(last=False)
            return name

    def get(self, name: int) -> Filter | None:
        with self._lock:
            found = self._filters.get(name)
            if found is not None:
                self._filters.move_to_end(name)
            return found

    def advance(self, name: int, head: int) -> tuple[Filter, int, int] | None:
        """The filter and the blocks, first and last, that it has not told; they count as told from now on."""
        with self._lock:
            found = self._filters.get(name)
            if found is None:
                return None
            self._filters.move_to_end(name)
            first, found.next_block = min(found.next_block, head + 1), head + 1
            return found, first, head

    def remove(self, name: int) -> bool:
        with self._lock:
            return self._filters.pop(name, None) is not None
