"""Members that break a flood's rules, each in its own way, for the attack tests and for the simulated week.

An attacker is `await attack(network, transport, key, group, records, rng)`; it goes on until it is cancelled.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from tessera.core.errors import TesseraError
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.flood import flood_protocol
from tessera.p2p.flood_index import HIGHEST, LOWEST
from tessera.p2p.flood_item import ID_BYTES, Item, join_items
from tessera.p2p.framing import frame_header
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, VirtualClock
from tessera.p2p.switchboard import HELLO_LIMIT, hello
from tessera.p2p.transport import PeerRecord

Records = Mapping[PeerId, PeerRecord]
Attack = Callable[[MemoryNetwork, MemoryTransport, PeerKey, str, Records, random.Random], Awaitable[None]]

BIG = 8 << 20


async def ask(
    transport: MemoryTransport, target: PeerRecord, group: str, op: object, body: bytes = b""
) -> tuple[dict[str, Any], bytes]:
    """One call to a member's flood, in words of the attacker's choice."""
    return await call(transport, target, flood_protocol(group), {"op": op}, body, timeout_s=20, reply_limit=BIG)


async def try_ask(transport: MemoryTransport, target: PeerRecord, group: str, op: object, body: bytes = b"") -> str:
    """The same; says how it ended: `ok`, or the error's rule or code."""
    try:
        await ask(transport, target, group, op, body)
    except TesseraError as error:
        return str(error.fields.get("rule", error.code))
    return "ok"


async def send_raw(transport: MemoryTransport, target: PeerRecord, data: bytes) -> None:
    """Bytes on a new stream, past all framing; then silence until the peer has enough."""
    try:
        with anyio.fail_after(20):
            link = await transport._link_to(target)
            channel = await link.channel(transport)
            await channel.write(data)
            while await channel.read(1000):
                pass
    except (TesseraError, TimeoutError):
        return


def garbage(group: str, rng: random.Random) -> list[bytes]:
    """What a stream may begin with that no member says."""
    greeting = hello(flood_protocol(group), bulk=False, confirm=False)
    return [
        rng.randbytes(300),
        frame_header(1 << 20, last=False) + rng.randbytes(2000),  # a hello of a megabyte
        frame_header(HELLO_LIMIT, last=False) + rng.randbytes(HELLO_LIMIT),
        frame_header(0, last=False),
        frame_header(len(greeting), last=False) + greeting + rng.randbytes(500),
        frame_header(len(greeting), last=False) + greeting + frame_header(30, last=True) + rng.randbytes(30),
        frame_header(len(greeting), last=False) + greeting[:-1] + b" ",
    ]


def malformed(rng: random.Random) -> list[tuple[object, bytes]]:
    """Requests that no member makes."""
    return [
        ("offer", rng.randbytes(ID_BYTES + 1)),
        ("offer", b""),
        ("get", bytes(ID_BYTES * 300)),
        ("compare", rng.randbytes(96 * 3 + 5)),
        ("compare", HIGHEST + LOWEST + bytes(16)),
        ("steal", b""),
        (7, b"x"),
        ({"op": ["get"]}, b"x"),
    ]


