"""What is flooded: a small statement that its origin signed for one group, and how it looks on the wire.

An item stands in a *slot*, its origin and sequence; an origin fills each slot once in its life. Its *id* is the slot
and a *mark*, the head of the hash of what was signed, so two different items in one slot show themselves before they
are fetched. specs/flood.md says it for other languages, with test vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, parse_peer_id
from tessera.core.signing import PeerKey, verify_peer

__all__ = [
    "ID_BYTES", "ITEM_LIMIT", "MARK_BYTES", "MAX_PAYLOAD", "SLOT_BYTES", "VOID", "Item", "ItemStore", "MemoryItemStore",
    "check_equivocation", "join_items", "prove_equivocation", "split_items",
]  # fmt: skip

DOMAIN = "flood"
MAX_PAYLOAD = 16 * 1024  # bytes
MAX_GROUP = 128  # characters
MAX_SEQUENCE = 2**53  # exclusive: microseconds since 1970 fit until the year 2255
HEAD_LIMIT = 512  # bytes: a key of 128 backslashes, and the rest
SIGNATURE_BYTES = 64
ITEM_LIMIT = 2 + HEAD_LIMIT + SIGNATURE_BYTES + MAX_PAYLOAD  # bytes of one item on the wire
SLOT_BYTES = 32 + 8
MARK_BYTES = 16
ID_BYTES = SLOT_BYTES + MARK_BYTES
VOID = bytes(MARK_BYTES)  # the mark of a slot that its origin filled twice

_TOPIC = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_KEY = re.compile(r"[\x21-\x7e]{0,128}")


@dataclass(frozen=True, slots=True)
class Item:
    """`origin` says `payload` under `topic` to `group`, until `expires` (seconds since 1970).

    Of the items of one origin under one topic and one `key`, only that with the highest sequence counts; those with
    the key "" stand beside each other. An empty payload is allowed.
    """

    group: str
    topic: str
    origin: PeerId
    sequence: int
    key: str
    expires: int
    payload: bytes
    signature: bytes = b""
    slot: bytes = field(init=False, repr=False, compare=False)
    id: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises `Invalid` for a field that no item may have. The signature is not looked at."""
        if not _text(self.topic, _TOPIC):
            raise Invalid(f"a topic is a lower-case name like seats, not {str(self.topic)[:40]!r}")
        if not _text(self.key, _KEY):
            raise Invalid(f"a key is up to 128 visible ASCII characters, not {str(self.key)[:80]!r}")
        if type(self.sequence) is not int or not 0 <= self.sequence < MAX_SEQUENCE:
            raise Invalid(f"a sequence is an integer from 0 to 2^53 - 1, not {str(self.sequence)[:40]}")
        if type(self.expires) is not int or not 0 <= self.expires < 2**53:
            raise Invalid(f"an item expires at whole seconds since 1970, not {str(self.expires)[:40]}")
        if len(self.payload) > MAX_PAYLOAD:
            raise Invalid(f"a payload of {len(self.payload)} bytes, at most {MAX_PAYLOAD}: flood a blob's id instead")
        slot = bytes.fromhex(parse_peer_id(self.origin)) + self.sequence.to_bytes(8, "big")
        object.__setattr__(self, "slot", slot)
        object.__setattr__(self, "id", slot + sha256(self.message())[:MARK_BYTES])

    @property
    def size_bytes(self) -> int:
        """About what it takes to hold: its bytes and what Python adds."""
        return 1024 + len(self.payload) + len(self.key)

    def message(self) -> bytes:
        """What is signed."""
        return encoding.encode({**self._head(), "digest": sha256(self.payload).hex(), "group": self.group})

    def signed_by(self, key: PeerKey) -> Item:
        """Raises `Invalid` for another peer's key."""
        if key.id != self.origin:
            raise Invalid(f"only {self.origin[:16]}… signs its items, not {key.id[:16]}…")
        return self._with(key.sign(DOMAIN, self.message()))

    def check(self) -> None:
        """Raises `Invalid` unless the origin signed exactly this.  Cost: 0.1 ms."""
        verify_peer(self.origin, DOMAIN, self.message(), self.signature)

    def to_bytes(self) -> bytes:
        """length of the head, 2 bytes big-endian ‖ head, canonical JSON ‖ signature, 64 bytes ‖ payload"""
        head = encoding.encode(self._head())
        return b"".join((len(head).to_bytes(2, "big"), head, self.signature, self.payload))

    @classmethod
    def from_bytes(cls, group: str, data: bytes) -> Item:
        """Raises `Invalid` for bytes that are no item. The signature is not checked here."""
        if len(data) > ITEM_LIMIT:
            raise Invalid(f"an item of {len(data)} bytes, at most {ITEM_LIMIT} expected")
        end = 2 + int.from_bytes(data[:2], "big")
        if len(data) < end + SIGNATURE_BYTES:
            raise Invalid("an item is cut short")
        head = encoding.decode(data[2:end], HEAD_LIMIT)
        if type(head) is not dict or head.keys() != {"expires", "key", "origin", "sequence", "topic"}:
            raise Invalid("an item's head has the fields expires, key, origin, sequence, topic")
        signature, payload = data[end : end + SIGNATURE_BYTES], data[end + SIGNATURE_BYTES :]
        return cls(group=group, payload=payload, signature=signature, **head)

    def _head(self) -> dict[str, Any]:
        return {"expires": self.expires, "key": self.key, "origin": self.origin, "sequence": self.sequence,
                "topic": self.topic}  # fmt: skip

    def _with(self, signature: bytes) -> Item:
        return Item(self.group, self.topic, self.origin, self.sequence, self.key, self.expires, self.payload, signature)


