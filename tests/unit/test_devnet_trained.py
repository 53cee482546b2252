"""The model of a run, gathered from its workers' checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.core.errors import Invalid, Missing
from tessera.devnet.trained import export_run
from tessera.models.checkpoint import checkpoint_facts
from tessera.models.config import ModelSpec
from tessera.models.pipeline import Pipeline
from tessera.models.plain_folder import PlainFolder
from tessera.models.presets import Kind, preset_codec, tiny_spec
from tessera.models.tokenizer import train_tokenizer
from tessera.p2p.blobs import BlobStore
from tessera.training.checkpoints import Checkpoints
from tessera.training.home import Home
from tessera.training.manifest import Manifest
from training_world import small_manifest

STEPS = 6


def manifest_of(home: Home, kind: Kind) -> Manifest:
    blob = BlobStore(home.blobs).put(train_tokenizer(["def main(): pass\n"] * 2, 300).to_bytes())
    draft = small_manifest(stages=2, steps=STEPS)
    spec: ModelSpec = tiny_spec(2, codec=kind).model_copy(update={"codec": preset_codec(kind, 8)})
    return draft.model_copy(update={"model": spec, "data": draft.data.model_copy(update={"tokenizer": blob})})


def keep(state: Path, manifest: Manifest, stage: int, pipeline: Pipeline) -> None:
    trainer = pipeline.trainers[stage]
    Checkpoints(state / "runs" / manifest.run_id / "checkpoints").save(trainer.step, trainer.save())


def test_a_runs_model_is_written_of_the_newest_step_that_all_its_stages_have(tmp_path: Path) -> None:
    home = Home(tmp_path / "up")
    manifest = manifest_of(home, "reparam")
    pipeline = Pipeline(manifest.model, steps=STEPS)
    here, away = home.path / "workers" / "worker-0", tmp_path / "friend"
    for step in range(3):
        pipeline.train_step(step, [torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(step))])
        keep(here, manifest, 0, pipeline)
        if step < 2:
            keep(away, manifest, 1, pipeline)
            before = pipeline.trainers[1].stage.head.detach().clone()
    with pytest.raises(Missing, match="stage 1 is here"):
        export_run(home, manifest, [], tmp_path / "out")
    assert export_run(home, manifest, [away], tmp_path / "out") == 2
    folder = PlainFolder(tmp_path / "out")
    spec = folder.spec(2, manifest.model.codec.model_copy(update={"kind": "dense", "k": 0}))
    assert torch.equal(folder.stage(spec, 1)["head"], before)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (here / "lock").exists(), "nothing is written where a worker may be at work"


def test_a_run_whose_code_has_no_counterpart_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    home = Home(tmp_path / "up")
    with pytest.raises(Invalid, match="no counterpart"):
        export_run(home, manifest_of(home, "codec"), [], tmp_path / "out")


@pytest.mark.parametrize("head", [b"", b"12345678", (2**40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}"])
def test_what_is_no_checkpoint_says_nothing_of_itself(head: bytes) -> None:
    with pytest.raises(Invalid):
        checkpoint_facts(head)
