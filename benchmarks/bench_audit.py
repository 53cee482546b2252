"""Audits by replay: every cheat caught, no honest worker accused, what it costs, and what cheating is worth then.

    python benchmarks/bench_audit.py [--quick] [--json]

A small model of three stages is trained, so that its codes mean something; then steps are done again by real trainers,
honest ones and cheats (`audit_cases.py`), signed, committed to, and judged from the evidence as an auditor would.
Honest audits: a worker with 1 thread and an auditor with 2, and the other way round, float32 and bfloat16; and once
more in a process whose kernels use no AVX at all, which stands for other hardware. `cost` is measured on the default
run's model: replays, loading parameters and the workers' own bookkeeping, over training without any of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from each other

import torch
from audit_cases import (
    KINDS,
    MICROBATCHES,
    RUN,
    Cheat,
    Crew,
    Mode,
    Run,
    Step,
    Text,
    small_spec,
    stage_of,
    threads,
)

from tessera.incentives.deterrence import least_rate, worst_gain
from tessera.models.presets import DEFAULT_BATCH, default_spec
from tessera.models.replay import Replayer, Snapshot, params_digest
from tessera.models.trainer import StageTrainer
from tessera.training.audit import AuditConfig
from tessera.training.audit_evidence import Evidence
from tessera.training.audit_judge import Finding, judge
from tessera.training.receipts import Receipt

RESULTS = Path(__file__).parent / "results"
COMPUTES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
OTHER_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OMP_NUM_THREADS": "2",
}  # fmt: skip
PLACES: tuple[tuple[int, Mode], ...] = (
    (1, "backward"), (0, "forward"), (1, "forward"), (1, "both"), (2, "backward"),
)  # fmt: skip
EPOCH_STEPS = 100  # the default run's
SAVED = 0.9  # of a microbatch's credit is what computing it costs: nobody works for less
FIGURES = ("audited_tampered", "caught", "audited_honest", "false_alarms", "audit_rate", "cost", "expected_gain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--replay", type=Path, help=argparse.SUPPRESS)  # the process with other kernels
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.replay:
        print(json.dumps(replay_file(arguments.replay)))
        return
    keep, rounds, places = (2, 1, 1) if arguments.quick else (22, 4, 5)
    counts: dict[str, Any] = {"classes": {}, "honest": {}}
    for compute in COMPUTES:
        progress(f"{compute}: training")
        run = Run(small_spec(compute), 10 if arguments.quick else 40, keep)
        progress(f"{compute}: honest workers")
        honest(run, compute, counts["honest"])
        progress(f"{compute}: cheats")
        tampered(run, compute, rounds, places, counts["classes"])
        progress(f"{compute}: other kernels")
        other_kernels(run, 1 if arguments.quick else 8, f"{compute}, no AVX", counts["honest"])
        if not arguments.quick:
            deep, name = Run(small_spec(compute, stages=2, depth=12), 20, 4), f"{compute}, 12 layers a stage"
            other_kernels(deep, 4, f"{name}, no AVX", counts["honest"])
            tampered(deep, name, 2, 2, counts["classes"], ("lower_precision",))
    progress("cost")
    result = summary(counts, cost(steps=2 if arguments.quick else 8))
    if not arguments.quick:
        write_results(result, counts)
    print(table(result, counts))
    if arguments.json:
        print(json.dumps({key: result[key] for key in FIGURES}))


def progress(what: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


# --- audits ---------------------------------------------------------------------------------------------------------


class Tally:
    """Audits of one kind: how many, how many failed, and how much of the tolerance they used."""

    def __init__(self) -> None:
        self.audits = self.failed = 0
        self.least, self.most = math.inf, 0.0

    def add(self, finding: Finding) -> None:
        self.audits += 1
        self.failed += finding.outcome == "failed"
        self.least, self.most = min(self.least, finding.used), max(self.most, finding.used)


def honest(run: Run, compute: str, tallies: dict[str, Tally]) -> None:
    """Every microbatch and every update of every kept step, with other threads than the worker had."""
    crew = Crew(run)
    for worker, auditor in ((1, 2), (2, 1)):
        microbatches = tallies.setdefault(f"{compute}, worker {worker} thread(s), auditor {auditor}", Tally())
        updates = tallies.setdefault(f"{compute}, whole steps with their update", Tally())
        for step in run.states:
            with threads(worker):
                done = crew.step(step)
            with threads(auditor):
                for stage, replayer in enumerate(replayers(done)):
                    for index in range(MICROBATCHES):
                        microbatches.add(judged(done, stage, index, replayer))
                    updates.add(judged(done, stage, None, replayer))


def tampered(
    run: Run, name: str, rounds: int, places: int, tallies: dict[str, Tally], kinds: tuple[str, ...] = KINDS
) -> None:
    """Every kind of cheat in the first `places` places where it can be: `rounds` steps each."""
    crew = Crew(run)
    steps = cycle(list(run.states)[1:])  # a stale worker needs the step before
    for kind in kinds:
        for cheat in cheats(kind, run.spec.model.compute, places):
            for _ in range(rounds):
                done = crew.step(next(steps), cheat)
                replayer = replayers(done)[cheat.stage]
                for index in range(MICROBATCHES):
                    finding = judged(done, cheat.stage, index, replayer)
                    tallies.setdefault(f"{kind}, {name}", Tally()).add(finding)
    for stage in range(run.spec.stages if places > 1 else 1):  # the backward pass of stage 0 shows in no message
        for _ in range(rounds):
            step = next(steps)
            half = partial_update(crew, step, stage)
            done = crew.step(step, updates={stage: half})
            finding = judged(done, stage, None, replayers(done)[stage])
            tallies.setdefault(f"update of half the microbatches, {name}", Tally()).add(finding)


def cheats(kind: str, compute: str, places: int) -> Iterator[Cheat]:
    precisions = ("int8", "fp8") if compute == "bfloat16" else ("int8", "compute")
    for precision in precisions if kind == "lower_precision" else ("int8",):
        for stage, mode in PLACES[:places]:
            yield Cheat(kind, stage, mode, precision)


def partial_update(crew: Crew, step: int, stage: int) -> bytes:
    """The sum of gradients of a worker who left the backward pass of every second microbatch out."""
    done = crew.step(step)
    replayer = replayers(done)[stage]
    log = done.logs[stage]
    entered = {role: log.messages(step, role) for role in ("code_in", "gradient_in")}
    work = {
        index: (crew.run.ids(step, index), entered["code_in"].get(index), entered["gradient_in"].get(index))
        for index in range(0, MICROBATCHES, 2)
    }
    _, total = replayer.gradients(step, work)
    return replayer.write_gradients({name: 2 * gradient for name, gradient in total.items()})


def other_kernels(run: Run, steps: int, name: str, tallies: dict[str, Tally]) -> None:
    """Honest steps, judged in a process whose kernels sum in another order."""
    crew = Crew(run)
    done = [crew.step(step) for step in list(run.states)[-steps:]]
    shown = [
        (step.logs[stage].params(step.step).pack(), stage, step.evidence(stage, index).to_bytes())
        for step in done
        for stage in range(run.spec.stages)
        for index in (*range(MICROBATCHES), None)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "evidence"
        file.write_bytes(pickle.dumps((run.spec, shown)))
        command = [sys.executable, __file__, "--replay", str(file)]
        answer = subprocess.run(command, env=os.environ | OTHER_KERNELS, check=True, capture_output=True, text=True)
    tally = tallies.setdefault(name, Tally())
    for outcome, reason, used in json.loads(answer.stdout.splitlines()[-1]):
        tally.add(Finding(outcome, reason, used))


def replay_file(file: Path) -> list[list[Any]]:
    """What the process with other kernels finds."""
    torch.set_num_threads(2)
    spec, shown = pickle.loads(file.read_bytes())
    text, found = Text(spec.model.vocab_size), []
    for params, stage, data in shown:
        evidence = Evidence.from_bytes(RUN, data, Receipt.from_row)
        replayer = Replayer(spec, stage, params)
        finding = judge(evidence, replayer, stage_of=lambda peer: stage_of(peer, spec.stages), ids=text.ids)
        found.append([finding.outcome, finding.reason, finding.used])
    return found


def replayers(done: Step) -> list[Replayer]:
    return [Replayer(done.run.spec, stage, log.params(done.step).pack()) for stage, log in enumerate(done.logs)]


def judged(done: Step, stage: int, index: int | None, replayer: Replayer) -> Finding:
    return judge(done.evidence(stage, index), replayer, stage_of=done.run.stage_of, ids=done.run.ids)


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(steps: int) -> dict[str, float]:
    """Seconds for one step of all stages of the default model: training, auditing at the default rates, bookkeeping."""
    spec, batch = default_spec(), DEFAULT_BATCH
    text, config = BatchText(spec.model.vocab_size, batch.sequences, batch.length), AuditConfig()
    trainers = [StageTrainer(spec, stage, steps=100) for stage in range(spec.stages)]
    seen = [Replayer(spec, stage, Snapshot(trainer.stage).pack()) for stage, trainer in enumerate(trainers)]
    train_s = replay_s = update_s = books_s = 0.0
    for step in range(steps + 1):
        first = step == 0  # warm-up: not counted
        books, snapshots = timed(lambda: [Snapshot(trainer.stage) for trainer in trainers])
        train, logged = timed(
            lambda step=step: train_step(trainers, step, text, batch.microbatches, batch.tokens_per_step)
        )
        one, two = replay_step(seen, snapshots, step, text, logged)
        if not first:
            train_s, replay_s, update_s, books_s = train_s + train, replay_s + one, update_s + two, books_s + books
    rate, updates = config.rate_bps / 10_000, config.update_bps / 10_000
    size = sum(p.numel() * 4 for trainer in trainers for p in trainer.stage.parameters())
    digest_s, _ = timed(lambda: [params_digest(dict(trainer.stage.named_parameters())) for trainer in trainers])
    return {
        "cost": (rate * replay_s + updates * update_s + books_s) / train_s,
        "replay_cost_ratio": replay_s / train_s,
        "update_cost_ratio": update_s / train_s,
        "bookkeeping_ratio": books_s / train_s,
        "digest_gb_per_s": size / digest_s / 1e9,
    }


class BatchText(Text):
    """Random words in the default run's shape."""

    def __init__(self, words: int, sequences: int, length: int) -> None:
        self._words, self._shape = words, (sequences, length + 1)

    def ids(self, step: int, index: int) -> Any:
        import numpy as np

        return np.random.default_rng((step, index)).integers(0, self._words, self._shape)


