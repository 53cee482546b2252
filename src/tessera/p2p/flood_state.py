"""Which items a member holds: pure logic, no I/O. Whoever merges the same items ends with the same, in any order.

Invariants, after any sequence of calls (`tests/property/test_flood_laws.py`):

- Of one origin, topic and key (but ""), the item with the highest sequence is held and no other.
- A slot that its origin filled twice is *void*: both items are kept as proof, neither counts, and no third is taken.
- An origin takes `origin_items` slots and `origin_bytes` at most. When it wants more, its lowest sequences go, and none
  at or below them is taken again. An honest origin stays within (`room`), so this only hurts who floods.
- Nothing is held beyond its expiry; nothing that expires later than `max_ttl_s` from now is taken.

Items that are merged must be checked, and of members. Memory: origins × `origin_bytes`, and `seen` ids.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from tessera.core.ids import PeerId
from tessera.p2p.flood_index import SlotIndex
from tessera.p2p.flood_item import SLOT_BYTES, VOID, Item

__all__ = ["FloodState", "Merged", "StateLimits", "origin_of"]

SKEW_S = 3600.0  # by which an origin's clock may be ahead of ours
MICROSECONDS = 1_000_000

Verdict = Literal["new", "known", "void", "replaced", "crowded", "expired", "distant"]


@dataclass(frozen=True, slots=True)
class StateLimits:
    """Bounds of a `FloodState`."""

    origin_items: int = 4096  # slots of one origin
    origin_bytes: int = 2 << 20  # bytes of one origin, `Item.size_bytes` each
    max_ttl_s: float = 30 * 86_400.0  # an item may live this long
    seen: int = 16_384  # ids of items that are not held that we remember, so as not to fetch them again


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` did.

    `new`: held from now on. `void`: it clashes with `clash`, which does not count any more. `known`: no change. The
    others say why it is not held: `replaced` by a newer one, `crowded` out by its origin's others, `expired`, or
    `distant` in its expiry. `dropped` are no longer held.
    """

    verdict: Verdict
    dropped: tuple[Item, ...] = ()
    clash: Item | None = None


@dataclass(slots=True)
class _Origin:
    """What one origin takes up."""

    slots: int = 0
    size_bytes: int = 0
    floor: int = -1  # no sequence up to this one is taken again
    highest: int = -1


