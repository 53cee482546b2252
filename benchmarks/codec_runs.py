"""One training run of the boundary codec's study: its settings, its text, its record in a file that grows.

A run is named by its settings alone, so that a study which was interrupted goes on where it stopped, and one that
asks for more runs trains only those that are missing.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera.core.ids import parse_blob_id
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec, OptimizerConfig
from tessera.models.corpus import read_standard_library
from tessera.models.dataset import Dataset, open_shard, read_index, validation_windows
from tessera.models.dataset_prepare import prepare_dataset, train_on
from tessera.models.pipeline import Pipeline
from tessera.models.presets import Batch
from tessera.p2p.blobs import BlobStore

__all__ = ["MODES", "Record", "Run", "Size", "append", "load", "prepare", "train"]

VALIDATION_WINDOWS = 320
LAST = 100  # steps at the end whose mean training loss is kept


@dataclass(frozen=True)
class Size:
    """What all compared runs share."""

    width: int = 128
    layers: int = 8
    stages: int = 4
    heads: int = 2
    kv_heads: int = 1
    ffn: int = 96
    vocab: int = 1024
    sequences: int = 2
    length: int = 128
    pairs: int = 4096  # rows of the hashed tables of codes and their control
    newton_schulz: int = 3


@dataclass(frozen=True)
class Mode:
    """What crosses the boundaries, and the rates tuned for it. A code has `width / parts` numbers."""

    kind: str
    parts: float = 0
    wire: str = "bfloat16"
    conv: bool = True
    pairs: bool = True
    rates: dict[str, float] = field(default_factory=dict)

    def codec(self, size: Size) -> CodecConfig:
        k = round(size.width / self.parts) if self.parts else 0
        pairs = size.pairs if self.pairs else 0
        return CodecConfig.model_validate(
            {"kind": self.kind, "k": k, "wire": self.wire, "conv": self.conv, "pairs": pairs}
        )


_RATES = {"muon_rate": 0.01, "table_rate": 0.1, "head_rate": 0.02}
_CODE = {**_RATES, "code_rate": 0.0002}
MODES = {
    "dense": Mode("dense", pairs=False, rates=_RATES),
    "control": Mode("control", rates=_RATES),
    "codec": Mode("codec", parts=16 / 3, wire="int4", rates=_CODE),
    "codec d/8 int8": Mode("codec", parts=8, wire="int8", rates=_CODE),
    "codec 3d/16 int5": Mode("codec", parts=16 / 3, wire="int5", rates=_CODE),
    "codec d/4 int4": Mode("codec", parts=4, wire="int4", rates=_CODE),
    "reparam": Mode("reparam", parts=8, conv=False, pairs=False, rates={**_RATES, "muon_rate": 0.02}),
    "ssn": Mode("ssn", parts=8, conv=False, pairs=False, rates={**_RATES, "muon_rate": 0.02}),
}


@dataclass(frozen=True)
class Run:
    """One training run. `changed` are optimiser or model settings that differ from the mode's own."""

    mode: str
    size: Size
    steps: int
    seed: int
    changed: tuple[tuple[str, float], ...] = ()

    def spec(self) -> ModelSpec:
        s, mode = self.size, MODES[self.mode]
        rates = {**mode.rates, "newton_schulz": s.newton_schulz, **dict(self.changed)}
        model = ModelConfig(
            vocab_size=s.vocab, width=s.width, layers=s.layers, heads=s.heads, kv_heads=s.kv_heads, ffn=s.ffn,
            context=s.length, table_std=rates.pop("table_std", 0.3),
        )  # fmt: skip
        optimizer = OptimizerConfig.model_validate(rates)
        return ModelSpec(model=model, codec=mode.codec(s), optimizer=optimizer, stages=s.stages, seed=self.seed)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, flat."""
        spec = self.spec()
        kept = ("muon_rate", "table_rate", "head_rate", "code_rate", "gain_rate")
        return {
            "mode": self.mode,
            "k": spec.codec.k,
            "wire": spec.codec.wire,
            "conv": spec.codec.conv,
            "code_pairs": spec.codec.pairs,
            **{name: getattr(spec.optimizer, name) for name in kept},
            "table_std": spec.model.table_std,
            **asdict(self.size),
            "steps": self.steps,
            "seed": self.seed,
        }


Record = dict[str, Any]  # settings, and what came out


def prepare(vocab: int, part: int = 1) -> Dataset:
    """Every `part`th file of the standard library's sources, in `vocab` tokens; kept in a temporary folder.

    Cost: 10 s the first time for all 10 MB.
    """
    folder = Path(tempfile.gettempdir()) / "tessera-bench-codec"
    blobs, note = BlobStore(folder), folder / f"index-{vocab}-{part}-{platform.python_version()}"
    if not note.exists():
        source = read_standard_library()
        source = replace(source, files=source.files[::part])
        tokenizer = train_on(source, vocab)
        made = prepare_dataset(
            source, tokenizer, blobs.put(tokenizer.to_bytes()), store=blobs, folder=folder / f"part-{vocab}-{part}"
        )
        note.write_text(made.blob)
    index = read_index(blobs.path(parse_blob_id(note.read_text())))
    parts = [open_shard(blobs.path(shard.blob), shard, index.vocab_size) for shard in index.train]
    held = open_shard(blobs.path(index.validation.blob), index.validation, index.vocab_size)
    return Dataset(index.vocab_size, np.concatenate(parts), held)


def train(run: Run, data: Dataset, device: str = "cpu") -> Record:
    """Trains and validates. Losses in nats per token."""
    size, losses = run.size, list[float]()
    started, cpu = time.perf_counter(), time.process_time()
    pipeline = Pipeline(run.spec(), steps=run.steps, device=device)
    batch = Batch(sequences=size.sequences, length=size.length, microbatches=1, steps=run.steps)
    pipeline.train(data, batch, lambda _, loss: losses.append(loss))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    loss = pipeline.evaluate(validation_windows(data.validation, VALIDATION_WINDOWS, size.length))
    return {
        **run.settings(),
        "loss": round(loss, 5),
        "train_loss": round(float(np.mean(losses[-LAST:])), 5),
        "params": pipeline.parameters,
        "seconds": round(seconds, 1),
        "cpu_ms_per_step": round(cpu / run.steps * 1000, 1),
        "device": device,
    }


def load(path: Path) -> list[Record]:
    """Every record in `path`. A last line that was cut off is an error: remove it by hand."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
