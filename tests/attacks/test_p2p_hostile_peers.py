"""Peers that break the rules: bad hellos, bad frames, floods, slowness. The node names the fault and serves the others.

The first half speaks raw QUIC to a real node; the second half plays on the memory network, where waiting is free.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import iroh.iroh_ffi as iroh
import pytest

from p2p_world import LIMIT, answer, key, serve_all
from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.framing import HEADER_BYTES, READ_AHEAD, FramedStream, frame_header
from tessera.p2p.iroh_transport import ALPN, LINKS_PER_PEER, IrohTransport
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, run_virtual
from tessera.p2p.memory_wire import MemoryChannel
from tessera.p2p.switchboard import HELLO_S, hello
from tessera.p2p.transport import PeerRecord, Stream, Transport
from tessera.p2p.versions import PRODUCT, UNNAMED, VERSION

pytestmark = pytest.mark.anyio

Body = Callable[[MemoryNetwork, MemoryTransport, MemoryTransport, MemoryTransport], Awaitable[None]]


def frame(content: bytes, *, last: bool = False) -> bytes:
    return frame_header(len(content), last=last) + content


def hello_of(**changes: Any) -> bytes:
    facts = {"bulk": False, "confirm": True, "product": PRODUCT, "protocol": "answer/1", "version": VERSION}
    return encoding.encode({**facts, **changes})


def message(head: bytes, body: bytes = b"") -> bytes:
    """A call's request or reply."""
    return len(head).to_bytes(4, "big") + head + body


async def still_serves(victim: Transport, caller: Transport) -> None:
    with anyio.fail_after(5):
        _, body = await call(caller, victim.record(), "answer/1", {}, b"fine", timeout_s=5, reply_limit=LIMIT)
    assert body == b"fine"


# --- raw QUIC against a real node -----------------------------------------------------------------------------------


@asynccontextmanager
async def endpoint(number: int, alpn: bytes = ALPN) -> AsyncIterator[Any]:
    raw = await iroh.Endpoint.bind(
        iroh.EndpointOptions(
            preset=iroh.preset_minimal(),
            relay_mode=iroh.RelayMode.disabled(),
            bind_addr="127.0.0.1:0",
            alpns=[alpn],
            secret_key=key(number).seed,
        )
    )
    try:
        yield raw
    finally:
        with anyio.move_on_after(1, shield=True):
            await raw.close()


async def dial(raw: Any, victim: PeerRecord, alpn: bytes = ALPN) -> Any:
    address = iroh.EndpointAddr(iroh.EndpointId.from_string(victim.id), None, victim.rests("iroh"))
    with anyio.fail_after(5):
        return await raw.connect(address, alpn)


@asynccontextmanager
async def siege() -> AsyncIterator[tuple[IrohTransport, IrohTransport, Any]]:
    """A victim, an honest caller, and an attacker's raw connection."""
    async with IrohTransport.start(key(1)) as victim, IrohTransport.start(key(2)) as honest, endpoint(6) as raw:
        serve_all(victim)
        yield victim, honest, await dial(raw, victim.record())


async def reply_to(connection: Any, data: bytes) -> bytes:
    """What the victim says to these bytes and the end of the stream; b"" when it just cuts."""
    bi = await connection.open_bi()
    try:
        await bi.send().write_all(data)
        await bi.send().finish()
    except iroh.IrohError:  # it has heard enough
        pass
    with anyio.fail_after(5):
        try:
            return await bi.recv().read_to_end(1 << 20)
        except iroh.IrohError:
            return b""


def refusal(reply: bytes) -> dict[str, Any]:
    return encoding.decode(reply[HEADER_BYTES:], 10_000)["error"]


def call_error(reply: bytes) -> dict[str, Any]:
    """The error in a call's reply, after the consent to the hello."""
    consent = frame(b"{}")
    assert reply.startswith(consent)
    return refusal(reply[len(consent) + 4 :])


