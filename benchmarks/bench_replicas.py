"""Replicas of a stage: what keeping them together costs on the wire, and what one of them can spoil.

    python benchmarks/bench_replicas.py [--quick] [--json] [--only sparse]

A small model in two stages learns a made-up language in one process, with 2 or 4 replicas of each stage that exchange
the bytes that peers would. Every figure compares runs on the same microbatches from the same initial values. Replicas
that average gradients are equal to the bit (`tests/exact/test_models_replicas.py`), so one trainer computes for all.

    sparse    two replicas step alone and average a part of their parameters now and then, against two that average
              their gradients in each step: bytes that a replica sends the other, and losses, for two seeds
    churn     one of the two workers of a stage is killed every 50 steps, and comes back: steps that are lost or made
    twice,
              and the loss on validation against an undisturbed run's; the real lead, links and receipts in virtual time
    joining   a worker joins in the middle over home links: how much longer the others' steps take until he works
    one_liar  of four replicas that average their gradients robustly, one turns its part around, or makes it ten times
              as large, in every stage and step: the worst loss over that of four honest ones that average plainly
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # their worlds of workers in virtual time
VOCABULARY, LENGTH, SEQUENCES = 64, 64, 32  # sequences of a step, over all replicas
STEPS, QUICK_STEPS = 400, 6
EVERY, PARTITIONS = 2, 13  # a round starts every 2 steps and averages 1/13 of the parameters: each comes every 26 steps
LAG = 1  # steps that go on while a round's parts travel
SEEDS = (0, 1)

Figures = dict[str, float]
Part = Callable[[bytes], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    names = [measure.__name__ for measure in MEASUREMENTS]
    parser.add_argument("--only", choices=names, help="one measurement; the others' results stay as they are")
    arguments = parser.parse_args()
    figures: Figures = {}
    for measure in MEASUREMENTS:
        if arguments.only not in (None, measure.__name__):
            continue
        started = time.perf_counter()
        found = measure(arguments.quick)
        print(f"{measure.__name__}, {time.perf_counter() - started:.0f} s: {found}", flush=True)
        figures |= found
    if not arguments.quick:
        write_results(figures)
    print(table(figures))
    if arguments.json:
        print(json.dumps(figures))


# --- replicas on slow links -----------------------------------------------------------------------------------------


def sparse(quick: bool) -> Figures:
    """Sparse averaging against gradients in each step."""
    steps, seeds = (QUICK_STEPS, SEEDS[:1]) if quick else (STEPS, SEEDS)
    exact = [train_exact(seed, steps, 2) for seed in seeds]
    apart = [train_sparse(seed, steps, 2) for seed in seeds]
    gaps = [ours - theirs for (ours, _), (theirs, _) in zip(apart, exact, strict=True)]
    losses = [loss for loss, _ in exact]
    return {
        "sync_bytes_ratio": apart[0][1] / exact[0][1],
        "sync_bytes_ratio_to_bfloat16": 2 * apart[0][1] / exact[0][1],
        "sync_loss_delta": statistics.mean(gaps),
        "sync_loss_delta_worst": max(gaps),
        "sync_loss_exact": statistics.mean(losses),
        "sync_loss_seed_spread": max(losses) - min(losses),
    }


def train_exact(
    seed: int, steps: int, replicas: int, *, robust: bool = False, lie: Part | None = None
) -> tuple[float, int]:
    """(loss on validation, bytes that a replica sends to another one).

    Args:
        lie: what the last replica of each stage does to its parts.
    """
    from tessera.models.config import AveragingConfig
    from tessera.models.pipeline import Pipeline
    from tessera.models.trainer import StageTrainer

    pipeline, sent = Pipeline(spec(seed), steps=steps), 0
    averaging = AveragingConfig(robust=robust)
    trainers = [StageTrainer(spec(seed), stage, steps=steps, averaging=averaging) for stage in range(2)]
    pipeline.trainers = trainers
    for step in range(steps):
        parts: list[list[bytes]] = [[], []]  # of each stage
        for index, ids in enumerate(microbatches(seed, step, replicas)):
            code = trainers[0].forward(step, index, ids, None)
            trainers[1].forward(step, index, ids, code)
            trainers[0].backward(step, index, trainers[1].backward(step, index, None))
            for own, trainer in zip(parts, trainers, strict=True):
                own.append(trainer.gradient())
                trainer.reset_step()
        sent += sum(len(own[0]) for own in parts)
        for own, trainer in zip(parts, trainers, strict=True):
            if lie is not None:
                own[-1] = lie(own[-1])
            trainer.finish_step_with(step, own)
    return told("exact", pipeline.evaluate(validation()), sent)


def train_sparse(seed: int, steps: int, replicas: int) -> tuple[float, int]:
    """As `train_exact`: each replica steps alone; a round's averages arrive `LAG` steps after they were sent."""
    from tessera.models.config import AveragingConfig
    from tessera.models.swarm import Swarm

    swarm, sent = Swarm(spec(seed), replicas, steps=steps, averaging=AveragingConfig(partitions=PARTITIONS)), 0
    under_way: list[list[bytes]] = []
    for step in range(steps):
        for index, ids in enumerate(microbatches(seed, step, replicas)):
            swarm.learn(step, index, ids)
        for row in swarm.trainers:
            for trainer in row:
                trainer.finish_step(step, SEQUENCES * LENGTH)
        number, age = divmod(step, EVERY)
        if age == 0:
            under_way = [[trainer.partition(number) for trainer in row] for row in swarm.trainers]
            sent += sum(len(parts[0]) for parts in under_way)
        if age == LAG:
            for row, parts in zip(swarm.trainers, under_way, strict=True):
                for own, trainer in enumerate(row):
                    trainer.merge(number, parts[own], parts[:own] + parts[own + 1 :])
    return told("sparse", swarm.evaluate(validation()), sent)


