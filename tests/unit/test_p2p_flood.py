"""Flooding between a few members: news reaches all, whoever was away catches up, and a restart loses nothing."""

from __future__ import annotations

import random

import anyio
import pytest

from flood_world import GROUP, FloodWorld, payloads
from p2p_world import key
from tessera.core.errors import Conflict, Invalid, Refused, Unavailable
from tessera.p2p.flood import Flood, FloodConfig
from tessera.p2p.flood_item import Item, MemoryItemStore, check_equivocation
from tessera.p2p.flood_peers import PeerLimits
from tessera.p2p.flood_state import StateLimits
from tessera.p2p.memory import VirtualClock, run_virtual


def test_news_reaches_everybody_once_and_in_a_moment() -> None:
    async def main() -> None:
        world, heard = FloodWorld(), list[bytes]()
        async with world.member(1) as a, world.member(2) as b, world.member(3) as c, world.member(4) as d:
            await anyio.sleep(1)
            for flood in (a, b, c, d):
                flood.subscribe("news", lambda item: heard.append(item.payload))
            a.publish("news", b"first")
            d.publish("news", b"second")
            d.publish("other", b"not asked for")
            await anyio.sleep(0.5)
            assert sorted(heard) == [b"first"] * 4 + [b"second"] * 4
            assert all(sorted(payloads(flood)) == [b"first", b"second"] for flood in (a, b, c, d))
        assert not world.faults

    run_virtual(main)


def test_a_key_keeps_the_newest_and_an_empty_one_keeps_all() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.member(1) as a, world.member(2) as b:
            await anyio.sleep(1)
            for text in (b"old address", b"new address"):
                a.publish("seats", text, "me")
                a.publish("votes", text)
                await anyio.sleep(0.5)
            assert payloads(b, "seats") == [b"new address"]
            assert payloads(b, "votes") == [b"old address", b"new address"]
            assert len(world.stores[key(2).id]) == 3

    run_virtual(main)


def test_who_was_away_catches_up_from_any_holder() -> None:
    """The origin is gone for good when the newcomer arrives."""

    async def main() -> None:
        world = FloodWorld()
        async with world.member(2) as b:
            async with world.member(1) as a:
                await anyio.sleep(1)
                for number in range(1200):  # more than one comparison carries
                    a.publish("news", b"%d" % number)
                await anyio.sleep(90)
            assert len(payloads(b)) == 1200
            async with world.member(3) as c:
                await anyio.sleep(2)
                assert payloads(c) == payloads(b)

    run_virtual(main)


def test_a_partition_that_heals_ends_in_the_same_items_everywhere() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.member(1) as a, world.member(2) as b, world.member(3) as c, world.member(4) as d:
            await anyio.sleep(1)
            halves = [(x, y) for x in (1, 2) for y in (3, 4)]
            for x, y in halves:
                world.network.partition(key(x).id, key(y).id)
            a.publish("news", b"left")
            c.publish("news", b"right")
            await anyio.sleep(600)
            assert payloads(b) == [b"left"]
            assert payloads(d) == [b"right"]
            for x, y in halves:
                world.network.heal(key(x).id, key(y).id)
            await anyio.sleep(600)
            assert all(sorted(payloads(flood)) == [b"left", b"right"] for flood in (a, b, c, d))

    run_virtual(main)


def test_a_crash_loses_nothing_that_was_published() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.member(1) as a:
            a.publish("news", b"told nobody")
            world.network.kill(key(1).id)
        async with world.member(2) as b:
            await anyio.sleep(10)
            assert payloads(b) == []
            async with world.member(1) as a:
                await anyio.sleep(1)
                assert payloads(a) == payloads(b) == [b"told nobody"]

    run_virtual(main)


def test_a_lost_disk_repeats_no_sequence_and_gets_its_items_back() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.member(2) as b:
            async with world.member(1) as a:
                await anyio.sleep(1)
                a.publish("seats", b"old", "me")
                await anyio.sleep(1)
            del world.stores[key(1).id]
            async with world.member(1) as a:
                new = a.publish("seats", b"new", "me")
                await anyio.sleep(1)
                assert new.sequence > 0
                assert payloads(a, "seats") == payloads(b, "seats") == [b"new"]
        assert not world.faults

    run_virtual(main)


def test_items_expire_everywhere_and_leave_the_disk() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.member(1) as a, world.member(2) as b:
            await anyio.sleep(1)
            a.publish("news", b"short", ttl_s=60)
            a.publish("news", b"long", ttl_s=6000)
            await anyio.sleep(30)
            assert payloads(b) == [b"short", b"long"]
            await anyio.sleep(120)
            assert payloads(a) == payloads(b) == [b"long"]
            assert [len(store) for store in world.stores.values()] == [1, 1]

    run_virtual(main)


def test_who_leaves_the_group_is_forgotten_and_refused() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.member(1) as a, world.member(2) as b:
            await anyio.sleep(1)
            a.publish("news", b"mine")
            await anyio.sleep(1)
            del world.records[key(1).id]
            await anyio.sleep(90)
            assert payloads(b) == []
            assert len(world.stores[key(2).id]) == 0
            a.publish("news", b"again")
            await anyio.sleep(90)
            assert payloads(b) == []

    run_virtual(main)


