"""Four stages in four processes over encrypted peer links, against the same model in one process on the same cores.

    python benchmarks/bench_pipeline.py [--quick] [--json]

Both sides train the default model on the same random tokens with the same `StageTrainer`. The one process has all
stages and, in turns, one torch thread or one for each core: the faster counts. Each of the four has one stage and one
thread. The ratio is tokens per second, split ÷ whole, in the same run. The profile says what each of the four did.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import resource
import tempfile
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STAGES = 4
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    warm, steps, rounds = (1, 6, 1) if arguments.quick else (3, 30, 3)
    whole, split, profile = [], [], []
    for _ in range(rounds):  # in turns, so that a slow moment of the machine hits both
        whole += [run_whole(warm, steps, threads) for threads in sorted({1, os.cpu_count() or 1})]
        rate, profile = run_split(warm, steps)
        split.append(rate)
    result = summary(max(whole), max(split), profile)
    if not arguments.quick:
        write_results(result, profile, steps, rounds)
    print(table(result, profile))
    if arguments.json:
        print(json.dumps({key: result[key] for key in FIGURES}))


FIGURES = (
    "tokens_per_s_ratio", "wire_bytes_per_token", "dense_bytes_per_token", "split_tokens_per_s", "whole_tokens_per_s",
)  # fmt: skip


def run_whole(warm: int, steps: int, threads: int) -> float:
    """Tokens per second of one process with all stages. In a process of its own, as fresh as the others."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=whole_process, args=(theirs, warm, steps, threads))
    process.start()
    seconds = ours.recv()
    process.join()
    return manifest(warm + steps).tokens_per_step * steps / seconds


def whole_process(pipe: Connection, warm: int, steps: int, threads: int) -> None:
    import torch

    from tessera.models.trainer import StageTrainer

    torch.set_num_threads(threads)
    described = manifest(warm + steps)
    trainers = [StageTrainer(described.model, stage, steps=warm + steps) for stage in range(STAGES)]
    batches = RandomBatches(described)
    started = 0.0
    for step in range(warm + steps):
        if step == warm:
            started = time.perf_counter()
        for index in range(described.schedule.microbatches):
            ids, payload = batches.train(step, index), None
            for trainer in trainers:
                payload = trainer.forward(step, index, ids, payload)
            for trainer in reversed(trainers):
                payload = trainer.backward(step, index, payload)
        for trainer in trainers:
            trainer.finish_step(step, described.tokens_per_step)
    pipe.send(time.perf_counter() - started)


