"""Whatever bytes a client of a relay sends, in whatever pieces: they mean the same, and cost a bounded amount."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_world import key
from tessera.p2p.relay.connection import Connection, Limits
from tessera.p2p.relay.door import Door, Tokens
from tessera.p2p.relay.frames import MAX_FRAME, Kind

GREETING = (
    b"GET /relay HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Protocol: iroh-relay-v2\r\n\r\n"
)


class Wire:
    """A transport that keeps nothing."""

    closing = False

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def get_extra_info(self, name: str) -> Any:
        return ("192.0.2.9", 4) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None: ...
    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Desk:
    """A relay with one client."""

    def __init__(self) -> None:
        self.limits, self.buffer = Limits(math.inf, 1 << 20, 5.0), bytearray(256 * 1024)
        self.forwarded: list[bytes] = []

    def door(self, connection: Connection) -> Door:
        return Door(Tokens(()), dict, lambda: "")

    def arrived(self, connection: Connection) -> None: ...
    def left(self, connection: Connection) -> None: ...
    def proven(self, connection: Connection, peer: bytes) -> str:
        return ""

    def forward(self, source: Connection, payload: bytes) -> None:
        self.forwarded.append(payload)


def feed(data: bytes, cuts: list[int], *, proven: bool) -> tuple[list[bytes], bool]:
    """What was forwarded, and whether the client was thrown out."""

    async def run() -> tuple[list[bytes], bool]:
        desk, wire = Desk(), Wire()
        client = Connection(desk)
        client.connection_made(wire)
        if proven:
            client._door, client.peer, client.live = None, bytes.fromhex(key(1).id), True
        at = 0
        for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
            while at < end and not wire.closing:
                room = client.get_buffer(-1)
                size = min(end - at, len(room))
                room[:size] = data[at : at + size]
                client.buffer_updated(size)
                assert len(client._tail) <= MAX_FRAME + 14
                at += size
        client.connection_lost(None)
        return desk.forwarded, wire.closing

    return asyncio.run(run())


def frame(payload: bytes, mask: bytes = b"\0\0\0\0") -> bytes:
    size = len(payload)
    if size < 126:
        head = bytes((0x82, 0x80 | size))
    elif size < 65_536:
        head = b"\x82\xfe" + size.to_bytes(2, "big")
    else:
        head = b"\x82\xff" + size.to_bytes(8, "big")
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


contents = st.binary(min_size=1, max_size=400) | st.integers(120, 70_000).map(lambda n: b"content:" + bytes(n))
pieces = st.lists(st.integers(0, 1 << 20), max_size=12)


@settings(max_examples=60)
@given(st.lists(st.tuples(contents, st.binary(min_size=4, max_size=4)), max_size=5), pieces)
def test_datagrams_arrive_whole_in_whatever_pieces_they_come(
    messages: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    sent = [(bytes((Kind.SEND,)) + bytes(33) + content, mask) for content, mask in messages]
    forwarded, thrown_out = feed(b"".join(frame(*message) for message in sent), cuts, proven=True)
    fitting = []
    for payload, _ in sent:
        if len(payload) > MAX_FRAME:
            break
        fitting.append(payload)
    assert forwarded == fitting
    assert thrown_out == (len(fitting) < len(sent))


@settings(max_examples=150)
@given(st.binary(max_size=3000), pieces, st.sampled_from([b"", GREETING]), st.booleans())
def test_no_bytes_at_all_do_more_than_end_the_connection(
    data: bytes, cuts: list[int], opening: bytes, proven: bool
) -> None:
    together, _ = feed(opening * (not proven) + data, [], proven=proven)
    in_pieces, _ = feed(opening * (not proven) + data, cuts, proven=proven)
    assert together == in_pieces
    assert not together or proven