class ItemStore(Protocol):
    """Where one group's items outlive the process. Called from the event loop: be quick, or hand over to a thread."""

    def load(self) -> Iterable[Item]:
        """All that were kept and not dropped, in any order. Their signatures are checked again."""
        ...

    def keep(self, item: Item) -> None:
        """`item` was accepted. It is on disk when this returns: others may hear of it right after."""
        ...

    def drop(self, item: Item) -> None:
        """`item` has expired, was replaced, or gave way."""
        ...


class MemoryItemStore:
    """An `ItemStore` that lives as long as whoever holds it: for tests, and for those who need no disk."""

    def __init__(self) -> None:
        self._items: dict[bytes, Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    def load(self) -> Iterable[Item]:
        return list(self._items.values())

    def keep(self, item: Item) -> None:
        self._items[item.id] = item

    def drop(self, item: Item) -> None:
        self._items.pop(item.id, None)


def join_items(items: Iterable[Item]) -> bytes:
    """Each item after its length, 4 bytes big-endian."""
    parts = []
    for item in items:
        data = item.to_bytes()
        parts += [len(data).to_bytes(4, "big"), data]
    return b"".join(parts)


def split_items(group: str, body: bytes) -> list[Item]:
    """What `join_items` joined. Raises `Invalid` for anything else."""
    items, place = [], 0
    while place < len(body):
        start = place + 4
        place = start + int.from_bytes(body[place:start], "big")
        if place > len(body) or start > len(body):
            raise Invalid("a list of items is cut short")
        items.append(Item.from_bytes(group, body[start:place]))
    return items


def prove_equivocation(first: Item, second: Item) -> Misbehaviour:
    """Two different items of one origin in one slot, for whoever punishes it. Both must be checked."""
    return Misbehaviour(
        f"{first.origin[:16]}… signed two different items with sequence {first.sequence}",
        evidence={"group": first.group, "first": first.to_bytes().hex(), "second": second.to_bytes().hex()},
        peer=first.origin,
    )


def check_equivocation(evidence: object) -> PeerId:
    """Who is guilty by this evidence of `prove_equivocation`. Raises `Invalid` when it proves nothing."""
    if not isinstance(evidence, dict) or evidence.keys() != {"group", "first", "second"}:
        raise Invalid("evidence of equivocation has the fields group, first, second")
    group, texts = evidence["group"], (evidence["first"], evidence["second"])
    if not isinstance(group, str) or len(group) > MAX_GROUP:
        raise Invalid(f"a group is a text of up to {MAX_GROUP} characters")
    items = []
    for text in texts:
        if not isinstance(text, str) or len(text) > 2 * ITEM_LIMIT:
            raise Invalid("evidence of equivocation holds two items in hex")
        try:
            data = bytes.fromhex(text)
        except ValueError as error:
            raise Invalid("evidence of equivocation holds two items in hex") from error
        items.append(Item.from_bytes(group, data))
    for item in items:
        item.check()
    if items[0].slot != items[1].slot or items[0].id == items[1].id:
        raise Invalid("these are not two different items with one origin and sequence")
    return items[0].origin


def _text(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
