"""What a stage is said to need, against what it takes: parameters and graphs to 6 %, whole processes to 25 %."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.models.memory import (
    HEADER,
    MemoryNeed,
    _copies_bytes,
    _graph_bytes,
    estimate_memory,
    fit_memory,
    parameter_shapes,
    state_limit,
)
from tessera.models.presets import Compute, Kind, default_spec, preset_codec
from tessera.models.stage import Stage
from tessera.models.trainer import StageTrainer
from tessera.models.wire import Wire

BATCH, LENGTH = 2, 64


def described(kind: Kind, compute: Compute, kv_heads: int = 2, stages: int = 3) -> ModelSpec:
    model = ModelConfig(
        vocab_size=512, width=128, layers=5, heads=4, kv_heads=kv_heads, ffn=256, context=64, compute=compute,
        qk_norm=kv_heads == 2,
    )  # fmt: skip
    return ModelSpec(model=model, codec=preset_codec(kind, 16), stages=stages)


@pytest.mark.parametrize("kind", ["codec", "reparam", "ssn", "control", "dense"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_are_counted_exactly(kind: Kind, stage: int) -> None:
    specs = [described(kind, "float32"), described(kind, "float32", 4), default_spec(3, codec=kind)]
    if not specs[0].codec.subspace:
        pairs = specs[0].codec.model_copy(update={"pairs": 64})
        specs.append(specs[0].model_copy(update={"codec": pairs}))
    for spec in specs:
        counted = sum(torch.Size(shape).numel() for shape in parameter_shapes(spec, stage).values())
        assert counted == sum(p.numel() for p in Stage(spec, stage).parameters())


@pytest.mark.parametrize("kind", ["codec", "reparam", "ssn", "control", "dense"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_saved_state_is_as_long_as_its_limit_but_for_the_header(kind: Kind, stage: int) -> None:
    for spec in (described(kind, "bfloat16"), default_spec(3, codec=kind)):
        saved = len(StageTrainer(spec, stage, steps=2).save())
        assert state_limit(spec, stage) - HEADER < saved < state_limit(spec, stage) - HEADER * 9 // 10


@pytest.mark.parametrize("kind", ["codec", "reparam", "ssn", "control", "dense"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_graph_weighs_what_autograd_saves(kind: Kind, compute: Compute, kv_heads: int) -> None:
    spec = described(kind, compute, kv_heads)
    for stage in range(3):
        shapes = parameter_shapes(spec, stage)
        matrices = sum(torch.Size(s).numel() for name, s in shapes.items() if name.startswith("hidden."))
        expected = BATCH * LENGTH * _graph_bytes(spec, stage) + _copies_bytes(spec, stage, matrices)
        assert saved_bytes(StageTrainer(spec, stage, steps=2)) == pytest.approx(expected, rel=0.06)


def saved_bytes(trainer: StageTrainer) -> int:
    """Of every storage that the forward's graph keeps, parameters and fixed tables aside."""
    spec, stage = trainer.spec, trainer.stage
    known = {t.untyped_storage().data_ptr() for t in (*stage.parameters(), *stage.buffers())}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in known:
            found.setdefault(address, tensor)  # alive, so that no address is used twice
        return tensor

    ids = torch.randint(0, spec.model.vocab_size, (BATCH, LENGTH + 1))
    payload = None if stage.first else Wire(spec).pack(torch.randn(BATCH, LENGTH, spec.message_width))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.forward(0, 0, ids, payload)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


CHILD = """
import json, sys, torch
from pathlib import Path
from tessera.models.config import parse_spec
from tessera.models.presets import tiny_spec
from tessera.models.trainer import StageTrainer
from tessera.models.wire import Wire

def rss(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def train(spec, stage, rows, length, depth, graphs):
    trainer = StageTrainer(spec, stage, steps=5, graphs=graphs)
    ids = torch.zeros(rows, length + 1, dtype=torch.int64)
    message = torch.ones(rows, length, spec.message_width)
    entered = None if stage == 0 else Wire(spec).pack(message)
    left = None if trainer.stage.last else Wire(spec).pack(message)
    for step in range(2):
        for index in range(depth):
            trainer.forward(step, index, ids, entered)
            if trainer.stage.last:
                trainer.backward(step, index, None)
        for index in range(0 if trainer.stage.last else depth):
            trainer.backward(step, index, left)
        trainer.finish_step(step, rows * length * depth)
    trainer.save()

torch.set_num_threads(1)
train(tiny_spec(2), 0, 2, 8, 2, 0)  # what every process loads once
for line in sys.stdin:
    case = json.loads(line)
    spec = parse_spec(case.pop("spec"))
    before = rss("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    train(spec, **case)
    print(rss("VmHWM") - before, flush=True)
"""


