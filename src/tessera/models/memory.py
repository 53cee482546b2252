"""Memory: what a stage in training needs, and how much is free here. No torch: it is asked before anything is built.

What is needed follows from shapes, as the trainer, the optimiser and autograd keep them (`tests/exact/
test_models_memory_peak.py` compares it with what processes really take). In-flight microbatches weigh most: as many as
fit keep the whole graph of their forward; the others keep codes only, and their graph is made again in the backward.

Legend: D width, KV of keys and of values, F feed-forward width, V vocabulary, k code width; numbers for each token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tessera.core.errors import Invalid
from tessera.models.config import ModelSpec

__all__ = [
    "MAX_IN_FLIGHT", "MemoryNeed", "estimate_memory", "fit_memory", "free_ram_bytes", "in_flight_depth",
    "parameter_shapes", "state_limit",
]  # fmt: skip

MAX_IN_FLIGHT = 256  # microbatches of one stage; each holds its graph, or its codes

FLOAT = 4  # bytes; parameters, gradients and the optimiser's state are float32 whatever the products take
LOW = 2  # bytes of bfloat16
HEADER = 2**20  # bytes; a saved state names some ten tensors of each layer, in a hundred bytes each
CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # bytes; version 1 says "no limit" with a number near 2^63
_FILES = {  # version: limit, use, and which of the use is file cache that would be dropped
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that one stage takes at its peak, by what for."""

    fixed: int  # parameters, what the optimiser remembers, tables that are not trained
    gradients: int
    in_flight: int  # graphs or codes of the microbatches between forward and backward
    work: int  # of one forward and backward, for a moment
    step: int  # of the optimiser's step, when nothing is in flight
    checkpoint: int  # of writing one, in RAM, when nothing is in flight
    messages: int  # waiting on the links, in RAM

    @property
    def device(self) -> int:
        """On the device that computes, when that is not the processor."""
        return self.fixed + self.gradients + max(self.in_flight + self.work, self.step)

    @property
    def host(self) -> int:
        """In RAM beside such a device."""
        return self.messages + self.checkpoint + self.checkpoint // 2

    @property
    def together(self) -> int:
        """In RAM, when the processor computes."""
        return max(self.device, self.fixed + self.checkpoint) + self.messages


