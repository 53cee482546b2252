"""Which device computes, what it does fast, and how its memory is kept."""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

import torch

from tessera.core.errors import Invalid

__all__ = ["fast_compute", "keep_freed_memory", "native_bfloat16", "pick_device"]

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