def wide(compute: Compute, vocab_size: int, width: int) -> ModelSpec:
    model = ModelConfig(
        vocab_size=vocab_size, width=width, layers=4, heads=8, kv_heads=4, ffn=2 * width, context=128, compute=compute
    )
    return ModelSpec(model=model, codec=CodecConfig(kind="codec", k=width // 8), stages=2)


CASES: list[dict[str, Any]] = [
    {"spec": wide("float32", 1024, 256), "stage": 0, "rows": 4, "length": 128, "depth": 3, "graphs": 9},
    {"spec": wide("float32", 1024, 256), "stage": 0, "rows": 4, "length": 128, "depth": 3, "graphs": 0},
    {"spec": wide("bfloat16", 8_192, 256), "stage": 1, "rows": 4, "length": 128, "depth": 2, "graphs": 9},
]


def need(case: dict[str, Any]) -> MemoryNeed:
    return estimate_memory(
        case["spec"], case["stage"], sequences=case["rows"], length=case["length"], microbatches=case["depth"],
        graphs=case["graphs"],
    )  # fmt: skip


@pytest.mark.slow  # a process of its own that imports torch
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux forgets a process's peak")
def test_a_process_takes_what_was_estimated() -> None:
    lines = "".join(json.dumps(case | {"spec": case["spec"].model_dump()}) + "\n" for case in CASES)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # what is freed goes back
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=lines, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    for case, line in zip(CASES, done.stdout.splitlines(), strict=True):
        assert need(case).together == pytest.approx(int(line), rel=0.25), case


def test_as_many_graphs_are_kept_as_fit() -> None:
    spec = default_spec(4)
    needs = [estimate_memory(spec, 1, sequences=2, length=256, microbatches=8, graphs=graphs) for graphs in range(6)]
    much, some, little = needs[5].together, needs[2].together, needs[0].together
    assert little < some < much
    assert fit_memory(needs, "cpu", device_free=0, ram_free=much) == 5
    assert fit_memory(needs, "cpu", device_free=0, ram_free=some) == 2
    assert fit_memory(needs, "cpu", device_free=0, ram_free=some - 1) == 1
    with pytest.raises(Invalid, match=r"needs [\d,]+ MiB of RAM, [\d,]+ MiB are free"):
        fit_memory(needs, "cpu", device_free=0, ram_free=little - 1)
    device = needs[0].device
    assert fit_memory(needs, "cuda", device_free=device, ram_free=2**40) == 0
    with pytest.raises(Invalid, match="memory on cuda"):
        fit_memory(needs, "cuda", device_free=device - 1, ram_free=2**40)
    with pytest.raises(Invalid, match="of RAM"):
        fit_memory(needs, "cuda", device_free=2**40, ram_free=0)


def test_sharing_a_stage_among_devices_lessens_what_each_needs() -> None:
    spec = wide("float32", 2048, 512)
    shape = {"sequences": 4, "length": 128, "microbatches": 8}
    alone = estimate_memory(spec, 0, **shape)  # type: ignore[arg-type]
    replica = estimate_memory(spec, 0, **shape, ranks=4)  # type: ignore[arg-type]
    shard = estimate_memory(spec, 0, **shape, ranks=4, shard=True)  # type: ignore[arg-type]
    assert replica.fixed == alone.fixed
    assert replica.in_flight < alone.in_flight / 3
    assert shard.fixed < alone.fixed / 3
    assert shard.gradients < alone.gradients / 3
    with pytest.raises(Invalid, match="does not exist"):
        estimate_memory(spec, 2, **shape)  # type: ignore[arg-type]