Logged = list[list[tuple[bytes | None, bytes | None]]]  # by stage and microbatch: code in, gradient in


def train_step(trainers: list[StageTrainer], step: int, text: Text, count: int, tokens: int) -> Logged:
    logged: Logged = [[] for _ in trainers]
    for index in range(count):
        ids, codes, gradients = text.ids(step, index), [], []
        payload = None
        for trainer in trainers:
            codes.append(payload)
            payload = trainer.forward(step, index, ids, payload)
        for trainer in reversed(trainers):
            gradients.append(payload)
            payload = trainer.backward(step, index, payload)
        for stage, pair in enumerate(zip(codes, reversed(gradients), strict=True)):
            logged[stage].append(pair)
    for trainer in trainers:
        trainer.finish_step(step, tokens)
    return logged


def replay_step(
    seen: list[Replayer], snapshots: list[Snapshot], step: int, text: Text, logged: Logged
) -> tuple[float, float]:
    """Seconds to replay every microbatch alone, with parameters loaded for each; and all of them with their update."""
    alone_s = whole_s = 0.0
    for replayer, snapshot, rows in zip(seen, snapshots, logged, strict=True):
        work = {index: (text.ids(step, index), *row) for index, row in enumerate(rows)}
        for index, inputs in work.items():
            load_s, _ = timed(lambda: replayer.load(snapshot))  # noqa: B023
            one_s, replay = timed(lambda: replayer.replay(step, index, *inputs))  # noqa: B023
            alone_s += load_s + one_s + timed(lambda: pack(replayer, replay))[0]  # noqa: B023
        load_s, _ = timed(lambda: replayer.load(snapshot))  # noqa: B023
        step_s, _ = timed(lambda: replayer.gradients(step, work))  # noqa: B023
        whole_s += load_s + step_s
    return alone_s, whole_s


