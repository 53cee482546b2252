"""What a microbatch in flight holds between its forward and its backward: its codes, or the graph of its activations.

    python benchmarks/bench_memory.py [--quick] [--json]

A middle stage passes microbatches forward and keeps them; torch's allocator reports every block that it gives and takes
back. What is not given back is held. `activation_ratio` is codes ÷ graph: token ids and the received message in its
packed form, against everything that autograd saved. Counts, not times: each run gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # before torch: its profiler says that it starts and stops

import numpy as np
import torch

from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.models.presets import default_spec
from tessera.models.trainer import StageTrainer

RESULTS = Path(__file__).parent / "results"
DEPTH = 5  # microbatches in flight: stages + 1, as the schedule of four stages lets in
LIMIT = 1 / 50
FIGURES = (
    "activation_ratio", "activation_ratio_default", "code_bytes_per_token", "activation_bytes_per_token",
    "in_flight_bytes_0_graphs", "in_flight_bytes_2_graphs", "in_flight_bytes_5_graphs",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    spec: ModelSpec
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="narrower, with shorter sequences")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(wide(512, 256) if arguments.quick else wide(1024, 1024))
    if not arguments.quick:
        write_results(result)
    print(table(result))
    if arguments.json:
        print(json.dumps({name: result[name] for name in FIGURES}))


def wide(width: int, length: int) -> Case:
    """Two layers for each of four stages, as one machine of a middle size takes them; a code of an eighth."""
    model = ModelConfig(
        vocab_size=4096, width=width, layers=8, heads=width // 64, kv_heads=width // 256, ffn=11 * width // 4,
        context=length,
    )  # fmt: skip
    return Case(ModelSpec(model=model, codec=CodecConfig(kind="codec", k=width // 8), stages=4), 1, length)


def measure(case: Case) -> dict[str, Any]:
    held = {graphs: held_bytes(case, graphs) for graphs in (0, 2, DEPTH)}
    codes, graph = max(held[0]), min(held[DEPTH])
    small = held_bytes(Case(default_spec(4), 2, 256), 1)
    return {
        "activation_ratio": round(codes / graph, 6),
        "activation_ratio_default": round(small[-1] / small[0], 6),
        "code_bytes_per_token": round(codes / case.tokens, 2),
        "activation_bytes_per_token": round(graph / case.tokens, 2),
        **{f"in_flight_bytes_{graphs}_graphs": sum(each) for graphs, each in held.items()},
        "width": case.spec.model.width,
        "tokens": case.tokens,
        "in_flight": DEPTH,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": "python benchmarks/bench_memory.py",
    }


def held_bytes(case: Case, graphs: int) -> list[int]:
    """What each of DEPTH microbatches holds at stage 1, when `graphs` of them may keep their graph."""
    trainer = StageTrainer(case.spec, 1, steps=2, graphs=graphs)
    held = []
    for index in range(DEPTH):
        ids = np.full((case.sequences, case.length + 1), index, np.int32)  # the trainer makes its own int64 ones
        payload = bytes(trainer.payload_limit(case.sequences, case.length))
        taken = allocated(partial(trainer.forward, 0, index, ids, payload))
        held.append(taken + (len(payload) if index >= graphs else 0))  # packed, it lies in Python's memory, not torch's
    return held


def allocated(act: Callable[[], object]) -> int:
    """Bytes that torch's allocator gave while `act` ran, less those that it got back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    if profile.profiler is None or profile.profiler.kineto_results is None:
        raise RuntimeError("this build of torch has no profiler that sees memory")
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def table(result: dict[str, Any]) -> str:
    lines = ["| figure | value |", "|---|---|", *(f"| {name} | {result[name]:,} |" for name in FIGURES)]
    lines.append(f"\nWidth {result['width']}, {result['tokens']} tokens, {DEPTH} in flight; at most {LIMIT} is asked.")
    return "\n".join(lines)


def write_results(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    name = f"memory_{os.cpu_count()}core_{datetime.now(UTC):%Y%m}.md"
    text = f"# In-flight memory\n\n{result['hardware']}, Python {result['python']}, torch {result['torch']}.\n"
    (RESULTS / name).write_text(f"{text}`{result['command']}`\n\n{table(result)}\n")


if __name__ == "__main__":
    main()
