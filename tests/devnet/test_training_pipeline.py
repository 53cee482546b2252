"""Training goes on whatever happens to the workers, and ends with the numbers of an undisturbed run."""

import time
from pathlib import Path

import anyio
import pytest

from tessera.core.clock import FakeClock
from tessera.core.errors import Conflict, Invalid, Refused, TesseraError, Unavailable
from tessera.p2p.memory import run_virtual
from tessera.training.protocols import PIPELINE
from training_run import Node, PipelineWorld
from training_world import small_manifest, verified

STEPS = 25
MANIFEST = small_manifest(steps=STEPS, epoch_steps=5)


def state_of(world: PipelineWorld) -> list[bytes]:
    return [node.checkpoints.load(STEPS) for node in world.nodes]


def assert_all_is_verified(world: PipelineWorld) -> None:
    """What all workers hold together proves every step of everybody."""
    held = [r for node in world.nodes for r in node.book.of_steps(MANIFEST.run_id, range(STEPS))]
    microbatches = verified(MANIFEST, held, [key.id for key in world.keys], range(STEPS))
    assert microbatches == [STEPS * MANIFEST.schedule.microbatches] * 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    async def main() -> list[bytes]:
        world = PipelineWorld(MANIFEST, tmp_path_factory.mktemp("undisturbed"))
        async with world.alive():
            await world.trained(within_s=60)
            assert [node.pipeline.sessions for node in world.nodes] == [1] * 4
            assert [step for step, _ in world.nodes[0].told.losses] == list(range(1, STEPS + 1))
            assert [step for step, _ in world.nodes[3].told.validations] == [*range(0, STEPS, 2), STEPS]
            assert all(node.pipeline.steps_done == STEPS for node in world.nodes)
            sent, tokens = world.nodes[0].pipeline.wire
            assert 9.0 < sent / tokens < 9.6  # 6 of code, 0.75 of frames, 2.6 of receipts: the microbatches are small
            assert world.nodes[3].pipeline.wire == (0, 0)
            assert_all_is_verified(world)
        return state_of(world)

    return run_virtual(main)


async def at_step(node: Node, step: int) -> None:
    reached = anyio.Event()
    node.told.on_step = lambda done: reached.set() if done == step else None
    await reached.wait()


DEATHS = [(0, 13, True), (1, 13, False), (1, 3, True), (3, 13, True)]
MORE_DEATHS = [
    pytest.param(stage, step, violent, marks=pytest.mark.slow)
    for stage in range(4)
    for step in (1, 3, 10, 13, 24)
    for violent in (False, True)
    if (stage, step, violent) not in DEATHS
]


@pytest.mark.parametrize(("stage", "step", "violent"), [*DEATHS, *MORE_DEATHS])
def test_a_worker_that_dies_and_comes_back(
    stage: int, step: int, violent: bool, undisturbed: list[bytes], tmp_path: Path
) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        victim = world.nodes[stage]
        async with world.alive() as tasks:
            await at_step(victim, step)
            if violent:
                world.network.kill(world.keys[stage].id)
            victim.scope.cancel()
            await anyio.sleep(20)
            assert not any(node.pipeline.trained.is_set() for node in world.nodes)
            tasks.start_soon(victim.run)
            await world.trained()
            assert victim.lives == 2
            assert_all_is_verified(world)
        assert state_of(world) == undisturbed

    run_virtual(main)


