"""Replicas pull each other's parts, whoever dies, stalls or comes late. On virtual time."""

import anyio
import pytest

from exchange_world import LIMIT, SIZE, honest, in_virtual_time, part, replicas
from tessera.core.errors import Conflict, Invalid
from tessera.training.deadlines import Deadline


@in_virtual_time
async def test_everybody_gets_everybodys_part() -> None:
    async with replicas(3) as world:
        for n, exchange in enumerate(world.exchanges):
            await exchange.offer(world.name(), part(n))
        found = await world.all_collect([0, 1, 2])
        for n, collected in found.items():
            assert collected.parts == {peer: part(m) for m, peer in enumerate(world.ids)}
            assert list(collected.parts) == world.ids, "in one order everywhere"
            assert collected.faults == {}
            assert collected.arrived_s.keys() == set(world.ids) - {world.ids[n]}
            assert all(0.5 < seconds < 2.5 for seconds in collected.arrived_s.values()), (
                "5 MB at 10 MB/s, to two at once"
            )
        assert len({tuple(e.digests(world.name()).items()) for e in world.exchanges}) == 3
        assert len({frozenset(e.digests(world.name()).items()) for e in world.exchanges}) == 1


@in_virtual_time
async def test_a_request_waits_for_a_part_that_is_not_there_yet() -> None:
    async with replicas(2) as world:
        await world.exchanges[0].offer(world.name(), part(0))

        async def late_worker() -> None:
            await anyio.sleep(40)
            await world.exchanges[1].offer(world.name(), part(1))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(late_worker)
            collected = await world.collect(0, 60)
        assert collected.parts.keys() == set(world.ids)
        assert 40 < collected.arrived_s[world.ids[1]] < 41.5


@in_virtual_time
async def test_what_a_replica_sent_before_it_died_is_had_from_the_others() -> None:
    """The laggard asks only after the death; somebody else has collected the part in time."""
    async with replicas(3) as world:
        for n, exchange in enumerate(world.exchanges):
            await exchange.offer(world.name(), part(n))
        await world.all_collect([0, 2])
        world.network.kill(world.ids[2])
        collected = await world.collect(1, 30)
        assert collected.parts == {peer: part(m) for m, peer in enumerate(world.ids)}
        assert collected.faults == {}


@in_virtual_time
async def test_a_replica_that_dies_in_the_middle_of_its_part_is_missing_and_nothing_else() -> None:
    async with replicas(3) as world:
        world.network.shape(world.ids[2], world.ids[0], delay_s=0.05, rate_bytes_per_s=1e6)  # 5 s for its part
        for n, exchange in enumerate(world.exchanges):
            await exchange.offer(world.name(), part(n))

        async def death() -> None:
            await anyio.sleep(2)
            world.network.kill(world.ids[2])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(death)
            started = anyio.current_time()
            collected = await world.collect(0, 20)
        assert anyio.current_time() - started == pytest.approx(20, abs=0.1)
        assert list(collected.parts) == world.ids[:2]
        assert collected.faults == {}


@in_virtual_time
async def test_a_slow_link_is_passed_by_through_somebody_else() -> None:
    """The owner's link to one of us is a hundred times slower: the part comes from the other, who has it."""
    async with replicas(3) as world:
        world.network.shape(world.ids[2], world.ids[0], delay_s=0.05, rate_bytes_per_s=1e5)
        for n, exchange in enumerate(world.exchanges):
            await exchange.offer(world.name(), part(n))
        found = await world.all_collect([0, 1], 20)
        assert found[0].parts.keys() == set(world.ids)
        assert 10 < found[0].arrived_s[world.ids[2]] < 13, "half of the deadline, then the fast way"
        assert found[1].arrived_s[world.ids[2]] < 3


@in_virtual_time
async def test_a_slow_replica_costs_no_more_than_the_deadline_that_the_others_taught() -> None:
    deadline = Deadline(floor_s=1.0, cap_s=60.0)
    async with replicas(4) as world:
        world.network.uplink(world.ids[3], 2e4)  # minutes for its part
        for step in range(4):
            name = world.name(step)
            for n, exchange in enumerate(world.exchanges):
                await exchange.offer(name, part(n))
            started = anyio.current_time()
            collected = await world.collect(0, deadline.next_s(), name)
            took_s = anyio.current_time() - started
            for seconds in collected.arrived_s.values():
                deadline.observe(seconds)
            deadline.missed()
            assert list(collected.parts) == world.ids[:3]
        assert took_s < 5, "the first time it waited a minute"


@in_virtual_time
async def test_a_ghost_gets_the_parts_of_the_steps_that_are_kept_and_no_older_ones() -> None:
    async with replicas(3, keep=2) as world:
        for step in range(3):
            for n, exchange in enumerate(world.exchanges[:2]):
                await exchange.offer(world.name(step), part(n))
            await world.exchanges[0].collect(world.name(step), world.ids[:2], 10, size_bytes=SIZE, check=honest)
        ghost, owners = world.exchanges[2], world.ids[:2]
        for step, there in ((0, False), (1, True), (2, True)):
            found = await ghost.collect(world.name(step), owners, 10, size_bytes=SIZE, check=honest)
            assert list(found.parts) == (owners if there else [])
            assert not found.faults


@in_virtual_time
async def test_another_attempt_and_another_kind_are_other_parts() -> None:
    async with replicas(2) as world:
        names = [world.name(0), world.name(0, 1), world.name(0, kind="partition"), world.name(1)]
        for number, name in enumerate(names):
            await world.exchanges[0].offer(name, part(number))
            await world.exchanges[1].offer(name, part(10 + number))
        for number, name in enumerate(names):
            found = await world.collect(0, 10, name)
            assert list(found.parts.values()) == [part(number), part(10 + number)]


@in_virtual_time
async def test_what_was_offered_once_stays_as_it_is() -> None:
    async with replicas(2) as world:
        exchange = world.exchanges[0]
        await exchange.offer(world.name(), part(0))
        await exchange.offer(world.name(), part(0))
        with pytest.raises(Conflict, match="another part"):
            await exchange.offer(world.name(), part(1))
        with pytest.raises(Invalid, match="at most"):
            await exchange.offer(world.name(1), bytes(LIMIT + 1))
        with pytest.raises(Conflict, match="never offered"):
            await world.collect(1)
        assert exchange.digests(world.name(1)) == {}
        with pytest.raises(Invalid, match="at most"):
            await exchange.collect(world.name(), world.ids, 1, size_bytes=LIMIT + 1, check=honest)