async def test_another_version_is_refused_naming_both() -> None:
    async with siege() as (victim, honest, connection):
        for future, spoken in (
            (hello_of(version=VERSION + 1, product="tessera 9.1"), f"{VERSION + 1} (tessera 9.1)"),
            (encoding.encode({"version": VERSION + 7, "shape": ["new"]}), f"{VERSION + 7} ({UNNAMED})"),
            (encoding.encode({"version": 1}), f"1 ({UNNAMED})"),
            (hello_of(version=VERSION + 1, product="\x1b[31m" * 9), f"{VERSION + 1} ({UNNAMED})"),
            (hello_of(version=VERSION + 1, product=["x"]), f"{VERSION + 1} ({UNNAMED})"),
        ):
            error = refusal(await reply_to(connection, frame(future)))
            assert error["code"] == "refused"
            assert error["fields"]["rule"] == "version"
            assert f"they speak {spoken}, we speak {VERSION} ({PRODUCT})" in error["message"]
        await still_serves(victim, honest)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        frame(b"")[:3],
        frame(b"x" * 10)[:9],
        frame(b"", last=True),
        bytes(4),
        frame(b"not json"),
        frame(b"[]"),
        frame(b"{}"),
        frame(b'{"version":"1"}'),
        frame(b'{"version": 1}'),
        frame(hello_of(protocol="../../etc/passwd")),
        frame(hello_of(protocol=7)),
        frame(hello_of(bulk=1)),
        frame(hello_of(more=1)),
        frame(hello_of(product="")),
        frame(hello_of(product=None)),
        frame(hello_of(product="tessera\n0.1")),
        frame(hello_of(product="x" * 41)),
        frame(hello_of(version=True)),
        frame(b"[" * 400),
        frame(b"\xff" * 300),
        frame(hello_of(protocol="x" * 600)),
        frame_header(2**31 - 1, last=False) + b"x" * 100,
        frame_header(2**31 - 1, last=True),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_a_broken_hello_ends_its_stream_only(data: bytes) -> None:
    async with siege() as (victim, honest, connection):
        reply = await reply_to(connection, data)
        assert reply == b"" or refusal(reply)["code"] in ("misbehaviour", "unavailable")
        assert refusal(await reply_to(connection, frame(hello_of(protocol="none/1"))))["code"] == "missing"
        await still_serves(victim, honest)


async def test_random_bytes_never_break_the_node() -> None:
    rng = random.Random(5)
    async with siege() as (victim, honest, connection):
        for _ in range(60):
            noise = rng.randbytes(rng.choice((1, 5, 50, 5000)))
            start = rng.choice((b"", frame(hello_of()), frame(hello_of(protocol="echo/1"))))
            await reply_to(connection, start + noise)
        await still_serves(victim, honest)


async def test_a_request_that_is_no_request_is_answered_with_invalid() -> None:
    async with siege() as (victim, honest, connection):
        objects = (b"junk", b"[]", b'{"a": 1}', b'{"a":1,"a":2}', b"\xff\xfe", b"", b"[" * 5000)
        for request in (*map(message, objects), b"\0", b"\xff" * 4, b"\0\0\0\x09{}"):
            reply = await reply_to(connection, frame(hello_of()) + frame(request, last=True))
            assert call_error(reply)["code"] == "invalid", request
        huge = frame(hello_of()) + frame_header(1 << 30, last=True) + bytes(100_000)
        assert call_error(await reply_to(connection, huge))["code"] == "invalid"
        await still_serves(victim, honest)


async def test_a_stream_that_ends_inside_a_message_is_named() -> None:
    faults: list[TesseraError] = []

    async def listen(stream: Stream) -> None:
        try:
            while await stream.recv(10_000):
                continue
        except TesseraError as error:
            faults.append(error)

    async with siege() as (victim, _, connection):
        victim.serve("listen/1", listen)
        start = frame(hello_of(protocol="listen/1"))
        for end in (frame(b"half" * 10)[:-1], b"\0\0", bytes(4), frame(bytes(10_001)), frame(b"whole")):
            await reply_to(connection, start + end)
        assert [type(fault) for fault in faults] == [Misbehaviour] * 4 + [Unavailable]
        assert {fault.fields["evidence"]["peer"] for fault in faults[:4]} == {key(6).id}
        assert "cut the stream" in faults[4].message


async def test_an_announced_gigabyte_allocates_nothing() -> None:
    async with siege() as (victim, honest, connection):
        victim.serve("greedy/1", lambda stream: stream.recv(1 << 30))
        for _ in range(20):
            bi = await connection.open_bi()
            await bi.send().write_all(frame(hello_of(protocol="greedy/1")) + frame_header(1 << 30, last=False))
        await anyio.sleep(0.2)
        assert _resident_bytes() < 1 << 30
        await still_serves(victim, honest)


async def test_a_flood_of_links_keeps_two_of_one_peer() -> None:
    async with siege() as (victim, honest, _), endpoint(6) as again:
        for _ in range(12):
            await dial(again, victim.record())
        await anyio.sleep(0.3)
        assert sum(map(len, victim._links.values())) <= LINKS_PER_PEER
        await still_serves(victim, honest)


@pytest.mark.slow
async def test_more_streams_than_a_link_has_places_leave_the_others_alone() -> None:
    async with siege() as (victim, honest, connection):
        with anyio.move_on_after(1):
            while True:
                bi = await connection.open_bi()
                await bi.send().write_all(b"\0")  # a stream exists once a byte is sent; the hello never comes
        await still_serves(victim, honest)


