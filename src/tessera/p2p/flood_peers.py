"""The other members, as one member sees them: whom to talk to, who is away, who asks too much, who broke the rules.

The overlay is chosen by each member alone, from the list of members: the next one on either side of a ring, which
keeps it in one piece, and half of log2(n) whose pair with us hashes lowest, which makes it small and is mostly mutual.
It is stable, needs no messages, and whoever is away is passed over. Nobody can choose a place in it but by choosing the
key of a member.

Memory: one entry for each member, none for strangers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tessera.core.errors import Refused, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.p2p.transport import PeerRecord

__all__ = ["Bucket", "FloodPeers", "PeerLimits"]


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """What one member may ask of us, and what it may do before it is dropped."""

    calls_per_s: float = 50.0
    calls: float = 500.0  # at once
    bytes_per_s: float = 256 * 1024.0  # questions and answers together
    bytes: float = 4 * 1024 * 1024.0  # at once
    news_bytes: float = float(2 << 20)  # of new items by one origin at once: what it may hold, for those who were away
    news_bytes_per_s: float = 1024.0
    faults: float = 50.0  # points: a call too many is one
    faults_per_s: float = 0.02  # points forgiven: 72 an hour
    bar_s: float = 600.0  # how long a member that ran out of points, or broke the protocol, is dropped
    away_s: float = 15.0  # before we dial a member again that did not answer; doubles up to `away_most_s`
    away_most_s: float = 600.0


@dataclass(slots=True)
class Bucket:
    """An allowance of `most` that fills again at `per_s`. Whoever has any left may take more than that, once."""

    most: float
    per_s: float
    left: float = field(init=False)
    at: float = field(default=-math.inf)

    def __post_init__(self) -> None:
        self.left = self.most

    def wait_s(self, now: float) -> float:
        """0.0 when there is any left, else how long until there is."""
        self._fill(now)
        return 0.0 if self.left > 0 else (1e-3 - self.left) / self.per_s

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self.left -= amount

    def _fill(self, now: float) -> None:
        if now > self.at:
            gained = (now - self.at) * self.per_s if self.at > -math.inf else self.most
            self.left, self.at = min(self.most, self.left + gained), now


@dataclass(slots=True)
class _Peer:
    calls: Bucket
    bytes: Bucket
    news: Bucket
    faults: Bucket
    barred_until: float = -math.inf
    away_until: float = -math.inf
    away_s: float = 0.0


class FloodPeers:
    """Made anew for each `Flood`."""

    def __init__(self, group: str, me: PeerId, limits: PeerLimits, rng: random.Random, *, most: int) -> None:
        self._group, self._me, self._limits, self._rng, self._most = group, me, limits, rng, most
        self._records: dict[PeerId, PeerRecord] = {}
        self._peers: dict[PeerId, _Peer] = {}
        self._ring: list[PeerId] = []
        self._closest: list[PeerId] = []

    def refresh(self, members: Sequence[PeerRecord]) -> None:
        """From now on these are the members; of two records of one peer the last counts. Those past `most` do not."""
        records = {record.id: record for record in members[: self._most]}
        changed = records.keys() != self._records.keys()
        self._records = records
        if changed:
            self._peers = {peer: known for peer, known in self._peers.items() if peer in {*records, self._me}}
            self._ring = sorted({*records, self._me}, key=self._place)
            self._closest = sorted((peer for peer in records if peer != self._me), key=self._distance)

    def __contains__(self, peer: object) -> bool:
        return peer in self._records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def members(self) -> set[PeerId]:
        return set(self._records)

    def record(self, peer: PeerId) -> PeerRecord | None:
        return self._records.get(peer)

    # --- whom to talk to --------------------------------------------------------------------------------------------

    def neighbours(self, now: float) -> list[PeerId]:
        """To whom news goes: 2 + log2(n) / 2 members at most; others may have chosen us."""
        if self._me not in self._ring:
            return []
        here, count = self._ring.index(self._me), len(self._ring)
        after = (self._ring[(here + step) % count] for step in range(1, count))
        before = (self._ring[(here - step) % count] for step in range(1, count))
        chosen = dict.fromkeys(peer for peer in (self._first(after, now), self._first(before, now)) if peer)
        most = len(chosen) + math.ceil(math.log2(max(2, count)) / 2)
        for peer in self._closest:
            if len(chosen) >= most:
                break
            if self.usable(peer, now):
                chosen[peer] = None
        return list(chosen)

    def pick(self, now: float) -> PeerId | None:
        """With whom to compare next: mostly a neighbour; sometimes anybody, even one that seemed away, so that a
        network that fell apart finds together."""
        anybody = [peer for peer in self._closest if not self.barred(peer, now)]
        near = self.neighbours(now)
        choice = near if near and self._rng.random() < 0.75 else anybody
        return self._rng.choice(choice) if choice else None

    def usable(self, peer: PeerId, now: float) -> bool:
        known = self._peers.get(peer)
        return known is None or (known.away_until <= now and known.barred_until <= now)

    def failed(self, peer: PeerId, now: float) -> None:
        """It did not answer: leave it alone for a while."""
        known = self._known(peer)
        known.away_s = min(max(self._limits.away_s, 2 * known.away_s), self._limits.away_most_s)
        known.away_until = now + known.away_s

    def heard(self, peer: PeerId) -> None:
        """It asked or answered."""
        known = self._peers.get(peer)
        if known is not None:
            known.away_s, known.away_until = 0.0, -math.inf

    # --- what it may do ---------------------------------------------------------------------------------------------

    def admit(self, peer: PeerId, now: float) -> None:
        """Count a call from `peer`.

        Raises: Refused for strangers and those who are barred; Unavailable for a call or a byte too many.
        """
        if peer not in self._records:
            raise Refused("only members of this group flood it", rule="member")
        known = self._known(peer)
        if known.barred_until > now:
            raise Refused(f"barred for {known.barred_until - now:.0f} s more: you broke the rules", rule="barred")
        wait_s = max(known.calls.wait_s(now), known.bytes.wait_s(now))
        if wait_s > 0:
            raise Unavailable("too much at once: wait", retry_after_s=round(wait_s, 3), throttled=True)
        known.calls.take(1.0, now)

    def spend(self, peer: PeerId, size_bytes: int, now: float) -> None:
        """Count what was moved for `peer`."""
        self._known(peer).bytes.take(size_bytes, now)

    def news_wait_s(self, origin: PeerId, now: float) -> float:
        """How long until more news by `origin` is taken; 0.0 for now."""
        return self._known(origin).news.wait_s(now)

    def spend_news(self, origin: PeerId, size_bytes: int, now: float) -> None:
        """Count an item by `origin` that was taken."""
        self._known(origin).news.take(size_bytes, now)

    def fault(self, peer: PeerId, points: float, now: float) -> bool:
        """`peer` did what can happen to anybody, but not often. True when it is barred by this."""
        faults = self._known(peer).faults
        faults.take(points, now)
        return faults.left <= 0 and self.bar(peer, now)

    def bar(self, peer: PeerId, now: float) -> bool:
        """`peer` did what no honest member does. True unless it was barred already."""
        known = self._known(peer)
        fresh = known.barred_until <= now
        known.barred_until = now + self._limits.bar_s
        known.faults.left = self._limits.faults  # it comes back with a clean slate
        return fresh

    def barred(self, peer: PeerId, now: float) -> bool:
        known = self._peers.get(peer)
        return known is not None and known.barred_until > now

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _known(self, peer: PeerId) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            limits = self._limits
            known = _Peer(
                Bucket(limits.calls, limits.calls_per_s),
                Bucket(limits.bytes, limits.bytes_per_s),
                Bucket(limits.news_bytes, limits.news_bytes_per_s),
                Bucket(limits.faults, limits.faults_per_s),
            )
            if peer in self._records or peer == self._me:
                self._peers[peer] = known
        return known

    def _first(self, peers: Iterable[PeerId], now: float) -> PeerId | None:
        return next((peer for peer in peers if self.usable(peer, now)), None)

    def _place(self, peer: PeerId) -> bytes:
        return sha256(b"flood/ring\0", self._group.encode(), b"\0", bytes.fromhex(peer))

    def _distance(self, peer: PeerId) -> bytes:
        low, high = sorted((self._me, peer))
        return sha256(b"flood/pair\0", self._group.encode(), b"\0", bytes.fromhex(low), bytes.fromhex(high))
