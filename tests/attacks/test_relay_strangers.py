"""What strangers try at a relay's open port, and what they get."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import blake3
import nacl.signing
import pytest

from p2p_world import key
from relay_world import TOKEN, ask, datagram, far_peers, url_of, visitor
from tessera.core.errors import Refused, TesseraError, Unavailable
from tessera.core.signing import PeerKey
from tessera.p2p.relay import connection
from tessera.p2p.relay.frames import MAX_FRAME, Kind, Status, prove
from tessera.p2p.relay.probe import Visitor, probe_relay
from tessera.p2p.relay.server import Relay, RelayConfig

pytestmark = pytest.mark.anyio
UPGRADE = (
    b"GET /relay HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n"
)
VERSION = b"Sec-WebSocket-Protocol: iroh-relay-v2\r\n"


@asynccontextmanager
async def knock(relay: Relay) -> AsyncIterator[anyio.abc.SocketStream]:
    async with await anyio.connect_tcp("127.0.0.1", relay.port) as stream:
        yield stream


async def rest(stream: anyio.abc.SocketStream, within_s: float = 3) -> bytes:
    """Everything until the relay hangs up; a test fails when it does not."""
    said = b""
    with anyio.fail_after(within_s):
        try:
            while True:
                said += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return said


def masked(payload: bytes, first: int = 0x82) -> bytes:
    """A client's frame, masked with zeros."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else bytes((0x80 | 126,)) + size.to_bytes(2, "big")
    return bytes((first,)) + length + bytes(4) + payload


async def test_a_wrong_token_is_refused_before_anything_else() -> None:
    async with Relay.start(RelayConfig(tokens=(TOKEN, "another-token"), sight=False)) as relay:
        for token in ("", "wrong-token", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
            with pytest.raises(Refused, match="token") as refused:
                await probe_relay(relay.url, token)
            assert refused.value.rule == "relay_token"
        await probe_relay(relay.url, "another-token")
        async with knock(relay) as stream:
            await stream.send(UPGRADE + VERSION + b"Authorization: Bearer \xff\xfe\r\n\r\n")
            assert b" 401 " in await rest(stream)


async def test_a_token_is_compared_with_all_of_them_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("tessera.p2p.relay.door.hmac.compare_digest", compare)
    async with Relay.start(RelayConfig(tokens=("first-token", "other-token"), sight=False)) as relay:
        await probe_relay(relay.url, "first-token")
    assert compared == [b"first-token", b"other-token"]


async def test_a_forged_peer_id_is_refused() -> None:
    """With a key of its own under another's name; by an old proof; by signatures that were given for something else."""
    victim, attacker = key(1), PeerKey.generate()
    async with Relay.start(RelayConfig(sight=False)) as relay:
        challenge = bytes(16)

        def forged(seen: bytes) -> bytes:
            return prove(attacker.seed, seen)[:1] + bytes.fromhex(victim.id) + prove(attacker.seed, seen)[33:]

        def old(_: bytes) -> bytes:
            return prove(victim.seed, challenge)

        def bare(seen: bytes) -> bytes:
            signature = nacl.signing.SigningKey(victim.seed).sign(seen).signature
            return prove(victim.seed, seen)[:34] + signature

        def other_context(seen: bytes) -> bytes:
            digest = blake3.blake3(seen, derive_key_context="another purpose").digest()
            return prove(victim.seed, seen)[:34] + nacl.signing.SigningKey(victim.seed).sign(digest).signature

        for answer in (forged, old, bare, other_context):
            async with knock(relay) as stream:
                await stream.send(UPGRADE + VERSION + b"\r\n")
                said = b""
                while len(said.partition(b"\r\n\r\n")[2]) < 19:
                    said += await stream.receive()
                await stream.send(masked(answer(said[-16:])))
                assert bytes((Kind.DENIED,)) in await rest(stream)
            assert relay.clients == []


async def test_who_proves_nothing_is_dropped_soon() -> None:
    async with Relay.start(RelayConfig(proof_timeout_s=0.2, sight=False)) as relay:
        for opening in (b"", b"GET /re", UPGRADE + VERSION + b"\r\n"):
            async with knock(relay) as stream:
                if opening:
                    await stream.send(opening)
                await rest(stream, within_s=1)
        assert not relay._waiting


@pytest.mark.parametrize(
    "opening",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 3 + b"\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /relay HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
        b"\0" * 20_000,
        b"GET /relay HTTP/1.1\r\n" + b"X: y\r\n" * 3000 + b"\r\n",
        UPGRADE + b"\r\n",
        UPGRADE + b"Sec-WebSocket-Protocol: chat\r\n\r\n",
        b"GET /relay HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\n\r\n",
    ],
)
async def test_garbage_instead_of_a_request_gets_an_end(opening: bytes) -> None:
    async with Relay.start(RelayConfig(sight=False)) as relay:
        async with knock(relay) as stream:
            try:
                await stream.send(opening)
            except anyio.BrokenResourceError:
                return  # it had heard enough
            said = await rest(stream)
        assert b" 101 " not in said
        await probe_relay(relay.url)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x82\x05hello",  # not masked
        masked(b"hello", first=0x81),  # text
        masked(b"hello", first=0x02),  # the first of several
        masked(b"hello", first=0x80),  # the rest of something
        masked(b"hello", first=0xC2),  # compressed, nobody agreed to that
        b"\x82\xff" + (1 << 62).to_bytes(8, "big") + bytes(4),
        b"\x82\xff" + (MAX_FRAME + 1).to_bytes(8, "big") + bytes(4),
        masked(bytes((Kind.SEND,)) + bytes(33)),  # no content
        masked(bytes((Kind.SEND_BATCH,)) + bytes(35)),
        masked(bytes((Kind.PING,)) + bytes(7)),
        masked(bytes((Kind.CONFIRMED,))),
        masked(bytes((Kind.GONE,)) + bytes(32)),
        masked(b"\xff\xff\xff\xff"),
        masked(prove(bytes(32), bytes(16))),  # once is enough
    ],
)
async def test_a_client_that_breaks_the_protocol_is_dropped_and_nobody_else(frame: bytes) -> None:
    async with Relay.start(RelayConfig(sight=False)) as relay:
        async with visitor(relay, key(1)), visitor(relay, key(2)) as attacker:
            await attacker._stream.send(frame)
            with anyio.fail_after(3), pytest.raises(Unavailable):
                await attacker.hear()
            assert relay.clients == [key(1).id]


