"""What only the zmq adapter has to get right."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import nacl.bindings
import pytest

from p2p_world import LIMIT, ZmqWorld, key, serve_all
from tessera.core.errors import Invalid, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p import zmq_link
from tessera.p2p.calls import call
from tessera.p2p.memory import run_virtual
from tessera.p2p.pacer import Pacer
from tessera.p2p.transport import PeerRecord, Stream
from tessera.p2p.zmq_address import is_socket, parse_bind, reachable
from tessera.p2p.zmq_channel import BULK_WINDOW, WINDOW, ZmqChannel
from tessera.p2p.zmq_keys import CurveKeys
from tessera.p2p.zmq_link import STREAMS_PER_END, ZmqLink
from tessera.p2p.zmq_transport import ZmqTransport

pytestmark = pytest.mark.anyio


async def ask(caller: ZmqTransport, peer: PeerRecord, body: bytes = b"") -> bytes:
    _, back = await call(caller, peer, "answer/1", {}, body, timeout_s=10, reply_limit=LIMIT)
    return back


def test_the_curve_keys_belong_together() -> None:
    for number in range(1, 20):
        keys = CurveKeys.of(key(number))
        assert nacl.bindings.crypto_scalarmult_base(keys.secret) == keys.public
        assert keys.secret.hex() not in repr(keys)


@pytest.mark.parametrize(
    "bad", ["", "1.2.3.4", "1.2.3.4:", "1.2.3.4:70000", "host:1", "::1:5", "[1.2.3.4]:5", "[::1", "[::1%1]:5"]
)  # fmt: skip
def test_what_is_no_address_is_neither_dialled_nor_bound(bad: str) -> None:
    assert not is_socket(bad)
    with pytest.raises(Invalid, match="cannot listen"):
        parse_bind(bad)


def test_addresses_name_every_interface_where_a_node_listens_everywhere() -> None:
    assert is_socket("[2001:db8::7]:4433")
    assert not is_socket("127.0.0.1:0")
    assert parse_bind("127.0.0.1:0") == "127.0.0.1:0"
    assert reachable("203.0.113.7:4433") == ["203.0.113.7:4433"]
    everywhere = reachable("0.0.0.0:4433")
    assert everywhere[0] == "127.0.0.1:4433"
    assert all(map(is_socket, [*everywhere, *reachable("[::]:4433")]))


async def test_listening_everywhere_names_addresses_that_can_be_dialled() -> None:
    async with ZmqTransport.start(key(1), bind="0.0.0.0:0") as server, ZmqTransport.start(key(2)) as caller:
        serve_all(server)
        mixed = ("zmq:example.com:1", "zmq:127.0.0.1:1", *server.record().addrs)
        assert await ask(caller, PeerRecord.sign(key(1), mixed[:16], expires=2**40), b"fine") == b"fine"


async def test_a_port_in_use_is_named() -> None:
    async with ZmqTransport.start(key(1)) as first:
        bind = first.record().rests("zmq")[0]
        with pytest.raises(Unavailable, match=bind):
            async with ZmqTransport.start(key(2), bind=bind):
                pass


async def test_an_address_that_nobody_listens_at_fails_at_once() -> None:
    async with ZmqTransport.start(key(2)) as caller:
        with anyio.fail_after(1), pytest.raises(Unavailable, match="nothing listens there"):
            await caller.open(PeerRecord.sign(key(1), ("zmq:127.0.0.1:1",), expires=0), "echo/1", timeout_s=5)


@pytest.mark.slow
async def test_a_peer_whose_python_is_busy_is_not_taken_for_dead() -> None:
    """The engine's thread answers for it; only deadlines end a wait for it."""
    async with ZmqTransport.start(key(1)) as caller, ZmqWorld().doomed(key(2)) as doomed:
        stream = await caller.open(doomed.record, "echo/1", timeout_s=10)
        await call(caller, doomed.record, "block/1", {"seconds": 4.0}, timeout_s=20, reply_limit=LIMIT)
        await stream.send(b"still there")
        assert await stream.recv(LIMIT) == b"still there"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
async def test_a_frozen_peer_is_taken_for_dead() -> None:
    async with ZmqTransport.start(key(1)) as node, ZmqWorld().doomed(key(2)) as dialled:
        stream = await node.open(dialled.record, "echo/1", timeout_s=10)
        os.kill(dialled.pid, signal.SIGSTOP)
        try:
            started = anyio.current_time()
            with pytest.raises(Unavailable):
                await stream.recv(LIMIT)
            assert 1.5 < anyio.current_time() - started < 3.5
            async for state in node.watch(key(2).id):
                if state == "down":
                    break
        finally:
            os.kill(dialled.pid, signal.SIGCONT)


