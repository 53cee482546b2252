"""What turning the boundaries costs a thief: tokens until shards of two times work together again, and his short cuts.

    python benchmarks/bench_stitching.py [--quick] [--json]

A model of four stages learns real text, and its boundaries turn every few steps by secrets of their owners. The thief
holds stages 0 and 2 of an earlier moment and stages 1 and 3 of the end, so that all three boundaries fit no more. He
has text of the same kind, but no secret. Each point of a curve is a run of its own that decays to rate zero.

    curve           he trains a k x k matrix at each boundary, from the identity, and nothing else
    curve_all       he trains everything, from the stitched shards
    scratch_curve   he trains a new model instead

without tokens, by the orthogonal matrix that best maps one shard's columns onto another's (Procrustes):

    aligned_loss    the stolen encoder onto the stolen decoder: both began as one matrix, and have not moved far apart
    watched_loss    as an owner of the encoder himself, who has seen it at both times

Losses are in nats per token, over the validation split.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.ids import RunId
from tessera.devnet.text import prepare_text
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec, OptimizerConfig
from tessera.models.dataset import Dataset, open_shard, read_index, rows, validation_windows
from tessera.models.dataset_order import WindowOrder
from tessera.models.optim import StageOptimizer, schedule
from tessera.models.pipeline import Pipeline
from tessera.models.rotation import boundary_rotation
from tessera.models.stage import Stage
from tessera.models.trainer import StageTrainer
from tessera.p2p.blobs import BlobStore
from tessera.training.rotation import BoundarySecret, turn_after_step

RESULTS = Path(__file__).parent / "results"
RUN = RunId("ab" * 32)
STAGES, WIDTH, K, LENGTH, SEQUENCES = 4, 128, 16, 128, 4
MATRIX_RATE = 0.02  # of the k x k matrices, by Adam
CLOSE_NATS = 0.05  # "works again": this near to the model that was stolen


@dataclass(frozen=True)
class Case:
    """How much is trained. `fractions` of the model's steps are what the thief spends, one run for each."""

    steps: int
    early: int  # the step whose shards the thief has of stages 0 and 2
    every: int  # steps between two turns
    fractions: tuple[float, ...]
    windows: int


FULL = Case(steps=320, early=260, every=10, fractions=(0.05, 0.15, 0.4), windows=64)
QUICK = Case(steps=8, early=4, every=2, fractions=(0.25, 0.5), windows=8)

SETTING = (
    f"{STAGES} stages of 2 layers, D = {WIDTH}, k = {K}, int8 codes, on the standard library's sources; {FULL.steps} "
    f"steps of\n{SEQUENCES * LENGTH} tokens, turned every {FULL.every}. The thief has stages 0 and 2 of step "
    f"{FULL.early}, 1 and 3 of step {FULL.steps}."
)
LEGEND = f"""target: the last shards together. stitched: what was stolen, as it is. mixed: with the true turns, so that
only the training between the two times is missing. aligned, watched: the thief's own guess at the turns, without a
token, from encoder and decoder, or from one encoder at both times. curve_tokens_ratio: tokens until {CLOSE_NATS} nats
near, as far as the curve's points tell; curve_left_nats: what is left at its end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on little text: the machinery alone")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(read_text(Path(folder), quick=arguments.quick), QUICK if arguments.quick else FULL)
    result |= turning_cost(1024 if arguments.quick else 4096, 64) | facts(time.monotonic() - begun)
    if not arguments.quick:
        write_results(result)
    print(table(result))
    if arguments.json:
        print(json.dumps(result))


def read_text(folder: Path, *, quick: bool) -> Dataset:
    """The standard library's sources; a small part of them for --quick."""
    source = Path(sysconfig.get_paths()["stdlib"]) / "asyncio" if quick else None
    blobs = BlobStore(folder)
    text = prepare_text(source, blobs, folder / "text.json")
    index = read_index(blobs.path(text.index))
    train, aside = (
        open_shard(blobs.path(shard.blob), shard, index.vocab_size) for shard in (index.train[0], index.validation)
    )
    return Dataset(index.vocab_size, train, aside)