def told(what: str, loss: float, sent: int) -> tuple[float, int]:
    print(f"{what}: {loss:.4f} nats, {sent:,} bytes", flush=True)
    return loss, sent


# --- replicas that lie ----------------------------------------------------------------------------------------------


def one_liar(quick: bool) -> Figures:
    """One of four sends wrong gradients, and the others average robustly."""
    steps = QUICK_STEPS if quick else STEPS
    honest, _ = train_exact(0, steps, 4)
    turned, tenfold = (train_exact(0, steps, 4, robust=True, lie=scaled(by))[0] / honest for by in (-1.0, 10.0))
    return {
        "byzantine_loss_ratio": max(turned, tenfold),
        "byzantine_loss_ratio_turned": turned,
        "byzantine_loss_ratio_tenfold": tenfold,
    }


def scaled(by: float) -> Part:
    """A part of a gradient, times `by`; its tokens and its loss stay as they are."""

    def lie(part: bytes) -> bytes:
        return part[:16] + (np.frombuffer(part, "<f4", offset=16) * np.float32(by)).tobytes()

    return lie


# --- workers that come and go ----------------------------------------------------------------------------------------


def churn(quick: bool) -> Figures:
    """Kill one of two workers of a random stage every 50 steps."""
    steps, every = (12, 5) if quick else (STEPS, 50)
    quiet, _ = crew_run(steps, 0)
    disturbed, losses = crew_run(steps, every)
    made = [step for step, _ in losses]
    return {
        "lost_steps": float(len(made) - len(set(made)) + len(set(range(1, steps + 1)) - set(made))),
        "loss_delta": abs(disturbed - quiet),
        "kills": float((steps - 1) // every),
    }


def crew_run(steps: int, kill_every: int) -> tuple[float, list[tuple[int, float | None]]]:
    """(last loss on validation, (step, loss) of every step as whoever led has told them)."""
    import random

    import anyio
    import structlog

    from crew_world import CrewWorld, Node
    from tessera.models.trainer import StageTrainer
    from tessera.p2p.memory import run_virtual
    from training_world import small_manifest

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))

    class Batches:
        validation_count = 8

        async def ready(self, step: int) -> None:
            return

        def train(self, step: int, index: int) -> Any:
            return microbatches(0, step, 4)[index]

        def validation(self, index: int) -> Any:
            return validation()[index * 8 : index * 8 + 8]

    class World(CrewWorld):
        def make_trainer(self, node: Node) -> Any:
            return StageTrainer(spec(0), node.stage, steps=steps)

        def make_batches(self) -> Any:
            return Batches()

    small = small_manifest(stages=2)
    facts = {"steps": steps, "microbatches": 4, "sequences": SEQUENCES // 4, "length": LENGTH, "evaluate_every": steps}
    schedule = small.schedule.model_copy(update=facts)
    manifest = small.model_copy(update={"model": spec(0), "schedule": schedule})

    async def train() -> tuple[float, list[tuple[int, float | None]]]:
        rng = random.Random(1)
        with tempfile.TemporaryDirectory() as folder:
            world = World(manifest, Path(folder), 2, compute_s={"forward": 0.1, "backward": 0.2})
            async with world.alive() as tasks:
                for step in range(kill_every, steps, kill_every) if kill_every else ():
                    await world.at_step(step, within_s=1e6)
                    node = rng.choice(world.nodes)
                    node.kill()
                    await anyio.sleep(5)
                    await world.start(tasks, node)
                await world.trained(within_s=1e6)
                told = [row for node in world.nodes for row in node.told.losses if row[1] is not None]
                last = [loss for node in world.nodes for at, loss in node.told.validations if at == steps]
            return last[-1], sorted(told, key=lambda row: row[0])

    return run_virtual(train)


def joining(quick: bool) -> Figures:
    """The others' seconds for a step while somebody joins, ÷ before."""
    import anyio
    import structlog

    from crew_world import CrewWorld, Node
    from tessera.p2p.memory import run_virtual
    from tessera.p2p.pacer import Pacer
    from training_world import FakeTrainer, small_manifest

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    state_bytes, uplink = (4_000_000 if quick else 200_000_000), 10_000_000.0  # of one stage; 80 Mb/s

    class Heavy(FakeTrainer):
        def save(self) -> bytes:
            return super().save() + bytes(state_bytes)

        def load(self, data: bytes) -> None:
            super().load(data[:-state_bytes])

    class World(CrewWorld):
        def make_trainer(self, node: Node) -> Any:
            return Heavy(self.manifest, node.stage)

        def make_pacer(self) -> Any:
            return Pacer(uplink)

        def cost_s(self, node: Node, name: str, arguments: tuple[Any, ...]) -> float:
            costs = {"forward": 0.1, "backward": 0.2, "save": state_bytes / 1e9, "load": state_bytes / 1e9}
            return costs.get(name, 0.0)

    small = small_manifest(steps=60)
    facts = {"microbatches": 16, "length": 512, "evaluate_every": 10**6, "snapshot_every": 0}
    model = small.model.model_copy(update={"model": small.model.model.model_copy(update={"context": 512})})
    averaging = small.averaging.model_copy(update={"every": 10})  # what home links can carry
    schedule = small.schedule.model_copy(update=facts)
    manifest = small.model_copy(update={"schedule": schedule, "model": model, "averaging": averaging})

    async def train() -> Figures:
        times: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            world = World(manifest, Path(folder), delay_s=0.05)
            for node in world.nodes:
                world.network.uplink(node.key.id, uplink)
            async with world.alive() as tasks:
                world.nodes[0].told.on_step = lambda step: times.append(anyio.current_time())
                await world.at_step(11, within_s=1e6)
                before = (times[-1] - times[0]) / (len(times) - 1)
                began, at = anyio.current_time(), len(times)
                late = world.add(2)
                await world.start(tasks, late)
                while not late.told.losses:
                    await anyio.sleep(0.1)
                during = (times[-1] - times[at - 1]) / (len(times) - at)
                return {
                    "join_slowdown": during / before - 1,
                    "join_seconds": anyio.current_time() - began,
                    "join_state_mb": state_bytes / 1e6,
                }

    return run_virtual(train)


# --- what is learned ------------------------------------------------------------------------------------------------


def spec(seed: int) -> Any:
    from tessera.models.config import CodecConfig, ModelConfig, ModelSpec

    model = ModelConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=2, kv_heads=1, ffn=64, context=LENGTH)
    return ModelSpec(model=model, codec=CodecConfig(kind="codec", k=8), stages=2, seed=seed)