def estimate_memory(
    spec: ModelSpec,
    stage: int,
    *,
    sequences: int,
    length: int,
    microbatches: int,
    graphs: int = MAX_IN_FLIGHT,
    ranks: int = 1,
    shard: bool = False,
) -> MemoryNeed:
    """What training `stage` takes, for microbatches of `sequences` × `length` tokens.

    Args:
        graphs: how many microbatches in flight keep their graph, the others their codes.
        ranks: devices that split a microbatch's sequences among them; the need is that of one.
        shard: they also split parameters, gradients and the optimiser's state.

    Raises: Invalid: no such stage.
    """
    shapes = parameter_shapes(spec, stage)
    hidden = {name: shape for name, shape in shapes.items() if name.startswith("hidden.")}
    count, matrices, state = _count(shapes), _count(hidden), _state_bytes(shapes)
    groups = _groups(spec, hidden)
    parts = ranks if shard else 1
    tokens = -(-sequences // ranks) * length
    depth = in_flight_depth(microbatches)
    kept = min(graphs, depth)
    graph = tokens * _graph_bytes(spec, stage) + _copies_bytes(spec, stage, matrices)
    codes = sequences * length * (spec.message_bytes_per_token() + 8)
    last = stage == spec.stages - 1  # its backward follows at once: nothing stays in flight
    return MemoryNeed(
        fixed=state // parts + _tables_bytes(spec, stage),
        gradients=FLOAT * count // parts,
        in_flight=0 if last else depth * codes + kept * graph,
        work=tokens * _work_bytes(spec, stage)
        + (graph if last or kept < depth else 0)
        + (count * FLOAT if shard else 0),
        step=FLOAT * matrices // parts + 3 * FLOAT * max(groups.values(), default=0),
        checkpoint=2 * state,
        messages=4 * depth * codes,
    )


def in_flight_depth(microbatches: int) -> int:
    """How many microbatches of a step are under way at once: what `training.lead` lets in."""
    return min(microbatches, MAX_IN_FLIGHT)


def fit_memory(need_of: Sequence[MemoryNeed], device: str, *, device_free: int, ram_free: int) -> int:
    """The most graphs that fit: `need_of[graphs]` against what is free.

    Raises: Invalid, naming what is needed and what is there, when codes alone do not fit either.
    """
    on_cpu = device == "cpu"
    for graphs, need in reversed(list(enumerate(need_of))):
        if (need.together <= ram_free) if on_cpu else (need.device <= device_free and need.host <= ram_free):
            return graphs
    need = need_of[0]
    if on_cpu or need.host > ram_free:
        what, wanted, have = "RAM", need.together if on_cpu else need.host, ram_free
    else:
        what, wanted, have = f"memory on {device}", need.device, device_free
    raise Invalid(
        f"this stage needs {_mib(wanted)} of {what}, {_mib(have)} are free: close other programs, raise the memory "
        "limit, take a smaller stage, or several devices (torchrun)",
        need_bytes=wanted,
        have_bytes=have,
    )


def parameter_shapes(spec: ModelSpec, stage: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stage's parameters; hidden matrices are `hidden.<layer>.<name>`, as the optimiser groups them.

    Raises: Invalid: no such stage.
    """
    if not 0 <= stage < spec.stages:
        raise Invalid(f"stage {stage} does not exist: the model has {spec.stages}, counted from 0")
    m, k, last = spec.model, spec.codec.k, stage == spec.stages - 1
    d, kv = m.width, m.kv_heads * m.head_dim
    rows = k if spec.codec.kind == "reparam" and not last else d
    shapes: dict[str, tuple[int, ...]] = {}
    for i in spec.cuts()[stage]:
        shapes |= {f"hidden.{i}.qkv": (m.attended + 2 * kv, d), f"hidden.{i}.out": (rows, m.attended)}
        shapes |= {f"hidden.{i}.gate_up": (2 * m.ffn, d), f"hidden.{i}.down": (rows, m.ffn)}
        shapes |= {f"gains.{i}": (2 * d + 2 * m.head_dim * m.qk_norm + (m.attended + 2 * kv) * m.qkv_bias,)}
    if spec.codec.kind in ("codec", "control") or stage == 0:
        shapes["table"] = (m.vocab_size, k if spec.codec.kind == "reparam" else d)
        if spec.codec.conv:
            shapes["taps"] = (3, d)
        if spec.codec.pairs:
            shapes["pairs"] = (spec.codec.pairs, d)
    if spec.codec.kind == "codec":
        shapes |= {"decode": (d, k)} if stage > 0 else {}
        shapes |= {"encode": (k, d)} if not last else {}
    return shapes | ({"head": (m.vocab_size, d), "head_gain": (d,)} if last else {})


def state_limit(spec: ModelSpec, stage: int) -> int:
    """Most bytes of what the stage's trainer saves, on however many devices.

    Raises: Invalid: no such stage.
    """
    return _state_bytes(parameter_shapes(spec, stage)) + HEADER


def _state_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Parameters, and of each number what the optimiser keeps: Muon one, AdamW two."""
    matrices = _count({name: shape for name, shape in shapes.items() if name.startswith("hidden.")})
    return FLOAT * (2 * matrices + 3 * (_count(shapes) - matrices))


def _groups(spec: ModelSpec, hidden: dict[str, tuple[int, ...]]) -> dict[tuple[int, int], int]:
    """Numbers in the matrices that Muon turns together: those of one shape, fused ones split."""
    m = spec.model
    kv = m.kv_heads * m.head_dim
    rows = {"qkv": (m.attended, kv, kv), "gate_up": (m.ffn, m.ffn)}
    groups: dict[tuple[int, int], int] = {}
    for name, (height, width) in ((n, (s[0], s[1])) for n, s in hidden.items()):
        for part in rows.get(name.rpartition(".")[2], (height,)):
            shape = (min(part, width), max(part, width))
            groups[shape] = groups.get(shape, 0) + part * width
    return groups


def _graph_bytes(spec: ModelSpec, stage: int) -> int:
    """What autograd keeps of one token's forward through the stage."""
    m, kind, k = spec.model, spec.codec.kind, spec.codec.k
    low, last = m.compute == "bfloat16", stage == spec.stages - 1
    product = LOW if low else FLOAT  # of what enters a matrix product
    d, a, kv, heads = m.width, m.attended, m.kv_heads * m.head_dim, m.heads + m.kv_heads
    norms = 2 * d + heads + 2
    turned = 2 * (a + kv) if m.qk_norm else a + kv
    spread = kv if m.heads == m.kv_heads else 2 * a  # keys and values, repeated for each group of heads
    attention = turned + spread + a + m.heads
    layer = FLOAT * (norms + attention + 2 * m.ffn) + product * (d + a + m.ffn) + (LOW * d if low else 0)
    if kind == "reparam" and not last:
        layer += 2 * product * k
    ends = FLOAT * d if kind in ("codec", "control") and spec.codec.conv else 0
    ends += product * ((k if stage > 0 else 0) + (0 if last else d)) if not spec.codec.whole else 0
    if last:
        ends += FLOAT * d + product * d + FLOAT * m.vocab_size
    return len(spec.cuts()[stage]) * layer + ends + 16


def _work_bytes(spec: ModelSpec, stage: int) -> int:
    """What one token's forward and backward hold for a moment: around SwiGLU, or around the logits."""
    m = spec.model
    work = FLOAT * (5 * m.ffn + 3 * m.width)
    if stage == spec.stages - 1:  # logits, and the gradients of the loss and of the softmax
        work = max(work, FLOAT * (3 * m.vocab_size + m.width) + (LOW * m.vocab_size if m.compute == "bfloat16" else 0))
    return work


def _copies_bytes(spec: ModelSpec, stage: int, matrices: int) -> int:
    """bfloat16 copies of the matrices, head included, which every graph keeps for its backward."""
    if spec.model.compute != "bfloat16":
        return 0
    return LOW * (matrices + (spec.model.vocab_size * spec.model.width if stage == spec.stages - 1 else 0))


def _tables_bytes(spec: ModelSpec, stage: int) -> int:
    """What is known and not trained: rotations, and a reparametrised model's table and basis."""
    m = spec.model
    tables = FLOAT * m.context * m.head_dim
    if spec.codec.subspace:
        bases = 1 + (len(spec.cuts()[stage]) if spec.codec.kind == "reparam" else 0)
        tables += FLOAT * (m.vocab_size * m.width + m.width * spec.codec.k * bases)
    return tables


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def free_ram_bytes() -> int:
    """What this process may still take without pushing others out: the machine's, or its control group's if less."""
    free = int(psutil.virtual_memory().available)
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:  # not Linux
        return free
    return min(free, *(found for found in _group_free(groups) if found is not None), _NO_LIMIT)


def _group_free(groups: str) -> Iterator[int | None]:
    """Of our control group and of all above it: each may be the tightest. `groups` is /proc/self/cgroup."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root, version = (CGROUP / "memory", 1) if controllers else (CGROUP, 2)
            own = root / path.lstrip("/")
            yield from (_free_in(folder, version) for folder in (own, *own.parents) if folder.is_relative_to(root))


def _free_in(folder: Path, version: int) -> int | None:
    limit_file, used_file, cache = _FILES[version]
    try:
        limit = (folder / limit_file).read_text().strip()
        used = int((folder / used_file).read_text())
        facts = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        if not limit.isdecimal() or int(limit) >= _NO_LIMIT:
            return None
        return max(0, int(limit) - used + int(facts.get(cache, 0)))
    except (OSError, ValueError):  # no such controller here
        return None
