"""A model that a run trained, written as a checkpoint folder: its stages gathered from the checkpoints of its workers.

Nobody holds all of a model while it is trained. Whoever writes it out needs the state directories of one worker for
each stage: on one machine (`tessera up`) they lie together; else their owners hand over what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from tessera.core.errors import Invalid, Missing
from tessera.devnet.text import load_tokenizer
from tessera.models.checkpoint import CHECKPOINT_HEAD, checkpoint_facts
from tessera.models.plain_export import check_plain, export_plain
from tessera.models.tokenizer import END
from tessera.models.trainer import StageTrainer
from tessera.p2p.blobs import BlobStore
from tessera.training.checkpoints import Checkpoints
from tessera.training.home import Home
from tessera.training.manifest import Manifest

__all__ = ["export_run"]


def export_run(home: Home, manifest: Manifest, others: Sequence[Path], folder: Path) -> int:
    """Write the model of a run as far as all its stages are known here. Returns: the step that it is of.

    Args:
        others: more state directories to look in.

    Raises: Invalid: the model has no plain form; Missing: no step is here of all stages; as `export_plain`.
    """
    spec = manifest.model
    check_plain(spec)
    found: dict[int, dict[int, Checkpoints]] = {stage: {} for stage in range(spec.stages)}
    for checkpoints in _checkpoints([home.path, *others], manifest.run_id):
        for step in checkpoints.steps():
            with suppress(Missing, Invalid):  # it left meanwhile, or is damaged: another may be whole
                facts = checkpoint_facts(checkpoints.read(step, 0, CHECKPOINT_HEAD))
                if facts.get("spec") == spec.digest() and facts.get("stage", "").isdecimal():
                    found.get(int(facts["stage"]), {})[step] = checkpoints
    absent = [str(stage) for stage, steps in found.items() if not steps]
    if absent:
        where = "give the state directories of their workers with --from"
        raise Missing(f"no checkpoint of stage {', '.join(absent)} is here: {where}")
    common = set.intersection(*(set(steps) for steps in found.values()))
    if not common:
        raise Missing("the stages that are here have no step in common: let the run go on to its next checkpoint")
    step = max(common)

    def params(stage: int) -> dict[str, Tensor]:
        trainer = StageTrainer(spec, stage, steps=manifest.schedule.steps)
        trainer.load(found[stage][step].load(step))
        return dict(trainer.whole_stage().named_parameters())

    tokenizer = load_tokenizer(BlobStore(home.blobs), manifest.tokenizer)
    export_plain(spec, params, folder, ends=(END,), files=tokenizer.plain_files())
    return step


def _checkpoints(states: Sequence[Path], run_id: str) -> Iterator[Checkpoints]:
    """Of each state directory, and of the workers that a host runs itself."""
    for state in states:
        for place in (state, *sorted(state.glob("workers/*"))):
            folder = place / "runs" / run_id / "checkpoints"
            if folder.is_dir():
                yield Checkpoints(folder, reading=True)