def measure(data: Dataset, case: Case) -> dict[str, Any]:
    windows = validation_windows(data.validation, case.windows, LENGTH)
    spec = described(data.vocab_size)
    shards, target = train_victim(spec, data, case, windows)
    times = [case.early, case.steps, case.early, case.steps]
    stitched = [shards[time][stage] for stage, time in enumerate(times)]

    def thief() -> Chain:
        return Chain(spec, stitched)

    def curve(attack: Callable[[int], Chain]) -> list[list[float]]:
        points = []
        for n in (max(1, round(fraction * case.steps)) for fraction in case.fractions):
            points.append([n * SEQUENCES * LENGTH, round(attack(n).loss(windows), 4)])
            print(f"{points[-1][0]:,} tokens: {points[-1][1]} nats", file=sys.stderr, flush=True)
        return points

    own = [encoder(stitched, b).T @ encoder(shards[times[b + 1]], b) for b in range(STAGES - 1)]
    met = [encoder(stitched, b).T @ decoder(stitched, b) for b in range(STAGES - 1)]
    result = {
        "curve": curve(lambda n: thief().train_matrices(batches(data, case.steps, n))),
        "curve_all": curve(lambda n: thief().train_all(batches(data, case.steps, n))),
        "scratch_curve": curve(lambda n: Chain(spec, None).train_all(batches(data, 0, n))),
        "target_loss": round(target, 4),
        "stitched_loss": round(thief().loss(windows), 4),
        "mixed_loss": round(thief().turned(true_turns(case)).loss(windows), 4),
        "aligned_loss": round(thief().turned([polar(m) for m in met]).loss(windows), 4),
        "watched_loss": round(thief().turned([polar(m) for m in own]).loss(windows), 4),
        "tokens_trained": case.steps * SEQUENCES * LENGTH,
        "stolen_numbers": sum(p.numel() for p in thief().parameters()),
        "matrix_numbers": (STAGES - 1) * K * K,
    }
    result["scratch_curve"].append([result["tokens_trained"], result["target_loss"]])
    return result | ratios(result)


def described(vocab_size: int) -> ModelSpec:
    model = ModelConfig(
        vocab_size=vocab_size, width=WIDTH, layers=2 * STAGES, heads=4, kv_heads=2, ffn=2 * WIDTH, context=LENGTH
    )
    return ModelSpec(model=model, codec=CodecConfig(kind="codec", k=K), stages=STAGES)


# --- the model that is stolen -----------------------------------------------------------------------------------------

Shard = dict[str, Tensor]  # a stage's parameters


def train_victim(
    spec: ModelSpec, data: Dataset, case: Case, windows: NDArray[np.int64]
) -> tuple[dict[int, list[Shard]], float]:
    """The shards at both times, and the loss of the last ones together."""
    pipeline, known = Pipeline(spec, steps=case.steps), secrets()
    shards: dict[int, list[Shard]] = {}
    for step, ids in enumerate(batches(data, 0, case.steps)):
        pipeline.train_step(step, [ids])
        for trainer in pipeline.trainers:
            turn_after_step(trainer, RUN, known, case.every)
        if step + 1 in (case.early, case.steps):
            shards[step + 1] = [copy(trainer.stage.state_dict()) for trainer in pipeline.trainers]
    return shards, Chain(spec, shards[case.steps]).loss(windows)


def secrets() -> list[BoundarySecret]:
    return [BoundarySecret(RUN, boundary, 0, bytes([boundary]) * 32) for boundary in range(STAGES - 1)]


