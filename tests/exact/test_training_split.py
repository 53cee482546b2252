"""Training over links against training in one process, both on real stages.

`dense` with a float32 wire loses nothing at a boundary: four peers must equal one undivided model, to 1e-6 relative on
losses and 1e-5 of the largest entry on parameters (the same sums, in another order at most). With the codec the
boundary rounds, so the reference is the same four stages in one process, and peers must equal it to the bit.
"""

from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from crew_world import CrewWorld, Node
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.pipeline import Pipeline
from tessera.models.presets import tiny_spec
from tessera.models.trainer import StageTrainer
from tessera.p2p.memory import run_virtual
from tessera.training.manifest import Manifest, Schedule
from training_world import small_manifest

STAGES, STEPS = 4, 4
SCHEDULE = Schedule(
    steps=STEPS, microbatches=6, sequences=2, length=16, evaluate_every=2, evaluate_batches=2, epoch_steps=2
)


class Windows:
    """Random token ids by name."""

    validation_count = 2

    async def ready(self, step: int) -> None:
        pass

    def train(self, step: int, index: int) -> NDArray[np.int64]:
        return np.random.default_rng(step * 100 + index).integers(0, 300, (2, 17))

    def validation(self, index: int) -> NDArray[np.int64]:
        return np.random.default_rng(10**6 + index).integers(0, 300, (2, 17))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def manifest_of(spec: ModelSpec) -> Manifest:
    return small_manifest().model_copy(update={"model": spec, "schedule": SCHEDULE})


class RealStages(CrewWorld):
    """Workers with real trainers."""

    def make_trainer(self, node: Node) -> StageTrainer:
        return StageTrainer(self.manifest.model, node.stage, steps=STEPS)

    def make_batches(self) -> Windows:
        return Windows()


def over_links(spec: ModelSpec, folder: Path, replicas: int = 1) -> RealStages:
    async def main() -> RealStages:
        world = RealStages(manifest_of(spec), folder, replicas, delay_s=0.01)
        async with world.alive():
            await world.trained()
            await anyio.sleep(2)  # the last receipts
            return world

    return run_virtual(main)


def in_one_process(spec: ModelSpec) -> tuple[list[float], list[float], Pipeline]:
    """Training losses, validation losses, and the trained stages."""
    windows, pipeline = Windows(), Pipeline(spec, steps=STEPS)
    held_out = np.concatenate([windows.validation(i) for i in range(2)])
    losses, validations = [], [pipeline.evaluate(held_out)]
    for step in range(STEPS):
        losses.append(pipeline.train_step(step, [windows.train(step, i) for i in range(SCHEDULE.microbatches)]))
        if (step + 1) % SCHEDULE.evaluate_every == 0:
            validations.append(pipeline.evaluate(held_out))
    return losses, validations, pipeline


def parameters(trainers: list[StageTrainer]) -> dict[str, Tensor]:
    return {name: p.detach() for trainer in trainers for name, p in trainer.stage.named_parameters()}


def test_four_peers_train_like_one_undivided_model(tmp_path: Path) -> None:
    dense = CodecConfig(kind="dense", wire="float32")
    whole, cut = (tiny_spec(count).model_copy(update={"codec": dense}) for count in (1, STAGES))
    losses, validations, pipeline = in_one_process(whole)
    lead = (world := over_links(cut, tmp_path)).nodes[0]
    assert [loss for _, loss in lead.told.losses] == pytest.approx(losses, rel=1e-6)
    assert [loss for _, loss in lead.told.validations] == pytest.approx(validations, rel=1e-6)
    assert_close(pipeline, world, 1e-5)


def assert_close(pipeline: Pipeline, world: RealStages, tolerance: float) -> None:
    theirs, ours = parameters(pipeline.trainers), parameters([node.trainer for node in world.nodes])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        worst = float((ours[name] - tensor).abs().max())
        assert worst <= tolerance * float(tensor.abs().max()), f"{name} differs by {worst}"


def test_four_peers_with_the_codec_equal_the_same_stages_in_one_process_to_the_bit(tmp_path: Path) -> None:
    spec = tiny_spec(STAGES)
    losses, validations, pipeline = in_one_process(spec)
    world = over_links(spec, tmp_path)
    told = world.nodes[0].told
    assert [loss for _, loss in told.losses] == pytest.approx(losses, rel=1e-12)  # summed in another order
    assert [loss for _, loss in told.validations] == pytest.approx(validations, rel=1e-6)  # other batch size
    for node, trainer in zip(world.nodes, pipeline.trainers, strict=True):
        assert node.trainer.save() == trainer.save()
    assert losses[-1] < losses[0]


def test_two_workers_of_each_stage_train_like_one(tmp_path: Path) -> None:
    """The same sums in another order; what rounds, rounds by the same names."""
    spec = tiny_spec(STAGES)
    losses, _, pipeline = in_one_process(spec)
    world = over_links(spec, tmp_path, 2)
    assert [loss for _, loss in world.nodes[0].told.losses] == pytest.approx(losses, rel=1e-4)
    for stage in range(STAGES):
        first, second = world.of_stage(stage)
        assert first.trainer.save() == second.trainer.save()
        assert len(second.told.losses) > 0
    assert_close(pipeline, world, 0.05)  # a code that lies near the middle between two falls to either side


def test_the_receipts_of_real_stages_prove_every_token(tmp_path: Path) -> None:
    world = over_links(tiny_spec(STAGES), tmp_path)
    for stage in range(STAGES):
        assert world.credit_of(stage, range(STEPS)) == STEPS * SCHEDULE.microbatches