def microbatches(seed: int, step: int, count: int) -> list[NDArray[np.int64]]:
    """A step's sequences, in `count` microbatches."""
    from tessera.models.dataset import rows
    from tessera.models.noise import integers

    text = language(400_000, 1)
    starts = integers(SEQUENCES, len(text) - LENGTH - 1, "replicas", seed, step)
    return np.split(rows(text, [int(start) for start in starts], LENGTH), count)


def validation() -> NDArray[np.int64]:
    from tessera.models.dataset import validation_windows

    return validation_windows(language(20_000, 2), 128, LENGTH)


_LANGUAGE: dict[int, NDArray[np.uint16]] = {}


def language(length: int, seed: int) -> NDArray[np.uint16]:
    """120 words of 2 to 5 tokens, each followed by one of six, the first ones more often; now and then by any."""
    if seed not in _LANGUAGE:
        dictionary, random = np.random.default_rng(12_345), np.random.default_rng(seed)
        words = [dictionary.integers(0, VOCABULARY, dictionary.integers(2, 6)) for _ in range(120)]
        following = dictionary.integers(0, 120, (120, 6))
        text, word, count = [], 0, 0
        while count < length:
            usual = int(following[word][min(5, random.geometric(0.4) - 1)])
            word = usual if random.random() < 0.85 else int(random.integers(120))
            text.append(words[word])
            count += len(words[word])
        _LANGUAGE[seed] = np.concatenate(text)[:length].astype(np.uint16)
    return _LANGUAGE[seed]


# --- results --------------------------------------------------------------------------------------------------------

MEASUREMENTS: tuple[Callable[[bool], Figures], ...] = (sparse, churn, joining, one_liar)


def table(figures: Figures) -> str:
    rows = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(["| figure | value |", "|---|---|", *rows])


def write_results(figures: Figures) -> None:
    """Into the results; figures that were not measured now stay."""
    file = RESULTS / "replicas.json"
    facts = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "command": "python benchmarks/bench_replicas.py",
    }
    before = json.loads(file.read_text()) if file.exists() else {}
    kept = {name: value for name, value in before.items() if name not in facts}
    merged = kept | {name: float(f"{value:.5g}") for name, value in figures.items()}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(merged | facts, indent=1) + "\n")
    text = f"# Replicas of a stage\n\n{STEPS} steps of {SEQUENCES} × {LENGTH} tokens; {facts['hardware']}, Python "
    text += f"{facts['python']}.\n`{facts['command']}`\n\n{table(merged)}\n"
    (RESULTS / f"replicas_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}.md").write_text(text)


if __name__ == "__main__":
    main()