def true_turns(case: Case) -> list[Tensor]:
    """From each sender's time to its receiver's: with it, only the training between the times is left of the mismatch.

    Boundary 1 goes back in time: its sender is the later one.
    """
    turns = []
    for secret in secrets():
        turn = torch.eye(K, dtype=torch.float64)
        for epoch in range(case.early // case.every + 1, case.steps // case.every + 1):
            turn = turn @ boundary_rotation(secret.key, RUN, secret.boundary, epoch, K)
        turns.append(turn.T if secret.boundary == 1 else turn)
    return turns


def batches(data: Dataset, first: int, count: int) -> list[NDArray[np.int64]]:
    """Windows [SEQUENCES, LENGTH + 1] of `count` steps from step `first` of one endless order."""
    order = WindowOrder([data.train.size], length=LENGTH, active=1, name=("stitching", 0))
    numbers = range(first * SEQUENCES, (first + count) * SEQUENCES)
    starts = [order.locate(number).start for number in numbers]
    return np.split(rows(data.train, starts, LENGTH), count)


def encoder(shards: Sequence[Shard], boundary: int) -> Tensor:
    """E [D, k] of the stage before the boundary."""
    return shards[boundary][f"codecs.{boundary}.encode"].T


def decoder(shards: Sequence[Shard], boundary: int) -> Tensor:
    """D [D, k] of the stage after it."""
    return shards[boundary + 1][f"codecs.{boundary + 1}.decode"]


def copy(shard: Shard) -> Shard:
    return {name: tensor.clone() for name, tensor in shard.items()}


# --- the thief --------------------------------------------------------------------------------------------------------


class Chain:
    """All stages in one process without a wire, with a matrix at each boundary. `shards` None: a new model."""

    def __init__(self, spec: ModelSpec, shards: Sequence[Shard] | None) -> None:
        # A thief goes on with half the rates, which would otherwise undo what he has stolen before they repair it.
        self.spec = spec if shards is None else spec.model_copy(update={"optimizer": slower(spec.optimizer, 0.5)})
        self.stages = [Stage(self.spec, stage) for stage in range(STAGES)]
        for stage, shard in zip(self.stages, shards or [], strict=shards is not None):
            stage.load_state_dict(shard)
        self.matrices = [torch.eye(K, requires_grad=True) for _ in range(STAGES - 1)]

    def parameters(self) -> list[Tensor]:
        return [parameter for stage in self.stages for parameter in stage.parameters()]

    def turned(self, turns: Sequence[Tensor]) -> Chain:
        """With c R in place of each boundary's code c."""
        self.matrices = [turn.to(torch.float32).detach().requires_grad_() for turn in turns]
        return self

    def mean_loss(self, ids: NDArray[np.int64]) -> Tensor:
        tokens, message = torch.from_numpy(ids), None
        for stage, matrix in zip(self.stages, [*self.matrices, None], strict=True):
            message = stage(tokens[:, :-1], message)
            if matrix is not None:
                message = message @ matrix
        assert message is not None
        return F.cross_entropy(message.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def loss(self, windows: NDArray[np.int64]) -> float:
        """Over all windows, a few at a time."""
        parts = np.array_split(windows, max(1, len(windows) // 8))
        return sum(float(self.mean_loss(part)) * len(part) for part in parts) / len(windows)

    def train_matrices(self, data: list[NDArray[np.int64]]) -> Chain:
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        adam = torch.optim.Adam(self.matrices, lr=MATRIX_RATE, betas=(0.9, 0.95))
        for step, ids in enumerate(data):
            adam.param_groups[0]["lr"] = MATRIX_RATE * schedule(step, len(data), 1)
            adam.zero_grad()
            self.mean_loss(ids).backward()
            adam.step()
        return self

    def train_all(self, data: list[NDArray[np.int64]]) -> Chain:
        optimizers = [StageOptimizer(stage, len(data)) for stage in self.stages]
        for step, ids in enumerate(data):
            self.mean_loss(ids).backward()
            for optimizer in optimizers:
                optimizer.step(step, 1)
        return self


def polar(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix: the R that maps A onto B best, for matrix = Aᵀ B (Schönemann 1966)."""
    u, _, v = torch.linalg.svd(matrix.to(torch.float64))
    return u @ v


def slower(config: OptimizerConfig, factor: float) -> OptimizerConfig:
    names = ("muon_rate", "table_rate", "head_rate", "code_rate", "gain_rate")
    return config.model_copy(update={name: factor * getattr(config, name) for name in names})


# --- figures ----------------------------------------------------------------------------------------------------------


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Tokens until a curve is CLOSE_NATS near the target ÷ tokens of the training; None when it never is."""
    found: dict[str, Any] = {}
    for name in ("curve", "curve_all"):
        near = [tokens for tokens, loss in result[name] if loss <= result["target_loss"] + CLOSE_NATS]
        found[f"{name}_tokens_ratio"] = round(near[0] / result["tokens_trained"], 3) if near else None
        found[f"{name}_left_nats"] = round(result[name][-1][1] - result["target_loss"], 4)
    return found


def turning_cost(width: int, k: int) -> dict[str, Any]:
    """CPU time that a large stage's turn takes: both ends, parameters and both moments. The median of nine."""
    model = ModelConfig(vocab_size=64, width=width, layers=3, heads=32, kv_heads=1, ffn=8, context=8)
    trainer = StageTrainer(ModelSpec(model=model, codec=CodecConfig(kind="codec", k=k), stages=3), 1, steps=2)
    trainer.load(trainer.save())  # from here on there are moments
    times = []
    for _ in range(9):
        begun = time.thread_time()
        turn_after_step(trainer, RUN, secrets(), 1)
        times.append(time.thread_time() - begun)
    seconds = sorted(times)[4]
    return {"turn_ms": round(1000 * seconds, 2), "turn_overhead_30s": round(seconds / 30, 6)}


def facts(seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": "python benchmarks/bench_stitching.py",
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in result.items() if not isinstance(value, list)]
    lines += ["", "| tokens ÷ those trained | k x k | everything | new model |", "|---|---|---|---|"]
    names = ("curve", "curve_all", "scratch_curve")
    for points in zip(*(result[name] for name in names), strict=False):
        losses = " | ".join(f"{loss:.3f}" for _, loss in points)
        lines.append(f"| {points[0][0] / result['tokens_trained']:.3f} | {losses} |")
    return "\n".join(lines)


def write_results(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "stitching.json").write_text(json.dumps(result, indent=1) + "\n")
    name = f"stitching_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}.md"
    text = f"# Shards of two times\n\n{result['hardware']}, Python {result['python']}, one thread.\n"
    text += f"`{result['command']}`\n\n{SETTING}\n\n{table(result)}\n\n{LEGEND}\n"
    (RESULTS / name).write_text(text)


if __name__ == "__main__":
    main()