@pytest.mark.slow
async def test_random_bytes_do_not_disturb_those_who_talk() -> None:
    rng = random.Random(3)
    config = RelayConfig(sight=False, proof_timeout_s=0.3)
    async with Relay.start(config) as relay, far_peers(url_of(relay)) as (one, two):

        async def babble() -> None:
            for _ in range(8):
                async with knock(relay) as stream:
                    try:
                        await stream.send(rng.choice((b"", UPGRADE + VERSION + b"\r\n")) + rng.randbytes(5000))
                        await rest(stream, within_s=2)
                    except anyio.BrokenResourceError:
                        pass  # hung up on in the middle of it

        async with anyio.create_task_group() as crowd:
            for _ in range(3):
                crowd.start_soon(babble)
            for _ in range(20):
                assert await ask(one, two.record(), b"calm") == b"calm"


async def test_a_crowd_at_the_entrance_does_not_keep_others_out() -> None:
    async with Relay.start(RelayConfig(max_waiting=20, sight=False)) as relay:
        crowd = [await anyio.connect_tcp("127.0.0.1", relay.port) for _ in range(60)]
        with anyio.fail_after(3):
            while len(relay._waiting) != 20:
                await anyio.sleep(0.01)
        await probe_relay(relay.url, timeout_s=2)
        for stream in crowd:
            await stream.aclose()


async def test_there_is_room_for_so_many_and_the_next_is_told() -> None:
    async with Relay.start(RelayConfig(max_clients=2, sight=False)) as relay:
        async with visitor(relay, key(1)), visitor(relay, key(2)):
            with pytest.raises(Unavailable, match="503"):
                await probe_relay(relay.url)
        with anyio.fail_after(3):
            while relay.clients:
                await anyio.sleep(0.01)
        await probe_relay(relay.url)


async def test_one_host_does_not_take_all_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.p2p.relay.server.LOOPBACK", ("nowhere",))  # else our own host does not count
    async with Relay.start(RelayConfig(max_per_host=2, sight=False)) as relay:
        async with visitor(relay, key(1)), visitor(relay, key(2)):
            with pytest.raises(Unavailable, match="503"):
                await probe_relay(relay.url)