def run_split(warm: int, steps: int) -> tuple[float, list[dict[str, float]]]:
    """Tokens per second of four processes, and each one's profile."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    seeds = [os.urandom(32) for _ in range(STAGES)]
    for stage in range(STAGES):
        ours, theirs = context.Pipe()
        process = context.Process(target=stage_process, args=(theirs, stage, seeds, warm, steps))
        process.start()
        pipes.append(ours)
        processes.append(process)
    records = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(records)
    profile = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return manifest(warm + steps).tokens_per_step * steps / profile[0]["wall_s"], profile


def stage_process(pipe: Connection, stage: int, seeds: list[bytes], warm: int, steps: int) -> None:
    import anyio
    import structlog
    import torch

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    torch.set_num_threads(1)
    anyio.run(run_stage, pipe, stage, seeds, warm, steps)


async def run_stage(pipe: Connection, stage: int, seeds: list[bytes], warm: int, steps: int) -> None:
    """One worker: say where he is, learn where the others are, train, send the profile."""
    import anyio

    from tessera.core.clock import SystemClock
    from tessera.core.signing import AccountKey, PeerKey
    from tessera.models.trainer import StageTrainer
    from tessera.p2p.iroh_transport import IrohTransport
    from tessera.p2p.transport import PeerRecord
    from tessera.training.book import ReceiptBook
    from tessera.training.checkpoints import Checkpoints
    from tessera.training.copies import NoCopies
    from tessera.training.exchange import Exchange
    from tessera.training.gate import AlwaysOpen
    from tessera.training.pipeline import Pipeline
    from tessera.training.roster import Roster, Seat
    from tessera.training.sums import Sums
    from tessera.training.work import NoRecords

    described = manifest(warm + steps)
    key, account = PeerKey(seeds[stage]), AccountKey(b"\1" * 32).account
    trainer = TimedTrainer(StageTrainer(described.model, stage, steps=warm + steps))
    watch = Stopwatch(warm, trainer)
    async with IrohTransport.start(key, bind="127.0.0.1:0") as transport:
        pipe.send(transport.record().to_text())
        records = [PeerRecord.from_text(text) for text in pipe.recv()]
        seats = tuple(Seat(number, record, account, bytes(65)) for number, record in enumerate(records))
        roster = Roster(described.run_id, STAGES, seats, account, account, account)
        exchange = Exchange(transport, key, described.run_id, dict, limit_bytes=trainer.gradient_bytes)
        with tempfile.TemporaryDirectory() as folder:
            book = ReceiptBook(Path(folder) / "book.sqlite")
            watch.pipeline = pipeline = Pipeline(
                described,
                stage=stage,
                key=key,
                transport=transport,
                trainer=trainer,
                batches=RandomBatches(described),
                book=book,
                checkpoints=Checkpoints(Path(folder) / "checkpoints"),
                sums=Sums(exchange, trainer, described.tokens_per_step),
                roster=lambda: roster,
                refresh=anyio.lowlevel.checkpoint,
                watcher=watch,
                gate=AlwaysOpen(),
                clock=SystemClock(),
                records=NoRecords(),
                copies=NoCopies(),
            )
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pipeline.run)
                while not pipeline.trained.is_set():
                    await anyio.sleep(0.05)
                pipe.send(watch.profile())
                await anyio.sleep(0.5)  # the others hear the end, too
                tasks.cancel_scope.cancel()
            book.close()


class TimedTrainer:
    """Passes on, and adds up what computing costs: wall time, and CPU time of the thread that computes."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.wall_s = self.cpu_s = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._trainer, name)
        if name not in ("forward", "backward", "finish_step"):
            return method

        def timed(*arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return method(*arguments)
            finally:
                self.wall_s += time.perf_counter() - wall
                self.cpu_s += time.thread_time() - cpu

        return timed


class Stopwatch:
    """A pipeline's watcher: starts counting after the warm-up steps."""

    pipeline: Any

    def __init__(self, warm: int, trainer: TimedTrainer) -> None:
        self._warm, self._trainer = warm, trainer
        self._start: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
        self._end = self._start
        self._wire = (0, 0)

    def step_done(self, step: int, loss: float | None) -> None:
        now = (time.perf_counter(), _cpu_s(), self._trainer.wall_s, self._trainer.cpu_s)
        if step == self._warm:
            self._start = now
        self._end, self._wire = now, self.pipeline.wire

    def validated(self, steps: int, loss: float) -> None:
        pass

    def profile(self) -> dict[str, float]:
        wall, cpu, compute_wall, compute_cpu = (b - a for a, b in zip(self._start, self._end, strict=True))
        return {
            "wall_s": wall,
            "compute_cpu_s": compute_cpu,
            "waiting_for_a_core_s": compute_wall - compute_cpu,
            "link_cpu_s": cpu - compute_cpu,
            "idle_s": wall - compute_wall,
            "wire_bytes": float(self._wire[0]),
            "wire_tokens": float(self._wire[1]),
        }


class RandomBatches:
    """Random tokens by name; no validation."""

    validation_count = 0

    def __init__(self, described: Any) -> None:
        self._schedule, self._vocab = described.schedule, described.model.model.vocab_size

    async def ready(self, step: int) -> None:
        pass

    def train(self, step: int, index: int) -> Any:
        import numpy as np

        shape = (self._schedule.sequences, self._schedule.length + 1)
        return np.random.default_rng(step * 10_000 + index).integers(0, self._vocab, shape)

    def validation(self, index: int) -> Any:
        raise IndexError(index)


def manifest(steps: int) -> Any:
    """The default run, cut to `steps`."""
    from tessera.core.signing import AccountKey
    from tessera.models.presets import DEFAULT_BATCH, default_spec
    from tessera.training.manifest import Allocation, DataRecipe, DataSet, Manifest, Part, Schedule

    account = AccountKey(b"\1" * 32).account
    batch = DEFAULT_BATCH
    return Manifest(
        name="bench",
        chain_id=1,
        model=default_spec(STAGES),
        data=DataRecipe(tokenizer="00" * 32, sets=(DataSet(index="00" * 32, weight=1, account=account),)),
        schedule=Schedule(
            steps=steps,
            microbatches=batch.microbatches,
            sequences=batch.sequences,
            length=batch.length,
            evaluate_every=10**6,
            evaluate_batches=1,
            epoch_steps=steps,
        ),
        allocation=Allocation(work=10_000, data=(Part(account=account, bps=0),), creator=Part(account=account, bps=0)),
        price_units=1,
    )


def summary(whole: float, split: float, profile: list[dict[str, float]]) -> dict[str, Any]:
    tokens = sum(stage["wire_tokens"] for stage in profile)
    return {
        "tokens_per_s_ratio": round(split / whole, 3),
        "wire_bytes_per_token": round(sum(stage["wire_bytes"] for stage in profile) / tokens, 2),
        "dense_bytes_per_token": manifest(1).model.dense_bytes_per_token(),
        "split_tokens_per_s": round(split),
        "whole_tokens_per_s": round(whole),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "command": "python benchmarks/bench_pipeline.py",
    }


PARTS = {
    "compute_cpu_s": "computing",
    "waiting_for_a_core_s": "ready, waiting for a core",
    "link_cpu_s": "links, signing, encryption (CPU)",
    "idle_s": "waiting for a neighbour, links included",
}


def table(result: dict[str, Any], profile: list[dict[str, float]]) -> str:
    lines = [f"| {name} | {result[name]} |" for name in FIGURES]
    lines = ["| figure | value |", "|---|---|", *lines, "", "Seconds of the last round:", ""]
    lines.append("| stage | " + " | ".join(PARTS.values()) + " | all |")
    lines.append("|---|" + "---|" * (len(PARTS) + 1))
    for stage, row in enumerate(profile):
        cells = " | ".join(f"{row[part]:.2f}" for part in PARTS)
        lines.append(f"| {stage} | {cells} | {row['wall_s']:.2f} |")
    return "\n".join(lines)


def write_results(result: dict[str, Any], profile: list[dict[str, float]], steps: int, rounds: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pipeline.json").write_text(json.dumps(result, indent=1) + "\n")
    name = f"pipeline_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}.md"
    text = f"# Split against whole\n\n{steps} steps, {rounds} rounds in turns, the best of each; {result['hardware']}, "
    text += f"Python {result['python']}.\n`{result['command']}`\n\n{table(result, profile)}\n"
    (RESULTS / name).write_text(text)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
