"""What happens to machines at home: a full disk, a laptop that sleeps, a wrong clock, an owner who wants it back.

Nothing is lost, and each says in words what is the matter.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from crew_world import CrewWorld
from tessera.core.errors import Invalid
from tessera.p2p.memory import run_virtual
from tessera.training import checkpoints
from tessera.training.joining import look
from tessera.training.status import read_status
from tessera.training.wishes import make_wish
from training_run import hosted
from training_whole import Life, WholeRun, write_data
from training_world import small_manifest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def folder_of(life: Life) -> Path:
    return life.home.run_folder(life.run.manifest.run_id)


def test_a_full_disk_pauses_training_and_room_lets_it_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = small_manifest(steps=24, epoch_steps=12)
    write, full = checkpoints.write_atomic, [False]

    def on_a_full_disk(file: Path, data: bytes, **options: Any) -> None:
        if full[0] and "worker-2" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data, **options)

    monkeypatch.setattr(checkpoints, "write_atomic", on_a_full_disk)

    async def main() -> None:
        world = CrewWorld(manifest, tmp_path)
        async with world.alive():
            node = world.nodes[2]
            while node.pipeline.steps_done < 12:
                await anyio.sleep(0.1)
            full[0] = True
            await anyio.sleep(60)
            assert not node.pipeline.trained.is_set()
            assert "No space left on device" in node.pipeline.trouble
            assert 20 not in node.checkpoints.steps()
            full[0] = False
            await world.trained()
            assert len({tuple(n.checkpoints.steps()) for n in world.nodes}) == 1

    run_virtual(main)


@pytest.mark.slow
def test_a_laptop_that_sleeps_is_waited_for_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open():
            await run.at_step(4)
            sleeper = run.workers[1].home.peer_key.id
            others = [run.host._transport.id, *(w.home.peer_key.id for w in run.workers if w is not run.workers[1])]
            for other in others:
                run.network.partition(sleeper, other)
            await anyio.sleep(400)
            assert not any(report.trained for stage, report in run.reports.items() if stage != 1)
            for other in others:
                run.network.heal(sleeper, other)
            await run.settled()

    run_virtual(main)


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_a_wrong_clock_is_told_before_a_seat_is_taken(ahead_s: int, tmp_path: Path) -> None:
    class Skewed:
        def __init__(self, right: Any) -> None:
            self._right = right

        def time(self) -> float:
            return float(self._right.time() + ahead_s)

    async def main() -> None:
        from tessera.training.joining import HostLink
        from training_run import invitation_to

        manifest = small_manifest()
        async with hosted(manifest, tmp_path) as world:
            clock = Skewed(world.peers[0]._network.clock)
            invitation = invitation_to(manifest, world.host_transport.record())
            link = HostLink(world.peers[0], invitation, patience_s=5, clock=clock)
            with pytest.raises(Invalid, match=r"this machine's clock says .* apart"):
                await look(link)
            assert world.host.seats == []

    run_virtual(main)


@pytest.mark.slow
def test_an_owner_pauses_and_resumes(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open():
            await run.at_step(3)
            worker = run.workers[2]
            make_wish(folder_of(worker), "pause")
            await anyio.sleep(90)
            paused_at = run.reports[2].step
            assert run.reports[2].pauses == "paused by its owner"
            assert read_status(folder_of(worker)).pauses == "paused by its owner"
            assert paused_at < run.manifest.schedule.steps
            await anyio.sleep(90)
            assert run.reports[2].step == paused_at
            make_wish(folder_of(worker), "work")
            await run.settled()

    run_virtual(main)


@pytest.mark.slow
def test_a_paused_run_stands_still_everywhere_and_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open():
            await run.at_step(3)
            run.host.phase = "paused"
            await anyio.sleep(90)
            steps = [run.reports[stage].step for stage in range(4)]
            await anyio.sleep(90)
            assert [run.reports[stage].step for stage in range(4)] == steps
            assert {run.reports[stage].pauses for stage in range(4)} == {"the run is paused"}
            run.host.phase = "training"
            await run.settled()

    run_virtual(main)
