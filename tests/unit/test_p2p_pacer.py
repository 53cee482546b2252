"""What the pacer promises, to the byte and the millisecond of virtual time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from p2p_world import key, serve_all
from tessera.core.errors import Invalid
from tessera.p2p.calls import call
from tessera.p2p.iroh_meter import IrohMeter
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, run_virtual
from tessera.p2p.pacer import BULK_PIECE, Pacer
from tessera.p2p.transport import PeerRecord, Stream
from tessera.p2p.uplink import CRUISE, TICK_S, UplinkEstimate

MB = 1_000_000
LINK = 10.0 * MB  # 80 Mb/s
THEM = key(2).id


async def send(pacer: Pacer, pieces: int, size: int, *, bulk: bool, log: list[float] | None = None) -> None:
    for _ in range(pieces):
        async with pacer.sending(size, THEM, bulk=bulk):
            if log is not None:
                log.append(anyio.current_time())


def timed(body: Callable[[], Awaitable[None]]) -> float:
    async def main() -> float:
        started = anyio.current_time()
        await body()
        return anyio.current_time() - started

    return run_virtual(main)


def test_a_cap_bounds_everything_and_bulk_to_four_fifths_of_it() -> None:
    pacer = Pacer(1.0 * MB)
    assert pacer.piece_bytes(1 << 20, bulk=False) == 10_000
    assert pacer.piece_bytes(1 << 20, bulk=True) == 8_000
    assert timed(lambda: send(pacer, 101, 10_000, bulk=False)) == pytest.approx(1.0)
    assert timed(lambda: send(Pacer(1.0 * MB), 101, 8_000, bulk=True)) == pytest.approx(1.0)
    assert (pacer.uplink_bytes_per_s, pacer.bulk_bytes_per_s()) == (1.0 * MB, CRUISE * MB)


def test_no_window_of_any_length_holds_more_than_the_cap_allows() -> None:
    sent: list[tuple[float, int]] = []
    rng = random.Random(3)

    async def chat(pacer: Pacer, bulk: bool) -> None:
        for _ in range(150):
            size = rng.randrange(1, pacer.piece_bytes(1 << 20, bulk=bulk) + 1)
            async with pacer.sending(size, THEM, bulk=bulk):
                sent.append((anyio.current_time(), size))
            if rng.random() < 0.1:
                await anyio.sleep(rng.random() / 10)

    async def main() -> None:
        pacer = Pacer(2.0 * MB)
        async with anyio.create_task_group() as tasks:
            for bulk in (True, True, False, False, False):
                tasks.start_soon(chat, pacer, bulk)

    run_virtual(main)
    for first in range(0, len(sent), 7):
        total, start = 0, sent[first][0]
        for at, size in sent[first:]:
            total += size
            assert total <= 2.0 * MB * (at - start) + 20_000 + 1


def test_without_a_cap_and_before_anything_is_measured_nothing_waits() -> None:
    pacer = Pacer()
    assert timed(lambda: send(pacer, 1000, 64 * 1024, bulk=True)) == 0
    assert timed(lambda: send(pacer, 1000, 64 * 1024, bulk=False)) == 0
    assert (pacer.uplink_bytes_per_s, pacer.bulk_bytes_per_s()) == (None, None)
    assert pacer.piece_bytes(1 << 20, bulk=True) == BULK_PIECE


@pytest.mark.parametrize("uplink", [0.0, -1.0, 999.0, math.inf, math.nan])
def test_an_uplink_that_is_none_is_refused(uplink: float) -> None:
    with pytest.raises(Invalid, match="bytes per second"):
        Pacer(uplink)


def test_bulk_streams_share_evenly_however_many_come_and_whenever() -> None:
    counts = [0, 0, 0, 0]

    async def main() -> None:
        pacer = Pacer(1.0 * MB)

        async def stream(number: int, start_s: float) -> None:
            await anyio.sleep(start_s)
            while True:
                async with pacer.sending(8_000, THEM, bulk=True):
                    counts[number] += 1

        with anyio.move_on_after(2.0001):
            async with anyio.create_task_group() as tasks:
                for number in range(3):
                    tasks.start_soon(stream, number, 0)
                tasks.start_soon(stream, 3, 1)

    run_virtual(main)
    assert sum(counts) == 201, "100 pieces each second, and one that was saved up"
    assert max(counts[:3]) - min(counts[:3]) <= 1
    assert counts[3] == 25


def test_a_small_message_waits_for_one_piece_of_bulk_at_most() -> None:
    waits: list[float] = []

    async def main() -> None:
        pacer = Pacer(1.0 * MB)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(send, pacer, 10_000, 8_000)
            rng = random.Random(1)
            for _ in range(200):
                await anyio.sleep(0.02 * rng.random())
                started = anyio.current_time()
                async with pacer.sending(1_000, THEM, bulk=False):
                    waits.append(anyio.current_time() - started)
            tasks.cancel_scope.cancel()

    async def send(pacer: Pacer, pieces: int, size: int) -> None:
        for _ in range(pieces):
            async with pacer.sending(size, THEM, bulk=True):
                pass

    run_virtual(main)
    assert max(waits) <= 0.008 + 0.001 + 1e-6
    assert max(waits) > 0, "they share one wire"


def test_bulk_does_not_starve_behind_small_messages_that_fill_the_cap() -> None:
    bulk: list[float] = []

    async def main() -> None:
        pacer = Pacer(1.0 * MB)
        with anyio.move_on_after(1):
            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(lambda: send(pacer, 10_000, 8_000, bulk=False))
                tasks.start_soon(lambda: send(pacer, 10_000, 8_000, bulk=True, log=bulk))

    run_virtual(main)
    assert 20 <= len(bulk) <= 26, "about one turn in five of 125"


def test_whoever_stops_waiting_has_used_nothing_and_holds_up_nobody() -> None:
    async def main() -> None:
        pacer = Pacer(1.0 * MB)
        await send(pacer, 1, 8_000, bulk=True)
        async with anyio.create_task_group() as tasks:
            for _ in range(50):

                async def give_up() -> None:
                    with anyio.move_on_after(0.005):
                        await send(pacer, 1, 8_000, bulk=True)

                tasks.start_soon(give_up)
            await anyio.sleep(0.0051)
        assert anyio.current_time() == pytest.approx(0.0051)
        await send(pacer, 1, 8_000, bulk=True)
        assert anyio.current_time() == pytest.approx(0.01)

    run_virtual(main)


# --- on a link of 80 Mb/s and 50 ms ---------------------------------------------------------------------------------


async def swallow(stream: Stream) -> None:
    while await stream.recv(1 << 23):
        pass


class Shop:
    """A node that uploads to one peer, and calls it while it does."""

    def __init__(self, network: MemoryNetwork, uploader: MemoryTransport, peer: MemoryTransport) -> None:
        self.network, self.uploader, self.peer = network, uploader, peer

    async def upload(self, to: PeerRecord | None = None) -> None:
        stream = await self.uploader.open(to or self.peer.record(), "swallow/1", timeout_s=5, bulk=True)
        while True:
            await stream.send(bytes(1 << 20))

    async def round_trips(self, count: int, every_s: float = 0.1) -> list[float]:
        took: list[float] = []
        for _ in range(count):
            started = anyio.current_time()
            await call(self.uploader, self.peer.record(), "answer/1", {}, bytes(1024), timeout_s=30, reply_limit=4096)
            took.append(anyio.current_time() - started)
            await anyio.sleep(every_s)
        return took

    def carried(self) -> int:
        return self.network.wire(self.uploader.id, self.peer.id).carried_bytes


def in_shop(pacer: Pacer | None, body: Callable[[Shop], Awaitable[None]], rate: float = LINK) -> None:
    async def main() -> None:
        net = MemoryNetwork(random.Random(1), delay_s=0.025, rate_bytes_per_s=rate)
        async with net.start(key(1), pacer=pacer) as uploader, net.start(key(2)) as peer:
            serve_all(peer)
            peer.serve("swallow/1", swallow)
            await body(Shop(net, uploader, peer))

    run_virtual(main)


def under_two_uploads(pacer: Pacer | None, warm_s: float = 0.0) -> tuple[list[float], float]:
    """The round trips of 1 KiB calls, and the rate of everything, during 5 s."""
    result: list[tuple[list[float], float]] = []

    async def body(shop: Shop) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shop.upload)
            tasks.start_soon(shop.upload)
            await anyio.sleep(1 + warm_s)
            before, started = shop.carried(), anyio.current_time()
            trips = await shop.round_trips(50)
            rate = (shop.carried() - before) / (anyio.current_time() - started)
            result.append((trips, rate))
            tasks.cancel_scope.cancel()

    in_shop(pacer, body)
    return result[0]


@pytest.mark.slow
def test_small_messages_do_not_wait_behind_two_uploads() -> None:
    without, full = under_two_uploads(None)
    capped, cap_rate = under_two_uploads(Pacer(LINK))
    measured, measured_rate = under_two_uploads(Pacer(), warm_s=4)
    assert statistics.median(without) > 0.2
    assert statistics.median(capped) < 0.06
    assert max(capped) < 0.08
    assert statistics.median(measured) < 0.06
    assert max(measured) < 0.25, "a probe's queue"
    assert full == pytest.approx(LINK, rel=0.02)
    assert cap_rate == pytest.approx(CRUISE * LINK, rel=0.02)
    assert measured_rate == pytest.approx(CRUISE * LINK, rel=0.06)


def test_a_frames_stream_keeps_to_the_cap_as_well() -> None:
    async def body(shop: Shop) -> None:
        stream = await shop.uploader.open(shop.peer.record(), "swallow/1", timeout_s=5)
        before, started = shop.carried(), anyio.current_time()
        await stream.send(bytes(2 * MB))
        assert anyio.current_time() - started == pytest.approx(1.0, abs=0.02)
        assert shop.carried() - before == 2 * MB + 4

    in_shop(Pacer(2.0 * MB), body)


def test_what_a_handler_sends_in_bulk_is_paced_too() -> None:
    async def give(stream: Stream) -> None:
        await stream.send(bytes(4 * MB), last=True)

    async def main() -> None:
        net = MemoryNetwork(random.Random(1), delay_s=0.001)
        async with net.start(key(1), pacer=Pacer(5.0 * MB)) as giver, net.start(key(2)) as taker:
            giver.serve("give/1", give)
            for bulk, seconds in ((True, 1.0), (False, 0.8)):
                started = anyio.current_time()
                stream = await taker.open(giver.record(), "give/1", timeout_s=5, bulk=bulk)
                await stream.recv(1 << 23)
                assert anyio.current_time() - started == pytest.approx(seconds, abs=0.03)

    run_virtual(main)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_the_uplink_is_measured_and_followed_up_and_down() -> None:
    pacer = Pacer()
    found: list[float] = []

    async def body(shop: Shop) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shop.upload)
            for rate in (2.0 * MB, 0.5 * MB, 6.0 * MB):
                shop.network.shape(shop.uploader.id, shop.peer.id, delay_s=0.025, rate_bytes_per_s=rate)
                await anyio.sleep(25)
                found.append((pacer.uplink_bytes_per_s or 0) / rate)
            tasks.cancel_scope.cancel()

    in_shop(pacer, body)
    assert found == pytest.approx([1, 1, 1], rel=0.1)


def test_a_peer_that_reads_slowly_does_not_slow_the_others_for_long() -> None:
    pacer = Pacer()

    async def body(shop: Shop) -> None:
        async with shop.network.start(key(3)) as slow, anyio.create_task_group() as tasks:
            slow.serve("swallow/1", swallow)
            shop.network.slow(slow.id, 0.1 * MB)
            tasks.start_soon(shop.upload, slow.record())
            await anyio.sleep(20)
            assert (pacer.uplink_bytes_per_s or 0) < 0.5 * MB, "nothing else was seen of the uplink"
            tasks.start_soon(shop.upload)
            await anyio.sleep(20)
            before = shop.carried()
            await anyio.sleep(5)
            assert shop.carried() - before > 0.7 * 5 * LINK
            tasks.cancel_scope.cancel()

    in_shop(pacer, body)


@pytest.mark.slow
def test_a_pause_in_the_uploads_changes_nothing() -> None:
    pacer = Pacer()

    async def body(shop: Shop) -> None:
        for _ in range(3):
            with anyio.move_on_after(8):
                await shop.upload()
            await anyio.sleep(3600)
            assert pacer.uplink_bytes_per_s == pytest.approx(LINK, rel=0.1)

    in_shop(pacer, body)


def test_the_estimate_hears_only_ticks_that_say_something() -> None:
    estimate = UplinkEstimate()
    estimate.tick(100, TICK_S, 0.5 * TICK_S)
    assert estimate.limit is None, "bulk was not busy"
    for acknowledged in (200, 400, 450):
        estimate.tick(acknowledged, TICK_S, TICK_S)
    assert estimate.bytes_per_s == pytest.approx(450 / TICK_S)
    estimate.tick(1, TICK_S, 0)
    for _ in range(50):
        estimate.tick(1, 100.0, 0)
    assert estimate.bytes_per_s == pytest.approx(450 / TICK_S), "idle ticks say nothing"
    before = estimate.limit
    assert before is not None
    estimate.tick(before * TICK_S, TICK_S, 0, clear=True)
    assert estimate.bytes_per_s == pytest.approx(450 / TICK_S), "the limit is below the estimate"
    estimate.tick(0, TICK_S, TICK_S)
    assert estimate.bytes_per_s == pytest.approx(450 / TICK_S), "a peer that fell silent says nothing of the uplink"


def test_what_is_acknowledged_was_sent_one_round_trip_ago() -> None:
    """An uplink of 1 MB/s with a queue before it: the queue takes what is sent too fast, and the round trip grows."""

    class Connection:
        sent, lost, trip_ms = 0, 0, 100

        def stats(self) -> Any:
            return SimpleNamespace(udp_tx_bytes=self.sent, lost_bytes=self.lost)

        def rtt(self) -> int:
            return self.trip_ms

    async def main() -> None:
        connection = Connection()
        meter = IrohMeter(connection)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(meter.run)
            for _ in range(200):  # 2 s at the uplink's rate
                await anyio.sleep(0.01)
                connection.sent += 10_000
            assert meter() == pytest.approx(1_900_000, abs=15_000)
            for step in range(100):  # 1 s at twice that: the queue grows by as much
                await anyio.sleep(0.01)
                connection.sent += 20_000
                connection.trip_ms = max(100, 50 + 5 * step)  # of what arrives now, which half the queue was before
            assert meter() == pytest.approx(2_900_000, abs=60_000)
            connection.lost += 1_000_000
            before = meter()
            connection.trip_ms = 10_000
            assert meter() == before, "it never falls"
            tasks.cancel_scope.cancel()

    run_virtual(main)


def test_a_link_whose_path_is_gone_is_measured_as_before() -> None:
    """The engine knows no round trip before the first path is chosen, and none once the link is over."""

    class Connection:
        round_trip_ms: int | None = None

        def stats(self) -> Any:
            return SimpleNamespace(udp_tx_bytes=5_000, lost_bytes=0)

        def rtt(self) -> int | None:
            return self.round_trip_ms

    async def main() -> None:
        connection = Connection()
        meter = IrohMeter(connection)
        assert meter() == 0
        connection.round_trip_ms = 10
        assert meter() == 5_000
        connection.round_trip_ms = None
        assert meter() == 5_000

    run_virtual(main)


def test_links_that_come_and_go_without_bulk_leave_nothing_behind() -> None:
    async def main() -> None:
        pacer = Pacer()
        for number in range(100):
            end = pacer.add_meter(key(number).id, lambda: 0)
            async with pacer.sending(10, key(number).id, bulk=False):
                pass
            end()
        assert not pacer._meters
        assert not pacer._sent

    run_virtual(main)


def test_a_link_that_ends_in_the_middle_of_a_tick_is_counted_once() -> None:
    async def main() -> None:
        pacer = Pacer()
        acknowledged = {"one": 500, "two": 0}
        end_one = pacer.add_meter(THEM, lambda: acknowledged["one"])
        pacer.add_meter(THEM, lambda: acknowledged["two"])

        async def tick(ends: bool) -> None:
            async with pacer.sending(1, THEM, bulk=True):
                await anyio.sleep(TICK_S / 2)
                acknowledged["one"] += 1000
                if ends:
                    end_one()
                    end_one()
                    acknowledged["one"] += 70_000  # nobody's business any more
                acknowledged["two"] += 1000
                await anyio.sleep(TICK_S / 2)

        await tick(ends=False)
        await tick(ends=True)
        assert pacer.uplink_bytes_per_s is not None
        assert pacer.uplink_bytes_per_s == pytest.approx(2000 / TICK_S)

    run_virtual(main)
