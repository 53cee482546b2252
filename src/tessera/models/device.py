"""Which device computes, and what it does fast."""

from __future__ import annotations

import torch

from tessera.core.errors import Invalid

__all__ = ["native_bfloat16", "pick_device"]


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
    return (
        torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() in ("AVX512_BF16", "AMX") or _cpu_has_amx()
    )


def _cpu_has_amx() -> bool:
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check()) if check is not None else False
