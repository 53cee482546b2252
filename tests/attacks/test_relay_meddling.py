"""A relay that lies: it loses, repeats, reorders or alters what it should forward, reads all of it, or swaps peers.

Between the peers there is QUIC, with keys that only they have: whatever the relay does looks like a bad network.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import anyio
import pytest

from p2p_world import key
from relay_world import Meddler, Witness, ask, big, far_peers, url_of
from tessera.core.errors import Late, Unavailable
from tessera.core.signing import PeerKey
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.relay.connection import Connection
from tessera.p2p.relay.frames import PEER_BYTES
from tessera.p2p.relay.measure import deafen
from tessera.p2p.relay.server import RelayConfig
from tessera.p2p.transport import PeerRecord, Stream

pytestmark = pytest.mark.anyio
CONFIG = RelayConfig(sight=False)
CONTENT = 1 + PEER_BYTES + 3  # where the datagrams begin in a batch, the longer of the two headers


class Losing(Meddler):
    def meddle(self, payload: bytes) -> Iterator[bytes]:
        self.meddling += 1
        if self.meddling % 6:
            yield payload


class Repeating(Meddler):
    def __init__(self, config: RelayConfig) -> None:
        super().__init__(config)
        self.kept: list[bytes] = []

    def meddle(self, payload: bytes) -> Iterator[bytes]:
        self.meddling += 1
        self.kept = [*self.kept[-50:], payload]
        yield payload
        yield payload
        yield self.kept[0]  # and an old one, much later


class Reordering(Meddler):
    def __init__(self, config: RelayConfig) -> None:
        super().__init__(config)
        self.held: dict[bytes, bytes] = {}

    def meddle(self, payload: bytes) -> Iterator[bytes]:
        peer = payload[1 : 1 + PEER_BYTES]
        self.meddling += 1
        if peer in self.held:
            yield payload
            yield self.held.pop(peer)
        elif self.meddling % 4 == 0:
            self.held[peer] = payload
        else:
            yield payload


class Altering(Meddler):
    def __init__(self, config: RelayConfig) -> None:
        super().__init__(config)
        self.rng, self.share = random.Random(5), 0.1

    def meddle(self, payload: bytes) -> Iterator[bytes]:
        changed = bytearray(payload)
        if len(payload) > CONTENT and self.rng.random() < self.share:
            self.meddling += 1
            for at in range(CONTENT, len(changed), 700):
                changed[self.rng.randrange(at, min(at + 700, len(changed)))] ^= 1 << self.rng.randrange(8)
        yield bytes(changed)


@pytest.mark.parametrize("liar", [Losing, Repeating, Reordering, Altering])
async def test_what_arrives_is_what_was_sent_whatever_the_relay_does(liar: type[Meddler]) -> None:
    data = random.Random(1).randbytes(1 << 20)
    async with liar.start(CONFIG) as relay, far_peers(url_of(relay)) as (one, two):
        assert isinstance(relay, liar)
        await ask(one, two.record())
        relay.on = True
        assert await big(one, two.record(), data) == data
        assert relay.meddling > 10, "the relay did meddle"


@pytest.mark.slow
async def test_a_relay_that_alters_everything_stops_the_talk_and_puts_in_no_word_of_its_own() -> None:
    heard: list[bytes] = []

    async def note(stream: Stream) -> None:
        while data := await stream.recv(1 << 20):
            heard.append(data)
            await stream.send(data)

    async with Altering.start(CONFIG) as relay, far_peers(url_of(relay)) as (one, two):
        assert isinstance(relay, Altering)
        two.serve("note/1", note)
        stream = await one.open(two.record(), "note/1", timeout_s=5)
        await stream.send(b"before")
        assert await stream.recv(100) == b"before"
        relay.on, relay.share = True, 1.0
        await stream.send(b"meanwhile")
        with anyio.move_on_after(1):
            assert await stream.recv(100) == b"nothing may come"
        with pytest.raises((Unavailable, Late)):
            await one.open(two.record(), "note/1", timeout_s=0.5)
        assert heard == [b"before"]
        assert relay.meddling > 5
        relay.on = False
        assert await ask(one, two.record(), b"again") == b"again"
        with anyio.fail_after(10):
            assert await stream.recv(100) == b"meanwhile"
        assert heard == [b"before", b"meanwhile"]


@pytest.mark.slow
async def test_a_relay_that_forwards_nothing_costs_a_reconnect() -> None:
    class Mute(Meddler):
        def meddle(self, payload: bytes) -> Iterator[bytes]:
            self.meddling += 1
            yield from ()

    async with Mute.start(CONFIG) as relay, far_peers(url_of(relay)) as (one, two):
        assert isinstance(relay, Mute)
        stream = await one.open(two.record(), "echo/1", timeout_s=5)
        relay.on = True
        with anyio.fail_after(5), pytest.raises(Unavailable):
            await stream.recv(100)
        relay.on = False
        assert await ask(one, two.record(), b"again") == b"again"


async def test_the_relay_sees_neither_plaintext_nor_keys() -> None:
    marker = b"the plaintext that no relay may see"
    keys = PeerKey.generate(), PeerKey.generate()
    async with Witness.start(CONFIG) as relay:
        assert isinstance(relay, Witness)
        start = IrohTransport.start
        relays = (url_of(relay),)
        async with (
            start(keys[0], relays=relays, direct=False) as one,
            start(keys[1], relays=relays, direct=False) as two,
        ):
            for peer in (one, two):
                deafen(peer)
                assert await peer.online(10)

            async def echo(stream: Stream) -> None:
                while data := await stream.recv(1 << 20):
                    await stream.send(data)

            two.serve("echo/1", echo)
            data = marker * 20_000
            assert await big(one, two.record(), data) == data
        seen = bytes(relay.record)
    assert len(seen) > 4 * len(data), "there and back, masked and unmasked"
    assert bytes.fromhex(keys[1].id) in seen, "it does see who talks with whom"
    for secret in (marker, keys[0].seed, keys[1].seed, keys[0].seed.hex().encode(), keys[1].seed.hex().encode()):
        assert secret not in seen
        assert secret[::-1] not in seen


async def test_a_relay_cannot_pass_one_peer_off_as_another() -> None:
    """It hands what is for the absent peer to its accomplice, and the answers back under the absent one's id."""
    absent, accomplice = key(7), key(2)

    class Swapping(Meddler):
        def forward(self, source: Connection, payload: bytes) -> None:
            if payload[1 : 1 + PEER_BYTES] == bytes.fromhex(absent.id):
                self.meddling += 1
                super().forward(source, payload[:1] + bytes.fromhex(accomplice.id) + payload[1 + PEER_BYTES :])
            elif source.peer == bytes.fromhex(accomplice.id) and self.meddling:
                head, body = source.datagram(payload)
                self._live[payload[1 : 1 + PEER_BYTES]].deliver(head[:-PEER_BYTES] + bytes.fromhex(absent.id), body)
            else:
                super().forward(source, payload)

    async with Swapping.start(CONFIG) as relay, far_peers(url_of(relay)) as (one, _):
        assert isinstance(relay, Swapping)
        record = PeerRecord.sign(absent, (f"relay:{relay.url}",), expires=2**40)
        with pytest.raises((Unavailable, Late)):
            await one.open(record, "echo/1", timeout_s=3)
        assert relay.meddling, "the accomplice was asked"
