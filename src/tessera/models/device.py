"""Which device computes, what it does fast, and how its memory is kept.

Precision is the spec's alone. `ModelConfig.compute` says which operands a matrix product takes (float32 or bfloat16;
sums, norms, softmax, optimiser and messages are float32 in both), and every neighbour and auditor computes that. So no
device autocasts, and none chooses for itself: `fast_compute` only advises whoever writes a new manifest. A device
without bfloat16 units joins such a run all the same, with torch's emulation: right, and slow, as its probe will say.
TF32, which would give a CUDA device other products than its neighbours', stays off; that is torch's default.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

import torch

from tessera.core.errors import Invalid
from tessera.models.config import ModelSpec
from tessera.models.memory import estimate_memory, fit_memory, free_ram_bytes, in_flight_depth

__all__ = [
    "choose_graphs",
    "fast_compute",
    "free_device_bytes",
    "keep_freed_memory",
    "native_bfloat16",
    "pick_device",
]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def pick_device(name: str) -> str:
    """A torch device for `auto`, `cpu`, `cuda`, `cuda:1`, `mps`. Raises: Invalid: unknown, or not on this machine."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Invalid(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Invalid(f"device {name!r} is not on this machine: it has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise Invalid("device 'mps' is not on this machine")
    if device.type not in ("cpu", "cuda", "mps"):
        raise Invalid(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    return name


def free_device_bytes(device: str) -> int:
    """What a stage may still take there: free memory of a GPU; of RAM where the processor computes."""
    kind = torch.device(device)
    if kind.type == "cuda":
        free, _ = torch.cuda.mem_get_info(kind)
        return int(free) + torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
    if kind.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return free_ram_bytes()


def choose_graphs(
    spec: ModelSpec,
    stage: int,
    *,
    sequences: int,
    length: int,
    microbatches: int,
    device: str,
    limit_bytes: int = 0,
    ranks: int = 1,
    shard: bool = False,
) -> int:
    """How many microbatches in flight may keep their graphs. Ask before the stage is built, and again before joining.

    Args:
        limit_bytes: most that the owner lends of the device's memory, on top of what is taken now; 0 = what is free.
        ranks, shard: see `estimate_memory`.

    Raises: Invalid, naming what is needed and what is there, when it does not fit with codes alone.
    """
    needs = [
        estimate_memory(
            spec, stage, sequences=sequences, length=length, microbatches=microbatches, graphs=graphs, ranks=ranks,
            shard=shard,
        )
        for graphs in range(in_flight_depth(microbatches) + 1)
    ]  # fmt: skip
    if limit_bytes < 0:
        raise Invalid(f"a memory limit is a number of bytes ≥ 0, not {limit_bytes}")
    kind, free, ram = torch.device(device).type, free_device_bytes(device), free_ram_bytes()
    lent = min(free, limit_bytes or free)
    return fit_memory(needs, kind, device_free=lent, ram_free=min(ram, lent) if kind == "cpu" else ram)


def native_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware; elsewhere torch emulates it, slowly."""
    if torch.cuda.is_available():
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fast_compute() -> Literal["float32", "bfloat16"]:
    """The `ModelConfig.compute` that a new run started on this machine should choose."""
    return "bfloat16" if native_bfloat16() else "float32"


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed. Call once when a worker process starts.

    By default glibc returns every tensor over 128 kB to the kernel and faults it in again page by page, which costs
    a third of a small model's step. Returns whether it took effect (glibc only).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
