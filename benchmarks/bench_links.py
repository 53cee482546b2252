"""Training over home links against training over unlimited ones: tokens per second of the same four stages.

    python benchmarks/bench_links.py [--quick] [--json]

The real lead, workers, links and receipts run in virtual time (the tests' own world, tests/crew_world.py), over wires
with the given one-way delay, where everything that a worker sends, up and down, shares one uplink of the given rate.
Computing is modelled: each call takes the stage's floating-point operations at `TFLOPS` effective, forward a third,
backward two thirds, and once more the forward for a microbatch whose graph did not fit because more than `GRAPHS` were
under way. The model is compute-bound on these links: 8 billion parameters in 4 stages, codes of an eighth of the width.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import anyio
import structlog

from crew_world import CrewWorld, Node
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.p2p.memory import run_virtual
from tessera.training.manifest import Manifest
from training_world import small_manifest

RESULTS = Path(__file__).parent / "results"
STAGES, MBIT_S, DELAY_MS = 4, 80, 50
TFLOPS = 25.0  # effective, of one consumer GPU
GRAPHS = 8  # microbatches whose graphs fit beside the parameters
FIGURES = (
    "tokens_ratio", "stages", "mbit_s", "delay_ms", "tokens_per_s", "unlimited_tokens_per_s", "ideal_ratio",
    "recomputed_share", "microbatches", "bytes_per_token",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer microbatches and steps: under 50 s on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    steps, microbatches = (2, 16) if arguments.quick else (3, 32)
    rows = [measure(steps, microbatches, MBIT_S, DELAY_MS)]
    if not arguments.quick:
        rows += [measure(steps, microbatches, *link) for link in ((80, 100), (40, 50), (200, 25))]
    print(table(rows))
    if not arguments.quick:
        write_results(rows)
    if arguments.json:
        print(json.dumps({key: rows[0][key] for key in FIGURES}))


def manifest(steps: int, microbatches: int) -> Manifest:
    """8 billion parameters in 32 layers; one window of 2,048 tokens is a microbatch."""
    model = ModelConfig(
        vocab_size=32_768, width=4096, layers=32, heads=32, kv_heads=8, ffn=14_336, context=2048, compute="bfloat16"
    )
    small = small_manifest()
    schedule = small.schedule.model_copy(
        update={"steps": steps, "microbatches": microbatches, "sequences": 1, "length": 2048, "evaluate_every": 10**6}
    )
    spec = ModelSpec(model=model, codec=CodecConfig(kind="codec", k=512), stages=STAGES)
    return small.model_copy(update={"model": spec, "schedule": schedule})


class Modelled(CrewWorld):
    """Workers whose calls take as long as the stage's operations."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.kept: dict[int, set[int]] = {}
        self.backward = self.recomputed = 0

    def cost_s(self, node: Node, name: str, arguments: tuple[Any, ...]) -> float:
        flops = self.manifest.model.flops_per_token(node.stage) * self.manifest.tokens_per_microbatch
        forward, kept = flops / 3 / (TFLOPS * 1e12), self.kept.setdefault(node.number, set())
        if name == "forward":
            if len(kept) < GRAPHS or node.stage == STAGES - 1:
                kept.add(arguments[1])
            return forward
        if name == "backward":
            self.backward += 1
            if arguments[1] in kept:
                kept.remove(arguments[1])
                return 2 * forward
            self.recomputed += 1
            return 3 * forward
        return 0.0


def run(steps: int, microbatches: int, mbit_s: float | None, delay_ms: float) -> dict[str, float]:
    """Seconds from the first commit to the last, which is what a long run is made of."""

    async def train() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            world = Modelled(manifest(steps + 1, microbatches), Path(folder), delay_s=delay_ms / 1000)
            for node in world.nodes:
                world.network.uplink(node.key.id, None if mbit_s is None else mbit_s * 1e6 / 8)
            async with world.alive():
                await world.at_step(1, within_s=1e6)
                began, (bytes_before, tokens_before) = anyio.current_time(), world.nodes[0].pipeline.wire
                await world.at_step(steps + 1, within_s=1e6)
                seconds, (sent, tokens) = anyio.current_time() - began, world.nodes[0].pipeline.wire
                return {
                    "seconds": seconds,
                    "recomputed": world.recomputed / world.backward,
                    "bytes_per_token": (sent - bytes_before) / (tokens - tokens_before),
                }

    return run_virtual(train)


def measure(steps: int, microbatches: int, mbit_s: float, delay_ms: float) -> dict[str, Any]:
    described = manifest(steps, microbatches)
    tokens = described.tokens_per_step * steps
    slow, fast = run(steps, microbatches, mbit_s, delay_ms), run(steps, microbatches, None, 0.0)
    slowest = max(described.model.flops_per_token(stage) for stage in range(STAGES))
    ideal = tokens * slowest / (TFLOPS * 1e12)  # the slowest stage never waits
    return {
        "tokens_ratio": round(fast["seconds"] / slow["seconds"], 4),
        "stages": STAGES,
        "mbit_s": mbit_s,
        "delay_ms": delay_ms,
        "tokens_per_s": round(tokens / slow["seconds"], 1),
        "unlimited_tokens_per_s": round(tokens / fast["seconds"], 1),
        "ideal_ratio": round(ideal / slow["seconds"], 4),
        "recomputed_share": round(slow["recomputed"], 3),
        "microbatches": microbatches,
        "bytes_per_token": round(slow["bytes_per_token"], 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = "| Mb/s, both directions | one way, ms | tokens/s | unlimited | ratio | of the slowest stage's own pace |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['mbit_s']} | {row['delay_ms']} | {row['tokens_per_s']:,.0f} "
            f"| {row['unlimited_tokens_per_s']:,.0f} "
            f"| **{row['tokens_ratio']:.3f}** | {row['ideal_ratio']:.3f} |"
        )
    return "\n".join(lines)


def write_results(rows: list[dict[str, Any]]) -> None:
    found = {key: rows[0][key] for key in FIGURES} | {
        "hardware": f"virtual time; {platform.machine()}, CPython {platform.python_version()}",
        "command": "python benchmarks/bench_links.py",
    }
    (RESULTS / "links.json").write_text(json.dumps(found, indent=2) + "\n")
    day = datetime.now(UTC).date()
    first = rows[0]
    report = f"""# Home links against unlimited ones · {day}

`python benchmarks/bench_links.py`, in virtual time: the lead, workers, links and receipts are the real ones, computing
is modelled at {TFLOPS:.0f} TFLOP/s effective for each worker. {STAGES} stages of an 8-billion-parameter model, codes of
512 of 4,096 numbers in int8, {first["microbatches"]} microbatches of 2,048 tokens in a step, {GRAPHS} graphs kept; the
forward is computed once more for {100 * first["recomputed_share"]:.0f} % of the microbatches in the first row.
{first["bytes_per_token"]:.2f} bytes per token and direction crossed the first boundary, headers and receipts included.

{table(rows)}

The last column compares with the slowest stage computing without a pause: the pipeline's fill and drain at every step's
end, which a flush costs, are in it. Slower links than about 20 Mb/s could not carry what these codes need: two
directions of {first["bytes_per_token"]:.0f} bytes for each token.
"""
    (RESULTS / "links_2core_202611.md").write_text(report)


if __name__ == "__main__":
    main()
