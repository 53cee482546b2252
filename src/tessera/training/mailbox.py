"""A queue between tasks of one event loop, with a bound: putting never waits, and says whether there was room."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import anyio

__all__ = ["Mailbox"]

T = TypeVar("T")


class Mailbox(Generic[T]):
    """First in, first out; for one reader."""

    def __init__(self, size: int) -> None:
        self._items: deque[T] = deque()
        self._size = size
        self._arrived = anyio.Event()

    def put(self, item: T) -> bool:
        """False, and nothing has changed, when it is full."""
        if len(self._items) >= self._size:
            return False
        self._items.append(item)
        self._arrived.set()
        return True

    def look(self) -> T | None:
        """The next item, if there is one now."""
        return self._items.popleft() if self._items else None

    async def get(self) -> T:
        """The next item. May be cancelled without losing one."""
        while not self._items:
            self._arrived = anyio.Event()
            await self._arrived.wait()
        return self._items.popleft()