@dataclass(slots=True)
class FloodState:
    """The items of one group. `index` is what is compared with others."""

    limits: StateLimits = field(default_factory=StateLimits)
    index: SlotIndex = field(default_factory=SlotIndex)
    _slots: dict[bytes, tuple[Item, ...]] = field(default_factory=dict)
    _newest: dict[tuple[PeerId, str, str], Item] = field(default_factory=dict)  # with a key
    _topics: dict[str, dict[bytes, Item]] = field(default_factory=dict)
    _origins: dict[PeerId, _Origin] = field(default_factory=dict)
    _expiry: list[tuple[int, bytes]] = field(default_factory=list)  # heap; may name slots that are gone
    _seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def size_bytes(self) -> int:
        return sum(origin.size_bytes for origin in self._origins.values())

    # --- reading ----------------------------------------------------------------------------------------------------

    def items(self, topic: str) -> list[Item]:
        """Those that count, by origin and then sequence."""
        held = self._topics.get(topic, {})
        return [held[slot] for slot in sorted(held)]

    def get(self, id: bytes) -> tuple[Item, ...]:
        """What the slot of `id` holds: nothing, an item, or two that make it void."""
        return self._slots.get(id[:SLOT_BYTES], ())

    def id_at(self, slot: bytes) -> bytes | None:
        """The id of what `slot` holds."""
        held = self._slots.get(slot, ())
        if not held:
            return None
        return held[0].id if len(held) == 1 else slot + VOID

    def holds(self, id: bytes) -> bool:
        return self.id_at(id[:SLOT_BYTES]) == id

    def wants(self, id: bytes) -> bool:
        """Whether the item, or the proof, that `id` names would be news."""
        if id in self._seen:
            return False
        held = self._slots.get(id[:SLOT_BYTES], ())
        if held:
            return len(held) == 1 and held[0].id != id
        origin = self._origins.get(origin_of(id))
        return origin is None or sequence_of(id) > origin.floor

    def next_sequence(self, origin: PeerId, now: float) -> int:
        """One that `origin` has never used: microseconds since 1970, so that a lost disk repeats none."""
        used = self._origins.get(origin)
        return max(int(now * MICROSECONDS), used.highest + 1 if used else 0)

    def room(self, item: Item) -> bool:
        """Whether `item` fits without pushing another out."""
        used = self._origins.get(item.origin, _Origin())
        old = self._newest.get((item.origin, item.topic, item.key)) if item.key else None
        slots, size_bytes = used.slots - (old is not None), used.size_bytes - (old.size_bytes if old else 0)
        limits = self.limits
        return slots < limits.origin_items and size_bytes + item.size_bytes <= limits.origin_bytes

    # --- changing ---------------------------------------------------------------------------------------------------

    def merge(self, item: Item, now: float) -> Merged:
        """Take `item` in, whose signature is right and whose origin is a member. Call `expire` before.

        Of two that prove an equivocation, merge first the one that expires later: the proof lives as long as that.
        """
        held = self._slots.get(item.slot, ())
        if len(held) == 2 or any(other.id == item.id for other in held):  # the same words may be signed twice
            return Merged("known")
        refusal = self._refusal(item, now, proof=bool(held))
        if refusal is not None:
            self.forget_id(item.id)
            return Merged(refusal)
        used = self._origins.setdefault(item.origin, _Origin())
        used.highest = max(used.highest, item.sequence)
        if held:
            self._make_void(held[0], item, used)
            return Merged("void", self._make_room(item.origin, used), clash=held[0])
        dropped = self._replace(item)
        self._put(item, used)
        return Merged("new", (*dropped, *self._make_room(item.origin, used)))

    def expire(self, now: float) -> list[Item]:
        """Let go of what has expired."""
        dropped: list[Item] = []
        while self._expiry and self._expiry[0][0] <= now:
            _, slot = heapq.heappop(self._expiry)
            held = self._slots.get(slot, ())
            if held and max(item.expires for item in held) <= now:
                dropped += self._remove(slot)
        return dropped

    def keep_origins(self, members: Collection[PeerId]) -> list[Item]:
        """Let go of everything by those who are no members."""
        gone = [origin for origin in self._origins if origin not in members]
        dropped: list[Item] = []
        for origin in gone:
            for slot in self._slots_of(origin):
                dropped += self._remove(slot)
            del self._origins[origin]
            self._unsee(origin)
        return dropped

    def forget_id(self, id: bytes) -> None:
        """Do not want `id` for now."""
        self._seen[id] = None
        while len(self._seen) > self.limits.seen:
            self._seen.popitem(last=False)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _refusal(self, item: Item, now: float, *, proof: bool) -> Verdict | None:
        if item.expires > now + self.limits.max_ttl_s + SKEW_S:
            return "distant"
        if proof:
            return None
        if item.expires <= now:
            return "expired"
        used = self._origins.get(item.origin)
        if (used and item.sequence <= used.floor) or item.size_bytes > self.limits.origin_bytes:
            return "crowded"
        newest = self._newest.get((item.origin, item.topic, item.key))
        return "replaced" if newest is not None and newest.sequence > item.sequence else None

    def _put(self, item: Item, used: _Origin) -> None:
        self._slots[item.slot] = (item,)
        self._topics.setdefault(item.topic, {})[item.slot] = item
        if item.key:
            self._newest[item.origin, item.topic, item.key] = item
        self.index.put(item.slot, item.id[SLOT_BYTES:])
        used.slots += 1
        used.size_bytes += item.size_bytes
        self._push_expiry(item)

    def _replace(self, item: Item) -> list[Item]:
        old = self._newest.get((item.origin, item.topic, item.key)) if item.key else None
        return self._remove(old.slot) if old is not None else []

    def _make_void(self, first: Item, second: Item, used: _Origin) -> None:
        self._uncount(first)
        self._slots[first.slot] = (first, second)
        self.index.put(first.slot, VOID)
        used.size_bytes += second.size_bytes
        self._push_expiry(second)
        self._unsee(first.origin)  # what the void item had replaced counts again, where somebody still has it

    def _make_room(self, origin: PeerId, used: _Origin) -> tuple[Item, ...]:
        dropped: list[Item] = []
        while used.slots > self.limits.origin_items or used.size_bytes > self.limits.origin_bytes:
            slot = self.index.first(bytes.fromhex(origin))
            if slot is None:
                break
            used.floor = max(used.floor, sequence_of(slot))
            dropped += self._remove(slot)
        return tuple(dropped)

    def _remove(self, slot: bytes) -> list[Item]:
        held = self._slots.pop(slot)
        used = self._origins[held[0].origin]
        used.slots -= 1
        for item in held:
            used.size_bytes -= item.size_bytes
            self.forget_id(item.id)
        if len(held) == 2:
            self.forget_id(slot + VOID)
        else:
            self._uncount(held[0])
        self.index.discard(slot)
        return list(held)

    def _uncount(self, item: Item) -> None:
        topic = self._topics[item.topic]
        del topic[item.slot]
        if not topic:
            del self._topics[item.topic]
        if item.key:
            del self._newest[item.origin, item.topic, item.key]

    def _unsee(self, origin: PeerId) -> None:
        for id in [id for id in self._seen if origin_of(id) == origin]:
            del self._seen[id]

    def _slots_of(self, origin: PeerId) -> list[bytes]:
        low = bytes.fromhex(origin)
        return self.index.slots(low + bytes(8), low + b"\xff" * 8)

    def _push_expiry(self, item: Item) -> None:
        heapq.heappush(self._expiry, (item.expires, item.slot))
        if len(self._expiry) > 64 + 4 * len(self._slots):  # keyed items that were replaced long before they expire
            self._expiry = [(held.expires, slot) for slot, pair in self._slots.items() for held in pair]
            heapq.heapify(self._expiry)


def origin_of(id: bytes) -> PeerId:
    """Whose item an id, or a slot, names."""
    return PeerId(id[:32].hex())


def sequence_of(id: bytes) -> int:
    return int.from_bytes(id[32:SLOT_BYTES], "big")
