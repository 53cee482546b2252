"""A stage dies with its disk, and comes back to the byte from what owners of other stages hold of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog

from snapshot_world import CONFIG, SAVE_EVERY, Node, World, put, state_of, world
from tessera.core.errors import Conflict, Missing
from tessera.core.ids import PeerId
from tessera.p2p.calls import serve_calls
from tessera.p2p.memory import run_virtual
from tessera.training.protocols import SNAPSHOT
from tessera.training.snapshot_header import Moment
from tessera.training.snapshot_restore import find_snapshots
from tessera.training.snapshots import CHUNK_BYTES

BIG = replace(CONFIG, quota_bytes=1 << 26)


async def replace_node(run: World, stage: int, seed: int) -> Node:
    """The only worker of `stage` is gone with its disk; a newcomer without anything is admitted to its place."""
    await run.lose(run.at(stage)[0])
    return await run.add(stage, seed)


@pytest.mark.parametrize("stage", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 3))])
def test_a_dead_stage_comes_back_exactly_within_one_interval(stage: int, tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(70)
            died = run.moment.step
            newcomer = await replace_node(run, stage, 99)
            restored = await run.restore(newcomer, stage)
            assert restored.state == state_of(stage, 1, restored.step)
            assert 0 <= died - restored.step < CONFIG.every
            assert restored.wrong == {}
            for node in run.nodes:  # everybody else can go back to that step
                if node is not newcomer:
                    assert node.checkpoints.load(restored.step) == state_of(node.stage, 1, restored.step)
            newcomer.checkpoints.save(restored.step, restored.state)
            run.go_back(restored.step)
            await run.train(100)
            assert {tuple(node.checkpoints.steps()[-2:]) for node in run.nodes} == {(90, 100)}
            again = await replace_node(run, stage, 98)
            assert (await run.restore(again, stage)).state == state_of(stage, 2, 100)

    run_virtual(main)


@pytest.mark.slow
def test_stage_after_stage_may_die_when_each_is_restored_before_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, replicas=2) as run:
            await run.train(40)
            for number, stage in enumerate((3, 0)):
                while run.at(stage):
                    await run.lose(run.at(stage)[0])
                newcomers = [await run.add(stage, 100 + 2 * number + i) for i in range(2)]
                restored = [await run.restore(node, stage) for node in newcomers]
                session, step = run.moment.session, restored[0].step
                assert {r.state for r in restored} == {state_of(stage, restored[0].header.session, step)}
                for node, found in zip(newcomers, restored, strict=True):
                    node.checkpoints.save(found.step, found.state)
                run.go_back(step)
                await run.train(step + 2 * CONFIG.every)
                assert run.moment == Moment(session + 1, step + 2 * CONFIG.every)

    run_virtual(main)


def test_a_snapshot_reaches_a_holder_who_was_away_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """3 MB at 100 kB/s: the link breaks in the middle of the second chunk of two."""

    async def main() -> None:
        async with world(tmp_path, rate_bytes_per_s=100_000, config=BIG) as run:
            run.size = 3_000_000
            maker, away = run.at(0)[0], run.at(1)[0]
            run.moment = Moment(1, 20)
            maker.checkpoints.save(20, state_of(0, 1, 20, run.size))
            maker.snapshots.offer(run.moment)
            await anyio.sleep(13)
            (part,) = (away.folder / "snapshots").glob("*.part")
            assert part.stat().st_size == 1 << 20
            run.network.partition(maker.transport.id, away.transport.id)
            await anyio.sleep(40)
            spread = maker.snapshots.last
            assert spread is not None
            assert len(spread.placed) == 2
            assert list(spread.missing) == [away.transport.id]
            assert part.stat().st_size == 1 << 20
            sent = run.network.wire(maker.transport.id, away.transport.id).delivered_bytes
            run.network.heal(maker.transport.id, away.transport.id)
            await anyio.sleep(40)
            assert spread.missing == {}
            assert len(spread.placed) == 3
            again = run.network.wire(maker.transport.id, away.transport.id).delivered_bytes - sent
            assert again < 500_000  # of 1.5 MB: what was there did not come twice

    run_virtual(main)


def test_holders_that_are_away_are_named_and_the_others_suffice(tmp_path: Path) -> None:
    async def main() -> None:
        with structlog.testing.capture_logs() as logs:
            async with world(tmp_path, stages=5) as run:
                maker, *rest = run.at(0) + [run.at(stage)[0] for stage in (1, 2, 3, 4)]
                gone = rest[3]
                run.network.kill(gone.transport.id)
                await run.train(20)
                await anyio.sleep(CONFIG.patience_s)
                spread = maker.snapshots.last
                assert spread is not None
                assert spread.restorable
                assert (len(spread.placed), list(spread.missing)) == (3, [gone.transport.id])
                newcomer = await replace_node(run, 0, 99)
                restored = await run.restore(newcomer, 0)
                assert restored.state == state_of(0, 1, 20)
        (event,) = [entry for entry in logs if entry["event"] == "snapshot_spread" and entry["placed"] == 3][:1]
        assert list(event["missing"]) == [gone.transport.id]

    run_virtual(main)


def test_a_snapshot_that_too_few_hold_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(30)
            dying, others = run.at(2)[0], [node for node in run.nodes if node.stage != 2]
            for node in others[1:]:
                run.network.partition(dying.transport.id, node.transport.id)
            with structlog.testing.capture_logs() as logs:
                await run.train(40)
                await anyio.sleep(CONFIG.patience_s)
            assert [entry["placed"] for entry in logs if entry["event"] == "snapshot_incomplete"] == [1]
            newcomer = await replace_node(run, 2, 99)
            restored = await run.restore(newcomer, 2)
            assert (restored.step, restored.state) == (20, state_of(2, 1, 20))
            for node in others:
                assert 20 in node.checkpoints.steps()
            with pytest.raises(Missing) as caught:
                await run.restore(newcomer, 2, 40)
            assert (caught.value.fields["have"], caught.value.fields["needed"]) == (1, 2)

    run_virtual(main)


def test_training_never_waits_for_a_snapshot(tmp_path: Path) -> None:
    """All holders are away: offers return at once, and of those that wait only the newest is made."""

    async def main() -> None:
        async with world(tmp_path) as run:
            maker = run.at(0)[0]
            for node in run.nodes[1:]:
                run.network.kill(node.transport.id)
            began = anyio.current_time()
            run.moment = Moment(1, 20)
            maker.checkpoints.hold([20, 40, 60, 80])
            for step in (20, 40, 60, 80):
                maker.checkpoints.save(step, b"state")
            maker.snapshots.offer(Moment(1, 20))
            assert anyio.current_time() == began
            await anyio.sleep(10)
            for step in (40, 60, 80):
                maker.snapshots.offer(Moment(1, step))
            await anyio.sleep(60)
            spread = maker.snapshots.last
            assert spread is not None
            assert spread.header.step == 80
            assert len(spread.missing) == 3

    run_virtual(main)


def test_a_slow_uplink_takes_longer_than_patience_lasts(tmp_path: Path) -> None:
    """4.5 MB to each holder at 30 kB/s are 150 s; patience is for holders that take nothing for 120 s."""

    async def main() -> None:
        async with world(tmp_path, rate_bytes_per_s=30_000, config=BIG) as run:
            maker, run.moment = run.at(0)[0], Moment(1, 20)
            maker.checkpoints.save(20, bytes(9_000_000))
            maker.snapshots.offer(run.moment)
            await anyio.sleep(130)
            for node in run.nodes[1:]:  # and a break after that is no reason to give up
                run.network.partition(maker.transport.id, node.transport.id)
            await anyio.sleep(10)
            for node in run.nodes[1:]:
                run.network.heal(maker.transport.id, node.transport.id)
            await anyio.sleep(100)
            spread = maker.snapshots.last
            assert spread is not None
            assert (len(spread.placed), spread.missing) == (3, {})

    run_virtual(main)


def test_a_slow_holder_does_not_keep_the_next_snapshot_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, config=BIG) as run:
            maker, slow = run.at(0)[0], run.at(1)[0]
            honest = slow.snapshots

            async def drip(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
                await anyio.sleep(39 if body else 0)  # a chunk must be taken within 40
                return await honest._answer(peer, request, body)

            serve_calls(slow.transport, SNAPSHOT, drip, request_limit=2 * CHUNK_BYTES)
            for step in (20, 40):
                run.moment = Moment(1, step)
                maker.checkpoints.save(step, bytes(6 * CHUNK_BYTES))
                maker.snapshots.offer(run.moment)
                await anyio.sleep(10)
            spread = maker.snapshots.last
            assert spread is not None
            assert (spread.header.step, len(spread.placed)) == (40, 2)

    run_virtual(main)


def test_a_snapshot_of_a_past_that_the_run_has_left_is_not_restored(tmp_path: Path) -> None:
    """Step 60 of session 1 was reached before the run went back; no snapshot of session 2 is complete yet."""

    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(60)
            run.go_back(40, told=False)  # holders who have just restarted, say
            dying = run.at(1)[0]
            others = [node for node in run.nodes if node.stage != 1]
            for node in others[1:]:
                run.network.partition(dying.transport.id, node.transport.id)
            await run.train(60)  # one holder has step 60 of session 2, two have step 60 of session 1
            newcomer = await replace_node(run, 1, 99)
            records = [node.record for node in others]
            inventory = await find_snapshots(
                newcomer.transport, records, dying.snapshots._run_id, 1, made_by=lambda peer, stage: True
            )
            assert [found.header.moment for found in inventory.found] == [Moment(2, 60), Moment(1, 40)]
            restored = await run.restore(newcomer, 1)
            assert (restored.step, restored.state) == (40, state_of(1, 1, 40))

    run_virtual(main)


def test_a_run_that_goes_back_forgets_snapshots_of_what_it_leaves(tmp_path: Path) -> None:
    """Nothing was put since: no later header shows that step 60 is of another past, but every holder was there."""

    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(60)
            maker, holder = run.at(0)[0], run.at(1)[0]
            left = run.sealed(maker, Moment(1, 60))
            run.go_back(40)
            assert [header.step for header in holder.snapshots._shelf.headers(0)] == [40]
            assert holder.snapshots.steps_kept() == [20, 40]
            with pytest.raises(Conflict):
                await put(maker, left, holder)
            maker.snapshots.offer(Moment(1, 60))  # too late by a moment
            maker.snapshots.went_back(run.moment)
            await anyio.sleep(10)
            newcomer = await replace_node(run, 0, 99)
            restored = await run.restore(newcomer, 0)
            assert (restored.step, restored.state) == (40, state_of(0, 1, 40))

    run_virtual(main)


def test_a_holder_that_restarts_still_has_what_it_held(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(40)
            for node in run.at(0) + run.at(1):
                node.snapshots = run.snapshots_of(node)
                node.snapshots.serve()
                assert 20 in node.snapshots.steps_kept()
            newcomer = await replace_node(run, 3, 99)
            assert (await run.restore(newcomer, 3)).state == state_of(3, 1, 40)

    run_virtual(main)


def test_checkpoints_stay_for_a_stage_whose_snapshots_got_stuck(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(40)
            stuck = run.at(2)[0]
            for node in run.nodes:
                if node is not stuck:
                    run.network.partition(stuck.transport.id, node.transport.id)
            await run.train(200)
            for node in run.nodes:
                if node is not stuck:
                    assert {20, 40, 160, 180, 200} <= set(node.checkpoints.steps())
                    assert len(node.checkpoints.steps()) <= 8
            newcomer = await replace_node(run, 2, 99)
            restored = await run.restore(newcomer, 2)
            assert restored.step == 40
            assert restored.step % SAVE_EVERY == 0

    run_virtual(main)