async def test_the_newest_connection_of_a_key_is_the_live_one_and_the_older_one_rests() -> None:
    async with Relay.start(RelayConfig(sight=False)) as relay:
        async with visitor(relay, key(1)) as older, visitor(relay, key(3)) as other:
            async with visitor(relay, key(1)) as newer:
                assert await older.hear() == bytes((Kind.STATUS, Status.REPLACED))
                await other.say(datagram(key(1), b"for the newest"))
                assert (await newer.hear()).endswith(b"for the newest")
                await older.say(datagram(key(3), b"from the one that rests"))
                await newer.say(datagram(key(3), b"from the live one"))
                assert (await other.hear()).endswith(b"from the live one")
            assert await older.hear() == bytes((Kind.STATUS, Status.HEALTHY))
            await other.say(datagram(key(1), b"back again"))
            assert (await older.hear()).endswith(b"back again")


async def test_nobody_sends_under_another_peers_name() -> None:
    async with Relay.start(RelayConfig(sight=False)) as relay:
        async with visitor(relay, key(1)) as one, visitor(relay, key(2)) as two:
            await one.say(datagram(key(2), b"content"))
            heard = await two.hear()
            assert heard == bytes((Kind.DELIVER,)) + bytes.fromhex(key(1).id) + b"\0content"


async def test_whoever_was_written_to_hears_that_a_peer_is_gone() -> None:
    async with Relay.start(RelayConfig(sight=False)) as relay, visitor(relay, key(2)) as two:
        async with visitor(relay, key(1)) as one:
            await one.say(datagram(key(2), b"x"))
            await two.hear()
        assert await two.hear() == bytes((Kind.GONE,)) + bytes.fromhex(key(1).id)


@pytest.mark.slow
async def test_a_flood_is_slowed_to_its_rate() -> None:
    rate, seconds = 400_000.0, 1.0
    async with Relay.start(RelayConfig(rate=rate, sight=False)) as relay:
        async with visitor(relay, key(1)) as flooder, visitor(relay, key(2)) as target:
            heard = 0
            told = False

            async def flood() -> None:
                while True:
                    await flooder.say(datagram(key(2), bytes(8000)))

            async def listen() -> None:
                nonlocal heard
                while True:
                    heard += len(await target.hear())

            with anyio.move_on_after(seconds):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(flood)
                    tasks.start_soon(listen)
            with anyio.fail_after(2):
                told = await flooder.hear() == bytes((Kind.STATUS, Status.LIMITED))
            assert told
            burst = 2 * connection.WRITE_PIECE + connection.READ_BYTES
            assert heard <= rate * seconds + burst
            assert heard > rate * seconds / 4


async def test_a_reader_that_stands_still_costs_a_bounded_amount() -> None:
    config = RelayConfig(queue_bytes=256 * 1024, sight=False)
    async with Relay.start(config) as relay:
        async with visitor(relay, key(1)) as sender, visitor(relay, key(2)) as slow:
            slow._stream.extra(anyio.abc.SocketAttribute.raw_socket).setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, 4096
            )
            target = relay._live[bytes.fromhex(key(2).id)]
            with anyio.fail_after(20):
                while target.dropped_bytes < 1 << 20:
                    await sender.say(datagram(key(2), os.urandom(30_000)))
                    assert target._out_bytes <= config.queue_bytes
                    assert target._transport.get_write_buffer_size() <= config.queue_bytes + MAX_FRAME
            await sender.say(bytes((Kind.PING,)) + bytes(8))
            with anyio.fail_after(3):
                assert await sender.hear() == bytes((Kind.PONG,)) + bytes(8), "others are served as before"


async def test_a_silent_client_is_asked_and_then_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_AFTER_S", 0.1)
    monkeypatch.setattr(connection, "SILENT_S", 0.6)
    monkeypatch.setattr("tessera.p2p.relay.server.LOOK_S", 0.05)
    async with Relay.start(RelayConfig(sight=False)) as relay:
        async with visitor(relay, key(1)) as polite, visitor(relay, key(2)):
            with anyio.fail_after(5):
                while len(relay.clients) == 2:
                    heard = await polite.hear()
                    assert heard[0] == Kind.PING
                    await polite.say(bytes((Kind.PONG,)) + heard[1:])
            assert relay.clients == [key(1).id]


async def test_a_relay_says_goodbye_and_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    async with Relay.start(RelayConfig()) as relay:
        guest = await Visitor.enter(url_of(relay), key(1))
    with anyio.fail_after(2):
        assert (await guest.hear())[0] == Kind.RESTARTING
        with pytest.raises(TesseraError):
            await guest.hear()
    await guest.leave()
    with anyio.fail_after(2):
        while asyncio.all_tasks() != before:
            await anyio.sleep(0.01)
