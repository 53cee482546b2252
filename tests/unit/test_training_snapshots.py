"""Who makes snapshots, who holds them, and what must stay for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from snapshot_world import CONFIG, RUN, state_of, world
from tessera.core.errors import Invalid
from tessera.core.signing import PeerKey
from tessera.p2p.memory import run_virtual
from tessera.p2p.transport import PeerRecord
from tessera.training.snapshot_header import Moment
from tessera.training.snapshots import SnapshotConfig, choose_holders, choose_maker, needed_of


class Worker:
    def __init__(self, stage: int, number: int) -> None:
        self.stage = stage
        self.record = PeerRecord.sign(PeerKey(bytes([stage + 1, number]) * 16), ("memory:x",), 2_000_000_000)


def workers(stages: int, replicas: int) -> list[Worker]:
    return [Worker(stage, number) for number in range(replicas) for stage in range(stages)]


def test_pieces_go_to_as_many_stages_as_there_are() -> None:
    members = workers(8, 3)
    stage_of = {member.record.id: member.stage for member in members}
    for stage in range(8):
        chosen = choose_holders(RUN, stage, members, 5)
        assert len({stage_of[record.id] for record in chosen} - {stage}) == 5
        more = Counter(stage_of[record.id] for record in choose_holders(RUN, stage, members, 16))
        assert stage not in more
        assert set(more.values()) == {2, 3}


def test_everybody_chooses_alike_and_all_hold_about_as_much() -> None:
    members = workers(8, 2)
    held = Counter(record.id for stage in range(8) for record in choose_holders(RUN, stage, members, 5))
    assert held == Counter(r.id for stage in range(8) for r in choose_holders(RUN, stage, members[::-1], 5))
    assert max(held.values()) <= 5
    assert len(held) >= 12
    assert len(choose_holders(RUN, 0, workers(3, 1), 5)) == 2


def test_workers_of_a_stage_take_turns() -> None:
    members = workers(2, 3)
    turns = [choose_maker(RUN, 0, members, step, 20) for step in range(20, 200, 20)]
    assert turns[:3] == turns[3:6] == turns[6:]
    assert len(set(turns)) == 3
    assert turns == [choose_maker(RUN, 0, members[::-1], step, 20) for step in range(20, 200, 20)]
    assert choose_maker(RUN, 7, members, 20, 20) is None


def test_a_majority_is_needed() -> None:
    for count in range(2, 17):
        assert 2 <= needed_of(count) <= count
        assert 2 * needed_of(count) > count  # two versions of one snapshot cannot both be complete


@pytest.mark.parametrize(
    "fields", [{"every": 0}, {"holders": 1}, {"holders": 17}, {"quota_bytes": 0}, {"patience_s": 0.0}]
)
def test_a_config_that_cannot_work_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        SnapshotConfig(**fields)


def test_snapshots_fall_on_checkpoints(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            with pytest.raises(Invalid, match="every 25 steps"):
                run.snapshots_of(run.nodes[0], replace(CONFIG, every=25))

    run_virtual(main)


def test_only_steps_that_are_due_are_made_by_whose_turn_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, replicas=2) as run:
            await run.train(40)
            for stage in range(4):
                made = [n.snapshots.last.header.step for n in run.at(stage) if n.snapshots.last is not None]
                assert sorted(made) == [20, 40]  # one each
            held = Counter(header.step for node in run.nodes for header in node.snapshots._shelf.headers())
            assert held == {20: 4 * CONFIG.holders, 40: 4 * CONFIG.holders}

    run_virtual(main)


def test_the_newest_two_and_the_one_under_way_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            await run.train(110)
            for node in run.nodes:
                assert node.snapshots.steps_kept() == [60, 80, 100]
                assert node.checkpoints.steps() == [60, 80, 100, 110]
                assert run.snapshots_of(node).steps_kept() == [60, 80, 100]  # a restart knows it at once

    run_virtual(main)


def test_a_checkpoint_that_is_gone_fails_one_snapshot_and_not_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as run:
            maker = run.at(0)[0]
            run.moment = Moment(1, 20)
            maker.snapshots.offer(run.moment)
            await anyio.sleep(10)
            assert maker.snapshots.last is None
            await run.train(40)
            assert maker.snapshots.last is not None
            newcomer = await run.add(0, 99)
            assert (await run.restore(newcomer, 0)).state == state_of(0, 1, 40)

    run_virtual(main)