async def test_a_killed_caller_is_noticed_by_whom_it_called() -> None:
    seen: list[float] = []

    async def wait(stream: Stream) -> None:
        await stream.send(b"hello")
        try:
            await stream.recv(LIMIT)
        except Unavailable:
            seen.append(anyio.current_time())

    async with ZmqTransport.start(key(1)) as server:
        server.serve("wait/1", wait)
        script = (
            "import sys, anyio; sys.path.insert(0, sys.argv[1])\n"
            "from p2p_world import *\n"
            "async def main():\n"
            "    async with ZmqTransport.start(key(2)) as caller:\n"
            "        stream = await caller.open(PeerRecord.from_text(sys.argv[2]), 'wait/1', timeout_s=10)\n"
            "        await stream.recv(9); print('READY', flush=True); await anyio.sleep_forever()\n"
            "anyio.run(main)\n"
        )
        here = os.path.dirname(os.path.dirname(__file__))
        command = [sys.executable, "-c", script, here, server.record().to_text()]
        async with await anyio.open_process(command, stderr=None) as caller:
            assert caller.stdout is not None
            with anyio.fail_after(30):
                while b"READY" not in await caller.stdout.receive():
                    pass
            killed = anyio.current_time()
            caller.kill()
            with anyio.fail_after(5):
                while not seen:
                    await anyio.sleep(0.01)
        assert seen[0] - killed < 3.5
        assert not server._links


async def test_a_closed_transport_leaves_no_task_and_no_socket_behind() -> None:
    tasks = asyncio.all_tasks()
    async with ZmqTransport.start(key(1)) as server, ZmqTransport.start(key(2)) as caller:
        serve_all(server)
        for _ in range(5):
            await caller.open(server.record(), "echo/1", timeout_s=5)
        elsewhere = PeerRecord.sign(key(3), server.record().addrs, expires=0)
        for steps in range(4):  # dials that are cancelled on their way
            async with anyio.create_task_group() as dials:
                dials.start_soon(lambda: caller.open(elsewhere, "echo/1", timeout_s=5))
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                dials.cancel_scope.cancel()
        engines = [caller._context, server._context]
    await anyio.lowlevel.checkpoint()
    assert asyncio.all_tasks() - tasks == set()
    assert all(engine.closed for engine in engines)


async def test_the_pacer_hears_what_peers_took() -> None:
    async def swallow(stream: Stream) -> None:
        while await stream.recv(LIMIT):
            pass

    pacer = Pacer(8_000_000)
    async with ZmqTransport.start(key(1)) as server, ZmqTransport.start(key(2), pacer=pacer) as caller:
        server.serve("swallow/1", swallow)
        stream = await caller.open(server.record(), "swallow/1", timeout_s=5, bulk=True)
        started = anyio.current_time()
        await stream.send(bytes(3_200_000), last=True)
        assert anyio.current_time() - started > 0.45, "at 6.4 MB/s"
        await anyio.sleep(0.1)
        assert caller._links[server.id][0].acknowledged_bytes == stream.sent_bytes


# --- two links back to back, in virtual time ------------------------------------------------------------------------


class Pipe:
    """An `Outlet` that carries `capacity` messages at a time, when it is told to."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.queue: deque[bytes] = deque()
        self.capacity, self.gone, self.was_cut = capacity, False, False

    def send(self, message: bytes) -> bool:
        if self.gone:
            raise Unavailable("the connection is gone")
        if len(self.queue) >= self.capacity:
            return False
        self.queue.append(message)
        return True

    def cut(self) -> None:
        self.was_cut = True


class Couple:
    """Two ends of a link, and what lies between them."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.out, self.back = Pipe(capacity), Pipe(capacity)
        self.accepted: list[ZmqChannel] = []
        record = PeerRecord.sign(key(2), ("zmq:127.0.0.1:1",), expires=0)
        self.a = ZmqLink(key(2).id, self.out, self._accept, dialled=record)
        self.b = ZmqLink(key(1).id, self.back, self._accept)

    def _accept(self, channel: ZmqChannel, peer: PeerId) -> None:
        self.accepted.append(channel)

    async def carry(self) -> None:
        while True:
            await anyio.sleep(0.001)
            for pipe, link in ((self.out, self.b), (self.back, self.a)):
                for _ in range(len(pipe.queue)):
                    link.receive(pipe.queue.popleft())


def with_couple(body: Callable[[Couple], Awaitable[None]], capacity: int = 1 << 30) -> None:
    async def main() -> None:
        couple = Couple(capacity)
        async with anyio.create_task_group() as tasks:
            for task in (couple.a.run, couple.b.run, couple.carry):
                tasks.start_soon(task)
            await body(couple)
            tasks.cancel_scope.cancel()

    run_virtual(main)


async def opened(couple: Couple) -> tuple[Any, ZmqChannel]:
    """A stream of `a`'s, raw at both ends."""
    before = len(couple.accepted)
    stream: Any = await couple.a.open("x/1", bulk=False, confirm=False)
    await stream._channel.write(b"first")
    with anyio.fail_after(5):
        while len(couple.accepted) == before:
            await anyio.sleep(0.001)
    channel = couple.accepted[-1]
    assert await channel.read(5) == b"first"
    return stream._channel, channel


