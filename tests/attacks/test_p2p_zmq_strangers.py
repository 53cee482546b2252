"""Strangers at the port of a zmq node: noise, forged names, broken rules, floods. Each loses its connection at most."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import zmq

from p2p_world import LIMIT, key, serve_all
from tessera.core import encoding
from tessera.core.errors import Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p import zmq_dealer, zmq_door, zmq_link
from tessera.p2p.calls import call
from tessera.p2p.framing import frame_header
from tessera.p2p.switchboard import hello
from tessera.p2p.transport import PeerRecord, Stream, Transport
from tessera.p2p.versions import PRODUCT, VERSION
from tessera.p2p.zmq_channel import WINDOW
from tessera.p2p.zmq_keys import DOMAIN, CurveKeys, curve_key, greeting, parse_greeting
from tessera.p2p.zmq_link import STREAMS_PER_END
from tessera.p2p.zmq_transport import LINKS_PER_PEER, ZmqTransport
from tessera.p2p.zmq_wire import FRAME, Kind, pack, pack_number, unpack

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_door, "SWEEP_S", 0.05)
    monkeypatch.setattr(zmq_door, "REFUSED_S", 0.1)


class Stranger:
    """A raw connection to `victim`, with any key one likes."""

    def __init__(
        self, context: zmq.Context[Any], me: PeerKey, victim: PeerRecord, *, curve: bool = True, queue: int = 1000
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVHWM, queue)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if curve:
            keys = CurveKeys.of(me)
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.public, keys.secret
            self.socket.curve_serverkey = curve_key(victim.id)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(f"tcp://{victim.rests('zmq')[0]}")

    def send(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)

    async def hear(self) -> tuple[Kind, bytes]:
        """The next message that is no beat."""
        with anyio.fail_after(5):
            while True:
                try:
                    kind, _, payload = unpack(self.socket.recv(zmq.NOBLOCK))
                except zmq.Again:
                    await anyio.sleep(0.005)
                    continue
                if kind is not Kind.BEAT:
                    return kind, bytes(payload)

    async def wait_cut(self) -> None:
        with anyio.fail_after(5):
            while not self.monitor.poll(0):
                await anyio.sleep(0.005)

    def cut(self) -> bool:
        return bool(self.monitor.poll(0))

    async def join(self, me: PeerKey, victim: PeerId) -> None:
        self.send(pack(Kind.GREETING, payload=greeting(me, victim)))
        assert (await self.hear())[0] is Kind.GREETING


@asynccontextmanager
async def siege() -> AsyncIterator[tuple[ZmqTransport, ZmqTransport, Callable[..., Stranger]]]:
    """A victim, an honest caller, and what makes strangers."""
    context: zmq.Context[Any] = zmq.Context()
    strangers: list[Stranger] = []
    try:
        async with ZmqTransport.start(key(1)) as victim, ZmqTransport.start(key(2)) as honest:
            serve_all(victim)

            def stranger(number: int = 6, **how: Any) -> Stranger:
                strangers.append(Stranger(context, key(number), victim.record(), **how))
                return strangers[-1]

            yield victim, honest, stranger
    finally:
        context.destroy(0)


async def still_serves(victim: Transport, caller: Transport) -> None:
    with anyio.fail_after(5):
        _, body = await call(caller, victim.record(), "answer/1", {}, b"fine", timeout_s=5, reply_limit=LIMIT)
    assert body == b"fine"


def signed(me: PeerKey, **changes: Any) -> bytes:
    body = {"from": me.id, "product": PRODUCT, "to": key(1).id, "version": VERSION, **changes}
    return encoding.encode({**body, "signature": me.sign(DOMAIN, encoding.encode(body)).hex()})


async def test_noise_on_the_port_hurts_nobody() -> None:
    rng = random.Random(4)
    async with siege() as (victim, honest, _):
        host, _, port = victim.record().rests("zmq")[0].rpartition(":")
        connections = []
        zmtp = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00CURVE".ljust(64, b"\0")
        for noise in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", zmtp, zmtp + rng.randbytes(300), rng.randbytes(5000)):
            connection = socket.create_connection((host, int(port)))
            connection.sendall(noise)
            connections.append(connection)
        await anyio.sleep(0.1)
        await still_serves(victim, honest)
        assert not victim._links.keys() - {honest.id}
        for connection in connections:
            connection.close()


async def test_a_connection_without_encryption_gets_nowhere() -> None:
    async with siege() as (victim, honest, stranger):
        plain = stranger(curve=False)
        plain.send(pack(Kind.GREETING, payload=greeting(key(6), victim.id)))
        await plain.wait_cut()
        await still_serves(victim, honest)


@pytest.mark.slow
async def test_who_sends_no_greeting_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_door, "GREET_S", 0.2)
    async with siege() as (victim, honest, stranger):
        silent, member = stranger(), stranger(7)
        await member.join(key(7), victim.id)
        await silent.wait_cut()
        await anyio.sleep(0.3)
        assert not member.cut()
        await still_serves(victim, honest)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (signed(key(7)), "proves another key"),
        (signed(key(6), to=key(3).id), "another peer"),
        (signed(key(6))[:-5] + b'00"}', "not"),
        (signed(key(6), **{"from": key(7).id}), "proves another key"),
        (signed(key(6), more=1), "fields"),
        (signed(key(6), product="\x1b[31m"), "fields"),
        (signed(key(6), version="1"), "has a version"),
        (b"[1]", "object"),
        (b"\xff" * 50, "cannot be read"),
        (b"x" * 5000, "cannot be read"),
    ],
)
async def test_a_greeting_that_does_not_fit_is_refused_and_cut_off(payload: bytes, reason: str) -> None:
    async with siege() as (victim, honest, stranger):
        liar = stranger()
        liar.send(pack(Kind.GREETING, payload=payload))
        kind, data = await liar.hear()
        assert kind is Kind.REFUSAL
        error = encoding.decode(data, 10_000)["error"]
        assert error["code"] == "misbehaviour"
        assert reason in error["message"]
        await liar.wait_cut()
        assert victim._links.keys() <= {honest.id}
        await still_serves(victim, honest)


async def test_the_twin_of_a_key_is_another_peer() -> None:
    """Two ed25519 keys of opposite sign have one curve25519 key: the link cannot tell them apart, the signature can."""
    me = key(6)
    point = bytearray.fromhex(me.id)
    point[31] ^= 0x80
    twin = PeerId(point.hex())
    assert curve_key(twin) == curve_key(me.id)
    with pytest.raises(Misbehaviour, match="signature"):
        parse_greeting(signed(me, **{"from": twin}), us=key(1).id, proven=curve_key(me.id))
    assert parse_greeting(signed(me), us=key(1).id, proven=curve_key(me.id)) == me.id


async def test_another_version_is_refused_naming_both() -> None:
    async with siege() as (_, __, stranger):
        future = stranger()
        future.send(pack(Kind.GREETING, payload=encoding.encode({"version": VERSION + 1, "product": "tessera 9.1"})))
        _, data = await future.hear()
        error = encoding.decode(data, 10_000)["error"]
        assert error["code"] == "refused"
        assert f"they speak {VERSION + 1} (tessera 9.1), we speak {VERSION} ({PRODUCT})" in error["message"]


def _hello(stream: int) -> bytes:
    greeting_ = hello("echo/1", bulk=False, confirm=True)
    return pack(Kind.DATA, stream, frame_header(len(greeting_), last=False) + greeting_)


BROKEN: dict[str, list[bytes]] = {
    "too short": [b"\x10"],
    "an unknown kind": [bytes([99]) + bytes(8)],
    "data on the link": [pack(Kind.DATA, 0, b"x")],
    "a beat on a stream": [pack(Kind.BEAT, 3)],
    "another greeting": [pack(Kind.GREETING, payload=greeting(key(6), key(1).id))],
    "a stream of ours": [pack(Kind.DATA, 2, b"x")],
    "an end that begins": [pack(Kind.END, 3)],
    "data after the end": [_hello(3), pack(Kind.END, 3), pack(Kind.DATA, 3, b"x")],
    "no data": [pack(Kind.DATA, 3)],
    "credit for nothing": [_hello(3), pack_number(Kind.CREDIT, 3, 1 << 40)],
    "half a number": [_hello(3), pack(Kind.CREDIT, 3, b"\0")],
    "too many streams": [_hello(3 + 2 * n) for n in range(STREAMS_PER_END + 1)],
    "too much data": [
        _hello(3),
        pack(Kind.DATA, 3, frame_header(1 << 22, last=False)),
        *(pack(Kind.DATA, 3, bytes(FRAME)) for _ in range(3 * WINDOW // FRAME)),
    ],
}


@pytest.mark.parametrize("how", BROKEN)
async def test_whoever_breaks_the_links_rules_loses_the_link(how: str) -> None:
    held = anyio.Event()

    async def hold(stream: Stream) -> None:
        await held.wait()

    async with siege() as (victim, honest, stranger):
        victim.serve("echo/1", hold)
        rogue = stranger()
        await rogue.join(key(6), victim.id)
        for message in BROKEN[how]:
            rogue.send(message)
        await rogue.wait_cut()
        with anyio.fail_after(2):
            while key(6).id in victim._links:
                await anyio.sleep(0.01)
        await still_serves(victim, honest)
        held.set()


async def test_messages_of_several_parts_end_the_connection() -> None:
    async with siege() as (victim, honest, stranger):
        for joined in (False, True):
            rogue = stranger()
            if joined:
                await rogue.join(key(6), victim.id)
            rogue.send(pack(Kind.BEAT), b"more", b"and more")
            await rogue.wait_cut()
        await still_serves(victim, honest)


async def test_news_of_streams_that_are_over_is_no_fault() -> None:
    async with siege() as (victim, _, stranger):
        slow = stranger()
        await slow.join(key(6), victim.id)
        slow.send(_hello(9))
        for late in (pack(Kind.END, 3), pack_number(Kind.CREDIT, 5, 7), pack_number(Kind.STOP, 7, 0)):
            slow.send(late)
        slow.send(pack_number(Kind.RESET, 9, 0))
        await anyio.sleep(0.2)
        assert not slow.cut()
        assert victim._links[key(6).id]


async def test_a_flood_of_connections_keeps_two_of_one_peer() -> None:
    async with siege() as (victim, honest, stranger):
        many = [stranger() for _ in range(12)]
        for one in many:
            await one.join(key(6), victim.id)
        await anyio.sleep(0.2)
        assert len(victim._links[key(6).id]) == LINKS_PER_PEER
        assert sum(not one.cut() for one in many) == LINKS_PER_PEER
        await still_serves(victim, honest)


async def test_a_full_house_turns_strangers_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with siege() as (victim, honest, stranger):
        await still_serves(victim, honest)
        monkeypatch.setattr(zmq_door, "MAX_CONNECTIONS", 1)
        late = stranger()
        await late.wait_cut()
        await still_serves(victim, honest)


async def test_only_those_who_are_admitted_come_in() -> None:
    async with siege() as (victim, honest, stranger):
        victim.admit({honest.id})
        outsider = stranger()
        await outsider.wait_cut()
        await still_serves(victim, honest)
        async with ZmqTransport.start(key(3)) as other:
            with pytest.raises(Unavailable, match="does not admit"):
                await other.open(victim.record(), "answer/1", timeout_s=5)
            victim.admit(None)
            await still_serves(victim, other)


async def test_a_flood_of_messages_leaves_room_for_the_others() -> None:
    async with siege() as (victim, honest, stranger):
        flood = stranger()
        await flood.join(key(6), victim.id)
        beat = pack(Kind.BEAT)
        for _ in range(5000):
            flood.send(beat)
        await still_serves(victim, honest)


async def give(stream: Stream) -> None:
    while True:
        await stream.send(bytes(FRAME))


def ask_for(protocol: str) -> bytes:
    opening = hello(protocol, bulk=False, confirm=False)
    return pack(Kind.DATA, 3, frame_header(len(opening), last=False) + opening)


@pytest.mark.slow
async def test_whoever_takes_nothing_is_sent_one_window() -> None:
    async with siege() as (victim, honest, stranger):
        victim.serve("give/1", give)
        idle = stranger()
        await idle.join(key(6), victim.id)
        idle.send(ask_for("give/1"))
        await anyio.sleep(0.3)
        heard = 0
        while True:
            with anyio.move_on_after(0.2) as scope:
                heard += len((await idle.hear())[1])
            if scope.cancelled_caught:
                break
        assert WINDOW - FRAME < heard <= WINDOW
        await still_serves(victim, honest)


async def test_whoever_gives_credit_for_what_it_does_not_take_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credit makes us send more; when nobody takes it, the engine's queue is full, and our patience limited."""
    monkeypatch.setattr(zmq_dealer, "QUEUE_OUT", 16)
    monkeypatch.setattr(zmq_link, "STUCK_S", 0.3)
    streams: list[Stream] = []

    async def give_on(stream: Stream) -> None:
        streams.append(stream)
        await give(stream)

    async with siege() as (victim, honest, stranger):
        victim.serve("give/1", give_on)
        greedy = stranger(queue=1)
        await greedy.join(key(6), victim.id)
        greedy.send(ask_for("give/1"))
        link, credit = victim._links[key(6).id][0], 0
        with anyio.fail_after(10):
            while link.alive:
                while streams and credit + WINDOW // 2 <= streams[0].sent_bytes:  # as if it knew
                    credit += WINDOW // 2
                    greedy.send(pack_number(Kind.CREDIT, 3, credit))
                await anyio.sleep(0.01)
        assert 2 * WINDOW < streams[0].sent_bytes < 40 * WINDOW, "the queues of both ends and their kernels"
        assert link._reason == "the peer does not take what we send"
        await still_serves(victim, honest)


