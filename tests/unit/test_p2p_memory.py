"""Virtual time, and the faults that the memory network can make."""

from __future__ import annotations

import random
import time
from typing import Any

import anyio
import pytest
from anyio import to_thread

from p2p_world import LIMIT, echo, key, serve_all
from tessera.core.errors import Late, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.memory import MemoryNetwork, VirtualClock, run_virtual
from tessera.p2p.transport import PeerRecord, Stream, Transport


def network(**settings: Any) -> MemoryNetwork:
    return MemoryNetwork(random.Random(1), clock=VirtualClock(), **settings)


async def ask(caller: Transport, peer: PeerRecord, body: bytes = b"", timeout_s: float = 60) -> bytes:
    _, back = await call(caller, peer, "answer/1", {}, body, timeout_s=timeout_s, reply_limit=LIMIT)
    return back


def test_an_hour_passes_in_a_moment_and_deadlines_keep_their_order() -> None:
    async def main() -> list[str]:
        order: list[str] = []

        async def after(seconds: float, name: str) -> None:
            await anyio.sleep(seconds)
            order.append(name)

        with anyio.move_on_after(3600):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(after, 1800, "half")
                tasks.start_soon(after, 0.001, "soon")
                tasks.start_soon(after, 7200, "never")
        order.append("timeout")
        assert anyio.current_time() == pytest.approx(3600)
        return order

    started = time.perf_counter()
    assert run_virtual(main) == ["soon", "half", "timeout"]
    assert time.perf_counter() - started < 5


def test_the_clock_stands_still_while_a_thread_works() -> None:
    async def main() -> None:
        with anyio.fail_after(0.001):
            await to_thread.run_sync(time.sleep, 0.2)

    run_virtual(main)


def test_a_deadlock_is_reported() -> None:
    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtual(anyio.sleep_forever)


def test_the_virtual_clock_follows_the_loop() -> None:
    async def main() -> float:
        clock = VirtualClock()
        before = clock.time()
        await anyio.sleep(86_400)
        return clock.time() - before

    assert run_virtual(main) == pytest.approx(86_400)


def test_delay_and_rate_set_how_long_a_transfer_takes() -> None:
    async def main() -> float:
        net = network(delay_s=0.025, rate_bytes_per_s=10e6)
        async with net.start(key(1)) as caller, net.start(key(2)) as server:
            serve_all(server)
            await ask(caller, server.record())
            started = anyio.current_time()
            await ask(caller, server.record(), bytes(1_000_000))
            return anyio.current_time() - started

    assert run_virtual(main) == pytest.approx(0.05 + 2 * 0.1, rel=0.02)  # there and back again


def test_all_that_a_peer_sends_shares_its_uplink() -> None:
    async def main() -> float:
        net = network(delay_s=0.01)
        async with net.start(key(1)) as busy, net.start(key(2)) as b, net.start(key(3)) as c:
            serve_all(b)
            serve_all(c)
            for server in (b, c):
                await ask(busy, server.record())
            net.uplink(busy.id, 1e6)
            started = anyio.current_time()
            async with anyio.create_task_group() as tasks:
                for server in (b, c):
                    tasks.start_soon(ask, busy, server.record(), bytes(500_000))
            return anyio.current_time() - started

    assert run_virtual(main) == pytest.approx(1.02, rel=0.01)  # 1 MB out at 1 MB/s; the way back is free


def test_loss_costs_time_and_no_bytes() -> None:
    async def transfer(loss: float) -> float:
        net = network(delay_s=0.01, loss=loss)
        async with net.start(key(1)) as caller, net.start(key(2)) as server:
            serve_all(server)
            message = random.Random(5).randbytes(900_000)
            started = anyio.current_time()
            assert await ask(caller, server.record(), message) == message
            return anyio.current_time() - started

    assert run_virtual(transfer, 0.3) > run_virtual(transfer, 0.0) + 0.2


def test_a_short_partition_delays_and_a_long_one_breaks_the_link() -> None:
    async def main() -> None:
        net = network(delay_s=0.01)
        async with net.start(key(1)) as a, net.start(key(2)) as b:
            serve_all(b)
            stream = await a.open(b.record(), "echo/1", timeout_s=5)
            net.partition(a.id, b.id)
            await stream.send(b"held")
            await anyio.sleep(2)
            net.heal(a.id, b.id)
            with anyio.fail_after(0.1):
                assert await stream.recv(LIMIT) == b"held"
            net.partition(a.id, b.id)
            cut = anyio.current_time()
            with pytest.raises(Unavailable, match="silent"):
                await stream.recv(LIMIT)
            assert anyio.current_time() - cut == pytest.approx(3, abs=0.6)
            with pytest.raises(Unavailable, match="does not answer"):
                await ask(a, b.record())
            net.heal(a.id, b.id)
            assert await ask(a, b.record(), b"back") == b"back"

    run_virtual(main)