def test_everybody_dies_and_comes_back(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await at_step(world.nodes[2], 17)
        async with world.alive():
            await world.trained()
            again = [step for step, _ in world.nodes[2].told.losses][17:]
            assert again == list(range(11, STEPS + 1))  # from the checkpoint of step 10
            assert_all_is_verified(world)
        assert state_of(world) == undisturbed

    run_virtual(main)


def test_a_cut_cable_between_two_neighbours(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await at_step(world.nodes[1], 12)
            world.network.partition(world.keys[1].id, world.keys[2].id)
            await anyio.sleep(200)
            assert not world.nodes[0].pipeline.trained.is_set()
            world.network.heal(world.keys[1].id, world.keys[2].id)
            await world.trained()
            assert_all_is_verified(world)
        assert state_of(world) == undisturbed

    run_virtual(main)


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await at_step(world.nodes[3], 21)
        file = tmp_path / "stage-2" / "step-000000020.ckpt"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        async with world.alive():
            await at_step(world.nodes[3], 12)
            assert world.nodes[3].checkpoints.steps() == [0, 10]  # the other one belongs to another past
            await world.trained()
            assert [step for step, _ in world.nodes[2].told.losses].count(11) == 2
        assert state_of(world) == undisturbed

    run_virtual(main)


def test_a_trained_stage_that_restarts_needs_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive() as tasks:
            await world.trained()
            for node in world.nodes[:2]:
                node.scope.cancel()
            tasks.start_soon(world.nodes[1].run)
            await anyio.sleep(5)
            assert world.nodes[1].pipeline.trained.is_set()
            assert world.nodes[1].trainer.step == STEPS

    run_virtual(main)


def test_a_trained_run_that_restarts_is_evaluated_again(undisturbed: list[bytes], tmp_path: Path) -> None:
    """Its end may have been cut off between the last step and the last validation."""

    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await world.trained()
        world.nodes[3].told.validations.clear()
        async with world.alive():
            await world.trained()
            assert world.nodes[3].told.validations == [(STEPS, 3.0)]
        assert state_of(world) == undisturbed

    run_virtual(main)


def test_a_driver_whose_clock_went_back_still_drives(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path, FakeClock(2_000_000_000))
        async with world.alive() as tasks:
            await at_step(world.nodes[0], 5)
            world.nodes[0].scope.cancel()
            await anyio.sleep(1)
            world.clock = FakeClock(1_000_000_000)
            tasks.start_soon(world.nodes[0].run)
            await world.trained()
        assert state_of(world) == undisturbed

    run_virtual(main)


# --- two starts at once, stale ones, and ones that are not his to give ------------------------------------------------


async def starts(world: PipelineWorld, stage: int, number: int, outcomes: list[tuple[int, str]]) -> None:
    try:
        await world.nodes[0].ask(stage, {"op": "start", "session": number, "step": 0})
        outcomes.append((number, "ok"))
    except TesseraError as error:
        outcomes.append((number, error.code))


def test_of_two_starts_at_once_the_newer_wins_and_the_trainer_is_used_by_one(tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await at_step(world.nodes[0], 2)
            outcomes: list[tuple[int, str]] = []
            later = int(world.clock.time() * 1000) + 10**9
            loading = anyio.Event()

            def slowly(name: str, step: int, index: int) -> None:
                anyio.from_thread.run_sync(loading.set)
                time.sleep(0.1)  # real time: the others come while this one still holds the trainer

            world.nodes[3].trainer.before_call = slowly
            world.network.shape(world.keys[0].id, world.keys[3].id, delay_s=0)  # virtual time stands still meanwhile
            async with anyio.create_task_group() as tasks:
                for number in (later, later + 1, later + 2):
                    tasks.start_soon(starts, world, 3, number, outcomes)
                    await loading.wait()
            assert (later + 2, "ok") in outcomes
            assert {code for _, code in outcomes} <= {"ok", "conflict"}
            world.nodes[3].trainer.before_call = lambda name, step, index: None
            await world.trained()  # stage 0 finds out which number comes next

    run_virtual(main)


def test_a_start_changes_no_checkpoint_until_a_step_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await at_step(world.nodes[0], 22)
            held = world.nodes[3].checkpoints.steps()
            assert held == [0, 10, 20]
            await world.nodes[0].ask(3, {"op": "start", "session": 2**52, "step": 0})
            assert world.nodes[3].checkpoints.steps() == held
            await world.trained()

    run_virtual(main)


def test_only_stage_0_drives_and_only_with_newer_sessions(tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await at_step(world.nodes[0], 2)
            driver, follower = world.nodes[0], world.nodes[1]
            for request in ({"op": "status"}, {"op": "start", "session": 2**52, "step": 0}):
                with pytest.raises(Refused, match="only stage 0 drives"):
                    await follower.ask(2, request)
            with pytest.raises(Conflict, match="is not newer than"):
                await driver.ask(2, {"op": "start", "session": 5, "step": 0})
            wrong = (
                {"session": "5", "step": 0},
                {"session": 2**60, "step": 0},
                {"session": 5},
                {"session": True, "step": 0},
            )
            for facts in wrong:
                with pytest.raises(Invalid, match="two integers"):
                    await driver.ask(2, {"op": "start", **facts})
            with pytest.raises(Invalid, match="unknown operation"):
                await driver.ask(2, {"op": "stop"})
            await world.trained(within_s=60)
            assert [node.pipeline.sessions for node in world.nodes] == [1] * 4  # nothing of it disturbed anybody

    run_virtual(main)


async def dial(world: PipelineWorld, opener: int, receiver: int, hello: bytes) -> bytes:
    stream = await world.nodes[opener].transport.open(world.seats[receiver].record, PIPELINE, timeout_s=5)
    await stream.send(hello)
    return await stream.recv(100)


def test_a_link_from_anybody_but_the_stage_above_is_cut(tmp_path: Path) -> None:
    async def main() -> None:
        world = PipelineWorld(MANIFEST, tmp_path)
        async with world.alive():
            await at_step(world.nodes[0], 2)
            for opener, receiver, hello in ((3, 1, b"{}"), (1, 0, b"{}"), (0, 1, b"{}"), (0, 1, b"not canonical")):
                with pytest.raises(Unavailable):
                    await dial(world, opener, receiver, hello)
            await world.trained(within_s=60)
            assert [node.pipeline.sessions for node in world.nodes] == [1] * 4

    run_virtual(main)
