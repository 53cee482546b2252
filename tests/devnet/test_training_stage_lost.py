"""A stage's only machine burns, disk and all: a newcomer brings its parameters back from the owners of other stages.

Whole workers, real stages, real chain, virtual time.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio
import pytest
import torch

from tessera.p2p.memory import run_virtual
from tessera.training import membership
from tessera.training.checkpoints import Checkpoints
from training_whole import STAGES, Life, WholeRun, write_data

LAST = 25


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prepare(folder: Path) -> WholeRun:
    manifest = write_data(folder)
    schedule = manifest.schedule.model_copy(update={"steps": LAST, "snapshot_every": 10})
    return WholeRun(manifest.model_copy(update={"schedule": schedule}), folder)


def state_of(life: Life) -> bytes:
    return Checkpoints(life.home.run_folder(life.run.manifest.run_id) / "checkpoints").load(LAST)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 0, 3])
def test_a_stage_comes_back_to_the_byte_with_somebody_new(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "LAST_ABSENT_S", 60.0)
    monkeypatch.setattr(membership, "TURN_S", 5.0)

    async def main() -> None:
        quiet = prepare(tmp_path / "quiet")
        async with quiet.open():
            await quiet.settled()
            undisturbed = [state_of(life) for life in quiet.workers]

        run = prepare(tmp_path / "run")
        async with run.open() as tasks:
            victim, newcomer = run.workers[stage], Life(run, STAGES)
            await run.at_step(14)
            await victim.die()
            shutil.rmtree(victim.home.path)
            with anyio.fail_after(300):
                while not run.host.roster().past:  # his stage is free for the next who comes
                    await anyio.sleep(1)
            tasks.start_soon(newcomer.live)
            with anyio.fail_after(1200):
                while not (newcomer.seated and not newcomer.over.is_set()):
                    await anyio.sleep(1)
            lives = [newcomer if i == stage else life for i, life in enumerate(run.workers)]
            assert [state_of(life) for life in lives] == undisturbed

    run_virtual(main)