async def test_another_alpn_is_turned_away() -> None:
    async with IrohTransport.start(key(1)) as victim, endpoint(6, b"other/1") as raw:
        with pytest.raises(iroh.IrohError):
            await dial(raw, victim.record(), b"other/1")


@pytest.mark.parametrize("answer_", [b"", b"{", b"[]", b'{"yes":true}', b'{"error":7}', b'{"error":{"code":"late"}}'])
async def test_a_server_that_answers_a_hello_with_rubbish_is_named(answer_: bytes) -> None:
    async with endpoint(6) as raw, IrohTransport.start(key(1)) as caller, anyio.create_task_group() as tasks:
        tasks.start_soon(_answer_streams, raw, frame(answer_, last=True))
        port = raw.bound_sockets()[0].rpartition(":")[2]
        record = PeerRecord.sign(key(6), (f"iroh:127.0.0.1:{port}",), expires=2**40)
        with pytest.raises(TesseraError) as caught:
            await caller.open(record, "x/1", timeout_s=5)
        expected = {b'{"error":7}': "error", b'{"error":{"code":"late"}}': "late"}.get(answer_, "misbehaviour")
        assert caught.value.code == expected
        tasks.cancel_scope.cancel()


async def test_a_server_that_never_answers_costs_a_deadline() -> None:
    async with endpoint(6) as raw, IrohTransport.start(key(1)) as caller, anyio.create_task_group() as tasks:
        tasks.start_soon(_answer_streams, raw, None)
        port = raw.bound_sockets()[0].rpartition(":")[2]
        record = PeerRecord.sign(key(6), (f"iroh:127.0.0.1:{port}",), expires=2**40)
        with pytest.raises(TesseraError, match=r"within 0\.5 s"):
            await call(caller, record, "x/1", {}, timeout_s=0.5, reply_limit=100)
        tasks.cancel_scope.cancel()


async def _answer_streams(raw: Any, reply: bytes | None) -> None:
    """A hostile server: it gives every stream the same reply, or none."""
    incoming = await raw.accept_next()
    connection = await (await incoming.accept()).connect()
    kept = []
    while True:
        bi = await connection.accept_bi()
        kept.append(bi)
        if reply is not None:
            await bi.send().write_all(reply)
            await bi.send().finish()


def _resident_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


# --- in virtual time ------------------------------------------------------------------------------------------------


def on_memory(body: Body) -> None:
    async def main() -> None:
        net = MemoryNetwork(random.Random(2), delay_s=0.01)
        async with net.start(key(1)) as victim, net.start(key(2)) as honest, net.start(key(6)) as attacker:
            serve_all(victim)
            await body(net, victim, honest, attacker)

    run_virtual(main)


async def raw_stream(attacker: MemoryTransport, victim: MemoryTransport) -> MemoryChannel:
    """Bytes straight into the victim, without our framing."""
    link = await attacker._link_to(victim.record())
    return await link.channel(attacker)


def test_a_slow_loris_is_cut_off_after_the_hellos_deadline() -> None:
    async def body(
        net: MemoryNetwork, victim: MemoryTransport, honest: MemoryTransport, attacker: MemoryTransport
    ) -> None:
        channels = [await raw_stream(attacker, victim) for _ in range(90)]
        started, alive = anyio.current_time(), list(channels)
        data = frame(hello_of())
        for place in range(len(data)):
            for channel in list(alive):
                try:
                    await channel.write(data[place : place + 1])
                except Unavailable:
                    alive.remove(channel)
            if not alive:
                break
            await still_serves(victim, honest)
            await anyio.sleep(1)
        assert not alive
        assert anyio.current_time() - started < HELLO_S + 3
        reply = await FramedStream(channels[0], victim.id, consented=True).recv(10_000)
        assert "no hello within" in encoding.decode(reply, 10_000)["error"]["message"]

    on_memory(body)


def test_a_caller_that_never_finishes_its_request_is_let_go() -> None:
    async def body(
        net: MemoryNetwork, victim: MemoryTransport, honest: MemoryTransport, attacker: MemoryTransport
    ) -> None:
        serve_calls(victim, "few/1", answer, request_limit=100, max_streams=2)
        for _ in range(2):
            channel = await raw_stream(attacker, victim)
            await channel.write(frame(hello("few/1", bulk=False, confirm=True)) + frame(message(b'{"a":1}'))[:-1])
        await anyio.sleep(1)
        with pytest.raises(Unavailable, match="places"):
            await call(attacker, victim.record(), "few/1", {}, timeout_s=30, reply_limit=LIMIT)
        await call(honest, victim.record(), "few/1", {}, timeout_s=1, reply_limit=LIMIT)
        await anyio.sleep(60)
        await call(attacker, victim.record(), "few/1", {}, timeout_s=1, reply_limit=LIMIT)

    on_memory(body)


