"""What we have heard of and still lack: who is asked for which id, and who else has it.

Each id is asked of one peer at a time; when that one fails, the next that offered it takes over. A peer may have `most`
ids assigned to it, so a liar fills its own list and nobody else's. Pure logic, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.core.ids import PeerId

__all__ = ["WantList"]

SOURCES = 4  # peers remembered for one id


@dataclass(slots=True)
class WantList:
    """An id is *assigned* to the first of its sources until it is settled; it is also *queued* until it is asked."""

    most: int
    _sources: dict[bytes, list[PeerId]] = field(default_factory=dict)
    _queued: dict[PeerId, dict[bytes, None]] = field(default_factory=dict)
    _assigned: dict[PeerId, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._sources)

    def sources(self, id: bytes) -> list[PeerId]:
        """Who offered it."""
        return self._sources.get(id, [])

    def offer(self, peer: PeerId, id: bytes) -> None:
        """`peer` has `id`. Forgotten when there are enough others, or `peer` has enough to do."""
        sources = self._sources.get(id)
        if sources is None:
            if self._assigned.get(peer, 0) < self.most:
                self._sources[id] = [peer]
                self._assign(id, peer)
        elif len(sources) < SOURCES and peer not in sources:
            sources.append(peer)

    def queued(self, peer: PeerId) -> int:
        """How many ids wait to be asked of `peer`."""
        return len(self._queued.get(peer, ()))

    def take(self, peer: PeerId, count: int) -> list[bytes]:
        """Up to `count` ids to ask of `peer` now. Each must then be settled, missed, or put back."""
        queue = self._queued.get(peer, {})
        ids = list(queue)[:count]
        for id in ids:
            del queue[id]
        return ids

    def put_back(self, peer: PeerId, id: bytes) -> None:
        """`peer` was asked for `id` and did not get to it."""
        if self.sources(id)[:1] == [peer]:
            self._queued.setdefault(peer, {})[id] = None

    def settle(self, id: bytes) -> None:
        """It has come, or is not wanted any more."""
        sources = self._sources.pop(id, None)
        if sources:
            self._release(id, sources[0])

    def miss(self, id: bytes, peer: PeerId) -> PeerId | None:
        """`peer` did not have it after all: who is asked instead, None when nobody is left."""
        sources = self._sources.get(id, [])
        if sources[:1] != [peer]:
            return None
        self._release(id, peer)
        sources.pop(0)
        if not sources:
            del self._sources[id]
            return None
        self._assign(id, sources[0])
        return sources[0]

    def abandon(self, peer: PeerId) -> set[PeerId]:
        """Ask `peer` for nothing more that it was not asked yet; returns who is asked instead."""
        heirs = {self.miss(id, peer) for id in list(self._queued.get(peer, ()))}
        return {heir for heir in heirs if heir is not None}

    def _assign(self, id: bytes, peer: PeerId) -> None:
        self._queued.setdefault(peer, {})[id] = None
        self._assigned[peer] = self._assigned.get(peer, 0) + 1

    def _release(self, id: bytes, peer: PeerId) -> None:
        self._queued.get(peer, {}).pop(id, None)
        self._assigned[peer] -= 1
        if not self._assigned[peer]:
            del self._assigned[peer]
            self._queued.pop(peer, None)