def test_a_reader_that_waits_bounds_what_is_under_way() -> None:
    async def body(couple: Couple) -> None:
        ours, theirs = await opened(couple)
        with anyio.move_on_after(60) as scope:
            await ours.write(bytes(2 * WINDOW))
        assert scope.cancelled_caught
        assert len(theirs._buffer) + 5 == WINDOW
        got = 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ours.write, bytes(WINDOW))
            while got < 2 * WINDOW - 5:
                got += len(await theirs.read(FAR))
        assert couple.a.alive

    with_couple(body)


FAR = 1 << 22


def test_bulk_keeps_half_a_window_under_way() -> None:
    async def body(couple: Couple) -> None:
        ours, theirs = await opened(couple)
        await ours.give_way()
        with anyio.move_on_after(60):
            await ours.write(bytes(3 * WINDOW))
        assert len(theirs._buffer) + 5 == BULK_WINDOW == WINDOW // 2

    with_couple(body)


def test_places_come_back_however_streams_end() -> None:
    async def body(couple: Couple) -> None:
        for number in range(4 * STREAMS_PER_END):
            ours, theirs = await opened(couple)
            if number % 4 == 0:  # in good order
                await ours.finish()
                await theirs.finish()
            elif number % 4 == 1:  # the opener drops it
                await ours.reset(0)
                await ours.stop(0)
            elif number % 4 == 2:  # the other end drops it
                await theirs.reset(0)
                await theirs.stop(0)
            else:  # both at once
                await ours.reset(0)
                await theirs.stop(0)
                await ours.stop(0)
        await anyio.sleep(0.1)
        assert couple.a.alive
        assert (len(couple.a._channels), len(couple.b._channels), couple.b._their_streams) == (0, 0, 0)
        unheard: Any = await couple.a.open("x/1", bulk=False, confirm=False)
        await unheard.abort()  # the peer has never heard of this one
        assert not couple.a._channels

    with_couple(body)


def test_a_hundred_streams_at_once_and_the_next_waits_for_a_place() -> None:
    async def body(couple: Couple) -> None:
        streams = [await opened(couple) for _ in range(STREAMS_PER_END)]
        with anyio.move_on_after(5) as scope:
            await couple.a.open("x/1", bulk=False, confirm=False)
        assert scope.cancelled_caught
        ours, theirs = streams[7]
        await ours.finish()
        await theirs.finish()
        await opened(couple)
        assert couple.a.alive

    with_couple(body)


def test_whoever_waits_for_a_place_hears_that_the_link_is_over() -> None:
    async def body(couple: Couple) -> None:
        for _ in range(STREAMS_PER_END):
            await opened(couple)
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises(Unavailable, match="bored"):
                    await couple.a.open("x/1", bulk=False, confirm=False)

            tasks.start_soon(wait)
            await anyio.sleep(1)
            couple.a.end("bored")

    with_couple(body)


def test_a_full_queue_delays_and_loses_nothing() -> None:
    async def body(couple: Couple) -> None:
        ours, theirs = await opened(couple)
        data = os.urandom(WINDOW // 2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ours.write, data)
            got = b""
            while len(got) < len(data):
                got += await theirs.read(FAR)
        assert got == data

    with_couple(body, capacity=1)


def test_a_queue_that_never_empties_ends_the_link() -> None:
    async def body(couple: Couple) -> None:
        ours, _ = await opened(couple)
        couple.out.capacity = 0
        started = anyio.current_time()
        await ours.write(b"x")  # waits with us
        with pytest.raises(Unavailable, match="does not take"):
            await ours.write(b"y")
        assert anyio.current_time() - started == pytest.approx(zmq_link.STUCK_S, abs=0.2)
        assert couple.out.was_cut

    with_couple(body)


def test_a_beat_finds_out_that_the_connection_is_gone() -> None:
    async def body(couple: Couple) -> None:
        ours, _ = await opened(couple)
        couple.out.gone = True
        started = anyio.current_time()
        with pytest.raises(Unavailable, match="gone"):
            await ours.read(1)
        assert anyio.current_time() - started <= zmq_link.BEAT_S

    with_couple(body)


def test_a_goodbye_waits_until_the_peer_has_heard_everything() -> None:
    async def body(couple: Couple) -> None:
        ours, theirs = await opened(couple)
        await ours.write(bytes(WINDOW // 2))
        await ours.finish()
        await couple.a.leave()
        assert not couple.b.alive
        got = 0
        while data := await theirs.read(FAR):
            got += len(data)
        assert got == WINDOW // 2
        with pytest.raises(Unavailable, match="goodbye"):
            await theirs.write(b"too late")

    with_couple(body)
