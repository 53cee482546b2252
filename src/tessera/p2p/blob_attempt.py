"""One peer's part of one chunk: from where the beginning on disk ends, to the end or to an interruption.

The pieces are hashed and written in a worker thread, some at a time. Two hashes go along: of the chunk from its first
byte, which says whether it is right; and of this part alone, which says later who brought what was wrong.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.p2p.blob_part import PartialBlob

__all__ = ["Attempt", "Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """What one peer brought of a chunk."""

    peer: PeerId
    start: int
    end: int
    digest: bytes

    def fits(self, chunk: bytes) -> bool:
        return sha256(chunk[self.start : self.end]) == self.digest


class Attempt:
    """One stream's part of one chunk: hashed and written in a worker thread, a few pieces at a time."""

    def __init__(self, partial: PartialBlob, number: int, peer: PeerId) -> None:
        self.start = self.end = partial.prefix(number)
        self.waiting_bytes, self.waiting_since = 0, 0.0
        self._partial, self._number, self._peer = partial, number, peer
        self._pieces: list[bytes] = []
        self._whole = hashlib.sha256(partial.read(number, self.start))
        self._own = hashlib.sha256() if self.start else self._whole

    def hold(self, piece: bytes, now: float) -> None:
        if not self._pieces:
            self.waiting_since = now
        self._pieces.append(piece)
        self.waiting_bytes += len(piece)

    def flush(self) -> None:
        """Blocks. Raises `Unavailable` when the disk refuses."""
        data = b"".join(self._pieces)
        self._pieces, self.waiting_bytes = [], 0
        self._whole.update(data)
        if self._own is not self._whole:
            self._own.update(data)
        self._partial.append(self._number, self.end, data)
        self.end += len(data)

    def settle(self) -> bool:
        """Whether the chunk is right; a wrong one is forgotten. Blocks."""
        return self._partial.settle(self._number, self._whole.digest())

    def span(self) -> Span:
        return Span(self._peer, self.start, self.end, self._own.digest())