def test_a_corrupted_stream_ends_in_a_named_error_and_the_link_survives() -> None:
    async def main() -> set[str]:
        net = network()
        codes: set[str] = set()
        async with net.start(key(1)) as a, net.start(key(2)) as b:
            serve_all(b)
            await ask(a, b.record())
            net.corrupt(a.id, b.id, 0.4)
            for _ in range(150):
                try:
                    await ask(a, b.record(), b"body" * 20, timeout_s=20)
                    codes.add("none")  # a byte of the body was hit
                except TesseraError as error:
                    codes.add(error.code)
            net.corrupt(a.id, b.id, 0.0)
            assert await ask(a, b.record(), b"fine") == b"fine"
        return codes

    codes = run_virtual(main)
    assert "error" not in codes, "a bug of ours, not a fault of the peer"
    assert codes >= {"none", "misbehaviour", "invalid"}


def test_a_slow_reader_slows_its_sender_and_nobody_else() -> None:
    async def main() -> None:
        net = network()
        async with net.start(key(1)) as a, net.start(key(2)) as slow, net.start(key(3)) as c:
            serve_all(c)
            slow.serve("echo/1", echo)
            stream = await a.open(slow.record(), "echo/1", timeout_s=5)
            net.slow(slow.id, 10_000)
            with anyio.move_on_after(30) as scope:
                await stream.send(bytes(8 << 20))
            assert scope.cancelled_caught
            assert stream.sent_bytes < 3 << 20
            assert await ask(a, c.record(), b"fine", timeout_s=1) == b"fine"

    run_virtual(main)


def test_the_dead_say_nothing_and_can_do_nothing() -> None:
    async def main() -> None:
        net = network(delay_s=0.01)
        async with net.start(key(1)) as a, net.start(key(2)) as b:
            serve_all(a)
            serve_all(b)
            theirs = await b.open(a.record(), "echo/1", timeout_s=5)
            net.kill(b.id)
            with pytest.raises(Unavailable):
                await theirs.send(b"from beyond")
            with pytest.raises(Unavailable):
                await b.open(a.record(), "echo/1", timeout_s=5)
            await anyio.sleep(2)
            states = a.watch(b.id)
            assert await anext(states) == "up"
            with anyio.fail_after(2):
                assert await anext(states) == "down"

    run_virtual(main)


@pytest.mark.slow
def test_half_a_day_of_forty_peers_that_come_and_go_is_simulated_at_once() -> None:
    """Everybody keeps asking somebody; peers die and return; whoever is up is answered."""
    rng = random.Random(11)
    outcome = {"answered": 0, "unavailable": 0}

    async def life(net: MemoryNetwork, number: int, records: dict[PeerId, PeerRecord]) -> None:
        while True:
            async with net.start(key(number)) as me:
                serve_calls(me, "answer/1", answer, request_limit=1000)
                records[me.id] = me.record()
                with anyio.move_on_after(rng.uniform(1, 5) * 3600):
                    while True:
                        await anyio.sleep(rng.uniform(400, 1200))
                        await ask_somebody(me, records)
                records.pop(me.id)
                if rng.random() < 0.5:
                    net.kill(me.id)
            await anyio.sleep(rng.uniform(60, 1800))

    async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        return {}, body

    async def ask_somebody(me: Transport, records: dict[PeerId, PeerRecord]) -> None:
        others = [record for peer, record in records.items() if peer != me.id]
        try:
            assert await ask(me, rng.choice(others), b"news" * 50, timeout_s=30) == b"news" * 50
            outcome["answered"] += 1
        except (Unavailable, Late):
            outcome["unavailable"] += 1

    async def main() -> None:
        net = network(delay_s=0.03, rate_bytes_per_s=5e6, loss=0.01)
        records: dict[PeerId, PeerRecord] = {}
        with anyio.move_on_after(12 * 3600):
            async with anyio.create_task_group() as tasks:
                for number in range(1, 41):
                    tasks.start_soon(life, net, number, records)

    started = time.perf_counter()
    run_virtual(main)
    assert outcome["answered"] > 1500
    assert outcome["unavailable"] < outcome["answered"] / 50
    assert time.perf_counter() - started < 60


def test_a_stream_waits_for_a_place_on_its_link() -> None:
    async def hold(stream: Stream) -> None:
        await stream.recv(10)

    async def main() -> None:
        net = network()
        async with net.start(key(1)) as a, net.start(key(2)) as b:
            b.serve("hold/1", hold, max_streams=500)
            held = [await a.open(b.record(), "hold/1", timeout_s=5) for _ in range(100)]
            with pytest.raises(Late):
                await a.open(b.record(), "hold/1", timeout_s=1)
            await held[0].send(b"", last=True)
            assert await held[0].recv(10) == b""
            await a.open(b.record(), "hold/1", timeout_s=1)

    run_virtual(main)
