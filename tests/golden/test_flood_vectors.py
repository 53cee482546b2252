"""The test vectors of specs/flood.md: items, ids, fingerprints, a comparison and the overlay."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tessera.core.hashing import sha256
from tessera.core.signing import PeerKey
from tessera.p2p.flood import flood_protocol
from tessera.p2p.flood_index import Reconciliation, SlotIndex, answer_ranges
from tessera.p2p.flood_item import SLOT_BYTES, VOID, Item, join_items
from tessera.p2p.flood_peers import FloodPeers, PeerLimits
from tessera.p2p.transport import PeerRecord

Golden = Callable[[str, Any], None]

GROUP = "7d" * 32
KEYS = [PeerKey(sha256(b"flood", bytes([n]))) for n in range(12)]


def items() -> list[Item]:
    fields = [
        ("receipts", 1, "", b""),
        ("seats", 2, "seat", b'{"at":"here"}'),
        ("votes", 2**53 - 1, '"\\', b"\x00\xff"),
    ]
    return [
        Item(GROUP, topic, key.id, sequence, name, 1_800_000_000 + sequence % 7, payload).signed_by(key)
        for key, (topic, sequence, name, payload) in zip(KEYS, fields, strict=False)
    ]


def test_items_are_as_recorded(golden: Golden) -> None:
    rows = [
        {"origin": item.origin, "topic": item.topic, "sequence": item.sequence, "key": item.key,
         "expires": item.expires, "payload": item.payload.hex(), "message": item.message().decode(),
         "signature": item.signature.hex(), "id": item.id.hex(), "wire": item.to_bytes().hex()}
        for item in items()
    ]  # fmt: skip
    seeds = [key.seed.hex() for key in KEYS]
    body = {"group": GROUP, "protocol": flood_protocol(GROUP), "seeds": seeds, "items": rows}
    golden("specs/vectors/flood_items.json", {**body, "joined": join_items(items()[:2]).hex()})


def test_a_comparison_is_as_recorded(golden: Golden) -> None:
    mine, theirs = SlotIndex(), SlotIndex()
    for number in range(60):
        id = sha256(b"id", bytes([number])) + number.to_bytes(8, "big") + sha256(bytes([number]))[:16]
        if number != 7:
            mine.put(id[:SLOT_BYTES], id[SLOT_BYTES:])
        if number != 40:
            theirs.put(id[:SLOT_BYTES], VOID if number == 50 else id[SLOT_BYTES:])
    found, talk = Reconciliation(mine, most=100), []
    while (question := found.ask()) is not None:
        answer = answer_ranges(theirs, question)
        found.hear(answer)
        talk.append({"question": question.hex(), "answer": answer.hex()})
    assert (len(found.missing), len(found.surplus)) == (2, 2)
    golden("specs/vectors/flood_compare.json", {
        "mine": [id.hex() for id in mine.ids()], "theirs": [id.hex() for id in theirs.ids()],
        "empty": SlotIndex().fingerprint().hex(), "talk": talk,
        "missing": [id.hex() for id in found.missing], "surplus": [id.hex() for id in found.surplus],
    })  # fmt: skip


def test_neighbours_are_as_recorded(golden: Golden) -> None:
    records = [PeerRecord(key.id, (), 0, b"") for key in KEYS]
    rows = []
    for key in KEYS[:3]:
        peers = FloodPeers(GROUP, key.id, PeerLimits(), random.Random(0), most=100)
        peers.refresh(records)
        rows.append({"me": key.id, "neighbours": peers.neighbours(0.0)})
    golden("specs/vectors/flood_neighbours.json", rows)