async def test_whoever_gives_credit_for_what_was_never_sent_is_cut_off() -> None:
    async with siege() as (victim, honest, stranger):
        victim.serve("give/1", give)
        greedy = stranger()
        await greedy.join(key(6), victim.id)
        greedy.send(ask_for("give/1"))
        greedy.send(pack_number(Kind.CREDIT, 3, 1 << 40))
        await greedy.wait_cut()
        await still_serves(victim, honest)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"\x01", Unavailable),
        (pack(Kind.DATA, 3, b"x"), Unavailable),
        (pack(Kind.GREETING, payload=b"{}"), Unavailable),
        (pack(Kind.GREETING, payload=greeting(key(6), key(9).id)), Unavailable),
        (pack(Kind.REFUSAL, payload=b"junk"), Unavailable),
        (pack(Kind.REFUSAL, payload=b'{"error":{"code":"refused","fields":{},"message":"no"}}'), Refused),
        (pack(Kind.GREETING, payload=greeting(key(6), key(1).id)) + b" ", Unavailable),
    ],
)
async def test_a_listener_that_answers_with_rubbish_is_no_peer(reply: bytes, kind: type[TesseraError]) -> None:
    context: zmq.Context[Any] = zmq.Context()
    keys = CurveKeys.of(key(6))
    with context.socket(zmq.ROUTER) as liar:
        liar.curve_server, liar.curve_publickey, liar.curve_secretkey, liar.linger = True, keys.public, keys.secret, 0
        port = liar.bind_to_random_port("tcp://127.0.0.1")
        record = PeerRecord.sign(key(6), (f"zmq:127.0.0.1:{port}",), expires=2**40)

        async def answer() -> None:
            while True:
                try:
                    liar.send_multipart([liar.recv_multipart(zmq.NOBLOCK)[0], reply])
                except zmq.Again:
                    await anyio.sleep(0.01)

        async with ZmqTransport.start(key(1)) as caller, anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            with pytest.raises(kind):
                await caller.open(record, "x/1", timeout_s=5)
            tasks.cancel_scope.cancel()
    context.destroy(0)