def test_groups_on_one_transport_do_not_meet() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.network.start(key(1)) as one, world.network.start(key(2)) as two:
            records = [one.record(), two.record()]
            floods = [
                Flood(transport, group, lambda: records, own, VirtualClock(), random.Random(1))
                for transport, own in ((one, key(1)), (two, key(2)))
                for group in ("x", "y")
            ]
            async with anyio.create_task_group() as tasks:
                for flood in floods:
                    tasks.start_soon(flood.run)
                floods[0].publish("news", b"for x")
                await anyio.sleep(60)
                assert [payloads(flood) for flood in floods] == [[b"for x"], [], [b"for x"], []]
                tasks.cancel_scope.cancel()

    run_virtual(main)


def test_publish_refuses_what_nobody_would_take() -> None:
    async def main() -> None:
        world = FloodWorld(config=FloodConfig(state=StateLimits(origin_items=3)))
        async with world.member(1) as a:
            with pytest.raises(Invalid, match="at most 16384"):
                a.publish("news", bytes(16 * 1024 + 1))
            with pytest.raises(Invalid, match="topic"):
                a.publish("No Topic", b"")
            with pytest.raises(Invalid, match="visible ASCII"):
                a.publish("news", b"", "white space")
            with pytest.raises(Invalid, match="lives up to"):
                a.publish("news", b"", ttl_s=1e9)
            for _ in range(3):
                a.publish("news", b"x", ttl_s=60)
            with pytest.raises(Refused, match="3 places") as refused:
                a.publish("news", b"x")
            assert refused.value.rule == "flood_room"
            await anyio.sleep(61)
            a.publish("seats", b"", "me")
            a.publish("news", b"x")
            a.publish("news", b"x")
            a.publish("seats", b"in its own place", "me")
            with pytest.raises(Conflict, match="runs already"):
                await a.run()

    run_virtual(main)


def test_too_much_news_at_once_is_refused_at_home() -> None:
    async def main() -> None:
        limits = PeerLimits(news_bytes=5000.0, news_bytes_per_s=100.0)
        async with FloodWorld(config=FloodConfig(peers=limits)).member(1) as a:
            a.publish("news", bytes(2000))
            a.publish("news", bytes(2000))
            with pytest.raises(Unavailable) as refused:
                a.publish("news", b"")
            await anyio.sleep(refused.value.retry_after_s)
            a.publish("news", b"")

    run_virtual(main)


def test_two_machines_with_one_key_are_proven_guilty_to_all() -> None:
    """Both items are void everywhere, whichever came first, and any two of them convict their signer."""

    async def main() -> None:
        world = FloodWorld()
        async with world.member(1) as a, world.member(2) as b, world.member(3) as c:
            await anyio.sleep(1)
            honest = a.publish("votes", b"honest")
            await anyio.sleep(1)
            for number, flood in enumerate((b, c)):  # what two of its machines told two members
                twin = Item(GROUP, "votes", key(1).id, honest.sequence + 1, "", honest.expires, b"%d" % number)
                flood._take_in([twin.signed_by(key(1))], key(1).id)
            await anyio.sleep(5)
            assert payloads(a, "votes") == payloads(b, "votes") == payloads(c, "votes") == [b"honest"]
            assert len(world.faults) == 3
            assert {check_equivocation(fault.evidence) for fault in world.faults} == {key(1).id}
            async with world.member(4) as late:
                await anyio.sleep(1)
                assert payloads(late, "votes") == [b"honest"]
                assert len(world.faults) == 4
            before = len(world.faults)
        async with world.member(2) as b:  # the disk keeps the proof
            await anyio.sleep(1)
            assert payloads(b, "votes") == [b"honest"]
            assert len(world.faults) == before

    run_virtual(main)


def test_a_disk_that_was_damaged_costs_the_damaged_items_only() -> None:
    async def main() -> None:
        world = FloodWorld()
        store = world.stores[key(1).id] = MemoryItemStore()
        now = VirtualClock().time()
        good = Item(GROUP, "news", key(1).id, 1, "", int(now) + 100, b"good").signed_by(key(1))
        bad = Item(GROUP, "news", key(1).id, 2, "", int(now) + 100, b"bad", good.signature)
        old = Item(GROUP, "news", key(1).id, 3, "", int(now) - 1, b"old").signed_by(key(1))
        foreign = Item("another run", "news", key(1).id, 4, "", int(now) + 100, b"foreign").signed_by(key(1))
        for item in (good, bad, old, foreign):
            store.keep(item)
        async with world.member(1) as a:
            await anyio.sleep(1)
            assert payloads(a) == [b"good"]
            assert len(store) == 1

    run_virtual(main)


def test_a_full_disk_stops_what_we_say_and_not_what_we_hear() -> None:
    class FullStore(MemoryItemStore):
        def keep(self, item: Item) -> None:
            raise OSError(28, "No space left on device")

    async def main() -> None:
        world = FloodWorld()
        world.stores[key(2).id] = FullStore()
        async with world.member(1) as a, world.member(2) as b:
            await anyio.sleep(1)
            a.publish("news", b"heard")
            await anyio.sleep(1)
            assert payloads(b) == [b"heard"]
            with pytest.raises(OSError, match="No space"):
                b.publish("news", b"not said")
            await anyio.sleep(1)
            assert payloads(a) == payloads(b) == [b"heard"]

    run_virtual(main)


def test_a_subscriber_that_breaks_stops_nothing() -> None:
    async def main() -> None:
        world = FloodWorld()
        async with world.member(1) as a, world.member(2) as b:
            b.subscribe("news", lambda item: item.payload.index(b"z"))
            await anyio.sleep(1)
            a.publish("news", b"no such letter")
            await anyio.sleep(1)
            assert payloads(b) == [b"no such letter"]

    run_virtual(main)