def pack(replayer: Replayer, replay: Any) -> None:
    """As much work as comparing: rounding both messages."""
    for message, noise in ((replay.code_BTW, None), (replay.gradient_BTW, replay.gradient_noise)):
        if message is not None:
            replayer.wire.pack(message, noise)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this thread, which does not wait for a busy machine, and the result."""
    started = time.thread_time()
    result = work()
    return time.thread_time() - started, result


# --- the report -----------------------------------------------------------------------------------------------------


def summary(counts: dict[str, Any], costs: dict[str, float]) -> dict[str, Any]:
    config, caught, honest_ones = AuditConfig(), counts["classes"].values(), counts["honest"].values()
    audited = sum(tally.audits for tally in caught)
    found = sum(tally.failed for tally in caught)
    rate = (config.rate_bps + config.update_bps) / 10_000
    recognised = max(0.0, found / audited - 3 / audited)  # the rule of three: at 95 % at least this
    work = EPOCH_STEPS * DEFAULT_BATCH.microbatches
    return {
        "audited_tampered": audited,
        "caught": found,
        "audited_honest": sum(tally.audits for tally in honest_ones),
        "false_alarms": sum(tally.failed for tally in honest_ones),
        "audit_rate": rate,
        "cost": round(costs["cost"], 4),
        "expected_gain": round(worst_gain(work, rate=rate, recognised=recognised, saved=SAVED), 2),
        "least_rate": least_rate(work, recognised=recognised, saved=SAVED),
        "epoch_microbatches": work,
        "saved": SAVED,
        "recognised_at_least": round(recognised, 4),
        "honest_used_most": round(max(tally.most for tally in honest_ones), 3),
        "tampered_used_least": round(min(tally.least for tally in caught), 2),
        **{key: round(value, 4) for key, value in costs.items() if key != "cost"},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": "python benchmarks/bench_audit.py",
    }


def table(result: dict[str, Any], counts: dict[str, Any]) -> str:
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in result.items() if key not in ("hardware", "python", "command")]
    lines += [
        "",
        "Tolerance used: 1 is the limit.",
        "",
        "| cheat | audited | caught | used at least |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {t.audits} | {t.failed} | {t.least:.2f} |" for name, t in counts["classes"].items()]
    lines += ["", "| honest | audited | accused | used at most |", "|---|---|---|---|"]
    lines += [f"| {name} | {t.audits} | {t.failed} | {t.most:.3f} |" for name, t in counts["honest"].items()]
    return "\n".join(lines)


def write_results(result: dict[str, Any], counts: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "audit.json").write_text(json.dumps(result, indent=1) + "\n")
    name = f"audit_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}.md"
    text = f"# Audits by replay\n\n{result['hardware']}, Python {result['python']}, torch {result['torch']}.\n"
    (RESULTS / name).write_text(f"{text}`{result['command']}`\n\n{table(result, counts)}\n")


if __name__ == "__main__":
    main()
