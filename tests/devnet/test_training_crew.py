"""Several workers for each stage: nobody's death costs a step, and nothing is counted twice or lost."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from crew_world import CrewWorld, Node
from tessera.core import encoding
from tessera.core.errors import Unavailable
from tessera.p2p.memory import run_virtual
from tessera.p2p.transport import PeerRecord
from tessera.training.protocols import CONTROL, PIPELINE
from training_world import small_manifest

STEPS = 25
MANIFEST = small_manifest(steps=STEPS, epoch_steps=5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    async def main() -> list[bytes]:
        world = CrewWorld(MANIFEST, tmp_path_factory.mktemp("undisturbed"))
        async with world.alive():
            await world.trained(within_s=60)
            assert [node.pipeline.sessions for node in world.nodes] == [1] * 4
            assert [step for step, _ in world.nodes[0].told.losses] == list(range(1, STEPS + 1))
            assert [step for step, _ in world.nodes[0].told.validations] == [*range(0, STEPS, 2), STEPS]
            assert all(loss == pytest.approx(5.0 - 0.1 * (step - 1)) for step, loss in world.nodes[0].told.losses)
            assert all(node.pipeline.steps_done == STEPS for node in world.nodes)
            await anyio.sleep(2)  # the last receipts
            return [world.params(stage)[0] for stage in range(4)]

    return run_virtual(main)


def test_every_microbatch_is_paid_for_at_every_stage(tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        async with world.alive():
            await world.trained()
            await anyio.sleep(2)
        for stage in range(4):
            assert world.credit_of(stage, range(STEPS)) == STEPS * 3

    run_virtual(main)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_more_workers_come_to_the_same_parameters(replicas: int, undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path, replicas)
        async with world.alive():
            await world.trained()
            await anyio.sleep(2)
            for stage in range(4):
                assert world.params(stage) == [undisturbed[stage]] * replicas
        for stage in range(4):
            assert world.credit_of(stage, range(STEPS)) == STEPS * 3

    run_virtual(main)


@pytest.mark.parametrize("victim", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_a_dying_worker_costs_no_step(victim: int, undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path, 2)
        async with world.alive():
            await world.at_step(7)
            world.nodes[victim].kill()
            await world.trained()
            await anyio.sleep(2)
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}
            for node in world.nodes:
                if node.number != victim:
                    assert [step for step, _ in node.told.losses] == list(range(1, STEPS + 1))
        for stage in range(4):
            assert world.credit_of(stage, range(STEPS)) == STEPS * 3

    run_virtual(main)


@pytest.mark.slow
def test_workers_who_come_later_get_in_step_and_work(tmp_path: Path) -> None:
    manifest = small_manifest(steps=80, epoch_steps=5)

    async def main() -> None:
        world = CrewWorld(manifest, tmp_path, delay_s=0.02)
        async with world.alive() as tasks:
            await world.at_step(7)
            late = [world.add(stage) for stage in (2, 0, 3)]
            for worker in late:
                await world.start(tasks, worker)
            await world.trained()
            await anyio.sleep(2)
            for stage in range(4):
                assert len(set(world.params(stage))) == 1
            assert world.nodes[0].pipeline.sessions == 1
            for worker in late:
                assert len(worker.told.losses) > 20
                assert await worker.pipeline.may_leave()
            assert not await world.nodes[1].pipeline.may_leave()
        for stage in range(4):
            assert world.credit_of(stage, range(80)) == 80 * 3
        paid = {receipt.worker for receipt in world.receipts(range(80))}
        assert {worker.key.id for worker in late} <= paid

    run_virtual(main)


def test_a_stage_that_is_gone_comes_back_from_its_checkpoint(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        async with world.alive() as tasks:
            await world.at_step(17)
            world.nodes[2].kill()
            await anyio.sleep(30)
            await world.start(tasks, world.nodes[2])
            await world.trained()
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}

    run_virtual(main)


def test_all_workers_restarted_at_once_go_on_from_the_last_checkpoint(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        async with world.alive():
            await world.at_step(17)
        async with world.alive():
            await world.trained()
            again = [step for step, _ in world.nodes[2].told.losses][-15:]
            assert again == list(range(11, STEPS + 1))
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}

    run_virtual(main)


@pytest.mark.slow
def test_a_cut_cable_between_two_neighbours(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        async with world.alive():
            await world.at_step(12)
            world.network.partition(world.nodes[1].key.id, world.nodes[2].key.id)
            await anyio.sleep(200)
            assert not world.nodes[0].pipeline.trained.is_set()
            world.network.heal(world.nodes[1].key.id, world.nodes[2].key.id)
            await world.trained()
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}

    run_virtual(main)


def test_a_cut_cable_is_gone_around(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path, 2)
        async with world.alive():
            await world.at_step(7)
            world.network.partition(world.nodes[1].key.id, world.nodes[2].key.id)
            await world.trained(within_s=200)
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}

    run_virtual(main)


@pytest.mark.slow
def test_workers_killed_and_restarted_again_and_again(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path, 2)
        rng = random.Random(7)
        async with world.alive() as tasks:
            for step in range(3, STEPS - 3, 3):
                await world.at_step(step)
                node = world.nodes[rng.randrange(8)]
                node.kill()
                await anyio.sleep(5)
                await world.start(tasks, node)
                await anyio.sleep(10)
            await world.trained()
            await anyio.sleep(5)
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}
        for stage in range(4):
            assert world.credit_of(stage, range(STEPS)) == STEPS * 3

    run_virtual(main)


@pytest.mark.slow
def test_a_stage_whose_only_worker_rests_makes_the_run_wait(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        gate = world.nodes[2].gate = Shut()
        async with world.alive():
            await world.at_step(5)
            gate.reason = "somebody is at the keyboard"
            await anyio.sleep(300)
            steps = world.nodes[0].pipeline.steps_done
            await anyio.sleep(300)
            assert world.nodes[0].pipeline.steps_done == steps < STEPS
            assert "keyboard" in world.nodes[0].pipeline.trouble
            gate.reason = ""
            await world.trained()
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}

    run_virtual(main)


@dataclass
class Shut:
    """A gate that a test opens and shuts."""

    reason: str = ""

    async def wait_open(self) -> None:
        while self.reason:
            await anyio.sleep(1)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(undisturbed: list[bytes], tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        async with world.alive():
            await world.at_step(21)
        file = tmp_path / "worker-2" / "step-000000020.ckpt"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        async with world.alive():
            await world.trained()
            assert [step for step, _ in world.nodes[2].told.losses].count(11) == 2
            for stage in range(4):
                assert set(world.params(stage)) == {undisturbed[stage]}

    run_virtual(main)


def test_a_trained_stage_that_restarts_needs_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        async with world.alive() as tasks:
            await world.trained()
            for node in world.nodes[:2]:
                node.kill()
            await world.start(tasks, world.nodes[1])
            await anyio.sleep(5)
            assert world.nodes[1].pipeline.trained.is_set()
            assert world.nodes[1].trainer.step == STEPS

    run_virtual(main)


async def dial(node: Node, record: PeerRecord, protocol: str, hello: bytes) -> bytes:
    """What is answered to a hello."""
    stream = await node.transport.open(record, protocol, timeout_s=5)
    await stream.send(hello)
    return await stream.recv(1000)


def test_only_workers_of_stage_0_lead_and_only_one_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path, 2)
        async with world.alive():
            await world.at_step(2)
            hello = encoding.encode({"run_id": MANIFEST.run_id})
            record = world.nodes[2].transport.record()
            with pytest.raises(Unavailable):  # a worker of stage 3
                await dial(world.nodes[3], record, CONTROL, hello)
            # the second one of stage 0, while the first one leads
            assert encoding.decode(await dial(world.nodes[4], record, CONTROL, hello), 1000)["op"] == "refused"
            await world.trained(within_s=60)
            assert [node.pipeline.sessions for node in world.nodes] == [1] * 8  # nothing of it disturbed anybody

    run_virtual(main)


def test_a_link_from_anybody_but_the_stage_above_is_cut(tmp_path: Path) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path)
        async with world.alive():
            await world.at_step(2)
            for opener, receiver, hello in ((3, 1, b"{}"), (1, 0, b"{}"), (0, 1, b"{}"), (0, 1, b"not canonical")):
                with pytest.raises(Unavailable):
                    await dial(world.nodes[opener], world.nodes[receiver].transport.record(), PIPELINE, hello)
            await world.trained(within_s=60)
            assert [node.pipeline.sessions for node in world.nodes] == [1] * 4

    run_virtual(main)


def test_late_microbatches_are_dropped_where_the_manifest_says_so(tmp_path: Path) -> None:
    schedule = MANIFEST.schedule.model_copy(update={"drop_late": True, "microbatches": 8, "steps": 12})
    manifest = MANIFEST.model_copy(update={"schedule": schedule})

    async def main() -> None:
        world = CrewWorld(manifest, tmp_path, compute_s={"forward": 0.1, "backward": 0.2})
        async with world.alive():
            await world.at_step(6)
            world.nodes[1].slowness = 100.0  # its owner plays a game
            await world.at_step(7)
            world.nodes[1].slowness = 1.0
            await world.trained()
        steps = [len({m for r in world.receipts(range(s, s + 1)) for m in r.microbatches}) for s in range(12)]
        assert min(steps) < 8
        assert steps[:5] == [8] * 5

    run_virtual(main)


@pytest.mark.slow
def test_the_slower_of_two_gets_less_and_does_not_hold_the_others_up(tmp_path: Path) -> None:
    schedule = MANIFEST.schedule.model_copy(update={"microbatches": 12, "steps": 12})
    manifest = MANIFEST.model_copy(update={"schedule": schedule})

    async def main() -> None:
        world = CrewWorld(manifest, tmp_path, 2, compute_s={"forward": 0.1, "backward": 0.2})
        slow = world.of_stage(1)[1]
        slow.slowness = 3.0
        async with world.alive():
            await world.trained()
            await anyio.sleep(2)
        mine = [len(r.microbatches) for r in world.receipts(range(6, 12)) if r.worker == slow.key.id]
        assert mine
        assert sum(mine) / 12 < 4  # twice in each step, by those above and by those below; a quarter is his

    run_virtual(main)


@pytest.mark.slow
def test_a_worker_who_hangs_is_left_out_and_his_work_done_by_the_other(
    undisturbed: list[bytes], tmp_path: Path
) -> None:
    async def main() -> None:
        world = CrewWorld(MANIFEST, tmp_path, 2, compute_s={"forward": 0.1, "backward": 0.2})
        async with world.alive():
            await world.at_step(8)
            before = anyio.current_time()
            world.of_stage(2)[1].slowness = 1e5
            await world.at_step(10)
            assert anyio.current_time() - before < 60
            world.of_stage(2)[1].slowness = 1.0
            with anyio.fail_after(600):
                while world.nodes[0].pipeline.steps_done < STEPS:
                    await anyio.sleep(0.1)
            assert world.nodes[2].trainer.params == undisturbed[2]

    run_virtual(main)


@pytest.mark.slow
def test_with_rounds_workers_step_alone_and_come_together_now_and_then(tmp_path: Path) -> None:
    averaging = MANIFEST.averaging.model_copy(update={"every": 5})
    manifest = MANIFEST.model_copy(update={"averaging": averaging})

    async def main() -> None:
        world = CrewWorld(manifest, tmp_path, 2)
        async with world.alive() as tasks:
            await world.at_step(7)
            late_worker = world.add(2)
            await world.start(tasks, late_worker)
            await world.trained()
            await anyio.sleep(2)
            assert world.nodes[0].pipeline.sessions == 1
            assert {kind for kind, _ in world.board.parts} == {(n,) for n in range(1, 6)}  # states, and no gradients
            assert late_worker.told.losses
        for stage in range(4):
            assert world.credit_of(stage, range(STEPS)) == STEPS * 3

    run_virtual(main)
