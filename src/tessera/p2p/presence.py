"""Who is up: links come and go, watchers hear of it.

Each watcher sees the state now, then changes; a slow one misses what was undone in the meantime, never the newest.
Memory: one entry for each peer that is up or watched.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import anyio

from tessera.core.ids import PeerId
from tessera.p2p.transport import Presence

__all__ = ["PresenceBoard"]


@dataclass(slots=True)
class _Watcher:
    changed: anyio.Event = field(default_factory=anyio.Event)


class PresenceBoard:
    """The adapters write it, `Transport.watch` reads it."""

    def __init__(self) -> None:
        self._up: set[PeerId] = set()
        self._watchers: dict[PeerId, list[_Watcher]] = {}

    def set(self, peer: PeerId, presence: Presence) -> None:
        if (peer in self._up) == (presence == "up"):
            return
        if presence == "up":
            self._up.add(peer)
        else:
            self._up.discard(peer)
        for watcher in self._watchers.get(peer, ()):
            watcher.changed.set()

    def get(self, peer: PeerId) -> Presence:
        return "up" if peer in self._up else "down"

    async def watch(self, peer: PeerId) -> AsyncGenerator[Presence, None]:
        watcher = _Watcher()
        self._watchers.setdefault(peer, []).append(watcher)
        told: Presence | None = None
        try:
            while True:
                now = self.get(peer)
                if now != told:
                    told = now
                    yield now
                    continue
                await watcher.changed.wait()
                watcher.changed = anyio.Event()
        finally:
            self._watchers[peer].remove(watcher)
            if not self._watchers[peer]:
                del self._watchers[peer]