class Liar:
    """A member that answers what it likes.

    `items` are given to whoever asks for their ids; `lie` makes the answer to a comparison, `mutate` changes what goes
    out on `get`.
    """

    def __init__(self, transport: MemoryTransport, key: PeerKey, group: str) -> None:
        self.transport, self.key, self.group = transport, key, group
        self.items: dict[bytes, Item] = {}
        self.asked: list[bytes] = []
        self.lie: Callable[[bytes], bytes] = lambda question: bytes(len(question) // 96)  # the same, wherever you look
        self.mutate: Callable[[bytes], bytes] = lambda body: body
        serve_calls(transport, flood_protocol(group), self._answer, request_limit=BIG)

    def item(self, sequence: int, payload: bytes, *, topic: str = "news", ttl_s: float = 3600, key: str = "") -> Item:
        """Rightly signed."""
        expires = int(VirtualClock().time() + ttl_s)
        item = Item(self.group, topic, self.key.id, sequence, key, expires, payload).signed_by(self.key)
        self.items[item.id] = item
        return item

    async def offer(self, target: PeerRecord, *ids: bytes) -> str:
        return await try_ask(self.transport, target, self.group, "offer", b"".join(ids))

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if request.get("op") == "compare":
            return {}, self.lie(body)
        if request.get("op") != "get":
            return {}, b""
        ids = [body[start : start + ID_BYTES] for start in range(0, len(body), ID_BYTES)]
        self.asked += ids
        return {"sent": len(ids)}, self.mutate(join_items(self.items[id] for id in ids if id in self.items))


# --- attackers that go on and on -----------------------------------------------------------------------------------


async def attack_with_garbage(
    network: MemoryNetwork, transport: MemoryTransport, key: PeerKey, group: str, records: Records, rng: random.Random
) -> None:
    """Bytes that are no stream, hellos that are too long, requests that make no sense."""
    liar = Liar(transport, key, group)
    liar.lie = liar.mutate = lambda body: rng.randbytes(len(body) + 7)
    while True:
        target = await _some_target(records, key, rng)
        await send_raw(transport, target, rng.choice(garbage(group, rng)))
        op, body = rng.choice(malformed(rng))
        await try_ask(transport, target, group, op, body)
        fake = bytes.fromhex(rng.choice(list(records))) + rng.randbytes(ID_BYTES - 32)
        await liar.offer(target, fake)


async def attack_with_floods(
    network: MemoryNetwork, transport: MemoryTransport, key: PeerKey, group: str, records: Records, rng: random.Random
) -> None:
    """More calls and more items than anybody needs, two different items in one slot, and forged ones."""
    liar = Liar(transport, key, group)
    while True:
        target, other = await _some_target(records, key, rng), await _some_target(records, key, rng)
        start = int(VirtualClock().time() * 1e6)
        twins = [liar.item(start + 1000, b"to one"), liar.item(start + 1000, b"to another")]
        await liar.offer(other, twins[0].id)
        await liar.offer(target, twins[1].id)
        mine = [liar.item(start + 1 + n, b"flood %d" % n, topic="receipts", ttl_s=86_400) for n in range(150)]
        await liar.offer(target, *(item.id for item in mine))
        for _ in range(130):
            if await try_ask(transport, target, group, "compare", LOWEST + HIGHEST + bytes(16)) == "barred":
                break
        victim = rng.choice([peer for peer in records if peer != key.id])
        forged = Item(group, "receipts", PeerId(victim), start, "", mine[0].expires, b"forged", mine[0].signature)
        liar.items[forged.id] = forged
        await liar.offer(other, forged.id)
        while len(liar.items) > 1000:
            liar.items.pop(next(iter(liar.items)))


async def attack_by_reading_slowly(
    network: MemoryNetwork, transport: MemoryTransport, key: PeerKey, group: str, records: Records, rng: random.Random
) -> None:
    """Asks for all there is, on many streams at once, and takes a byte now and then."""
    network.slow(key.id, 500.0)
    Liar(transport, key, group)
    everything = LOWEST + HIGHEST + bytes(16)
    while True:
        target = await _some_target(records, key, rng)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(try_ask, transport, target, group, "compare", everything)
            tasks.start_soon(send_raw, transport, target, frame_header(300, last=False) + b"{")


ATTACKS: tuple[Attack, ...] = (attack_with_floods, attack_with_garbage, attack_by_reading_slowly)


async def _some_target(records: Records, key: PeerKey, rng: random.Random) -> PeerRecord:
    await anyio.sleep(rng.uniform(20, 180) * 60)
    return records[rng.choice([peer for peer in records if peer != key.id])]