def test_a_caller_that_does_not_take_its_reply_is_let_go() -> None:
    async def give(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        return {}, bytes(8 << 20)

    async def body(
        net: MemoryNetwork, victim: MemoryTransport, honest: MemoryTransport, attacker: MemoryTransport
    ) -> None:
        serve_calls(victim, "big/1", give, request_limit=100, max_streams=1)
        channel = await raw_stream(attacker, victim)
        await channel.write(frame(hello("big/1", bulk=False, confirm=False)) + frame(message(b"{}"), last=True))
        await anyio.sleep(30)
        with pytest.raises(Unavailable):
            await call(attacker, victim.record(), "big/1", {}, timeout_s=20, reply_limit=LIMIT)
        await anyio.sleep(40)
        _, got = await call(attacker, victim.record(), "big/1", {}, timeout_s=20, reply_limit=LIMIT)
        assert len(got) == 8 << 20

    on_memory(body)


def test_replies_that_are_no_replies_are_misbehaviour() -> None:
    async def body(
        net: MemoryNetwork, victim: MemoryTransport, honest: MemoryTransport, attacker: MemoryTransport
    ) -> None:
        async def reply(stream: Stream) -> None:
            await stream.recv(100)
            await stream.send(replies.pop(), last=True)

        objects = [b"junk", b"[]", b'{"reply":1}', b'{"error":{},"reply":{}}', b"{}", b'{"reply": {}}']
        replies = [b"\0", b"\xff" * 9, *map(message, objects)]
        attacker.serve("x/1", reply)
        for _ in list(replies):
            with pytest.raises(Misbehaviour) as caught:
                await call(victim, attacker.record(), "x/1", {}, timeout_s=5, reply_limit=1000)
            assert caught.value.evidence["peer"] == attacker.id

    on_memory(body)


def test_a_peers_error_cannot_pass_for_more_than_an_error() -> None:
    """Whatever fields a peer puts into an error, ours are set by us, and a class is one of our tree."""

    async def body(
        net: MemoryNetwork, victim: MemoryTransport, honest: MemoryTransport, attacker: MemoryTransport
    ) -> None:
        async def lie(stream: Stream) -> None:
            await stream.recv(100)
            fields = {"peer": honest.id, "message": "x", "self": 1, "rule": 7, "retry_after_s": 1e300}
            error = {"code": codes.pop(), "message": "m" * 9000, "fields": fields}
            await stream.send(message(encoding.encode({"error": error})), last=True)

        codes = ["refused", "unavailable", "no such code", "__init__"]
        attacker.serve("x/1", lie)
        expected: list[type[TesseraError]] = [TesseraError, TesseraError, Unavailable, Refused]
        for kind in expected:
            with pytest.raises(TesseraError) as caught:
                await call(victim, attacker.record(), "x/1", {}, timeout_s=5, reply_limit=100)
            assert type(caught.value) is kind
            assert caught.value.fields["peer"] == attacker.id
            assert len(caught.value.message) <= 2000
            assert caught.value.fields.get("retry_after_s", 1.0) == 1.0

    on_memory(body)


def test_a_reader_buffers_no_more_than_its_limit() -> None:
    """However much a peer sends, what lies in our memory is one message and a little."""

    async def body(
        net: MemoryNetwork, victim: MemoryTransport, honest: MemoryTransport, attacker: MemoryTransport
    ) -> None:
        streams: list[Stream] = []

        async def take_one(stream: Stream) -> None:
            streams.append(stream)
            await stream.recv(10_000)
            await anyio.sleep(50)

        victim.serve("one/1", take_one)
        stream = await attacker.open(victim.record(), "one/1", timeout_s=5)
        with anyio.move_on_after(20):
            for _ in range(4000):
                await stream.send(bytes(10_000))
        assert streams[0].received_bytes <= 10_000 + 3 * READ_AHEAD
        assert stream.sent_bytes < 3 << 20

    on_memory(body)


def test_our_own_mistakes_never_reach_the_wire() -> None:
    async def body(
        net: MemoryNetwork, victim: MemoryTransport, honest: MemoryTransport, attacker: MemoryTransport
    ) -> None:
        before = net.wire(honest.id, victim.id).carried_bytes
        with pytest.raises(Invalid):
            await call(honest, victim.record(), "answer/1", {"x": float("nan")}, timeout_s=5, reply_limit=100)
        with pytest.raises(Invalid):
            await call(honest, victim.record(), "ANSWER", {}, timeout_s=5, reply_limit=100)
        assert net.wire(honest.id, victim.id).carried_bytes == before

    on_memory(body)
