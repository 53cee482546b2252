"""What the machine is: processor, memory, GPU, limits of the system, clock."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

from tessera.cli.findings import Finding, Verdict

__all__ = ["CHECKS"]

MEMORY_GB = 4.0
OPEN_FILES = 4096
GOOD_GFLOPS = 5
CLOCK_ERROR_S = 5.0  # receipts and invitations are judged in seconds
CGROUP = Path("/sys/fs/cgroup")
NOT_SYNCHRONISED = 0x40  # STA_UNSYNC of timex.h


def check_python() -> Finding:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Finding("Python", "ok", f"{platform.python_version()} on {system}")


def check_torch() -> Finding:
    try:
        return Finding("torch", "ok", importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", "problem", "not installed", "pip install 'tessera-network[train,serve]'")


def check_device() -> list[Finding]:
    """What computes; every GPU by name, memory and driver."""
    try:
        import torch

        from tessera.models.device import native_bfloat16, pick_device
    except ImportError:
        return [Finding("device", "problem", "unknown without torch")]
    device = pick_device("auto")
    driver = _nvidia_driver()
    detail = f"{device}, bfloat16 {'native' if native_bfloat16() else 'emulated'}"
    if device == "cpu" and driver:
        fix = "install the CUDA build of torch that fits the driver"
        return [Finding("device", "warning", f"{detail}; an NVIDIA driver {driver} is here, torch cannot use it", fix)]
    found = [Finding("device", "ok", detail)]
    if device == "cuda":
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            room = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            verdict: Verdict = "ok" if free > total / 2 else "warning"
            fix = "" if verdict == "ok" else "another program holds its memory: nvidia-smi"
            found.append(Finding(f"GPU {number}", verdict, f"{name}, {room}, driver {driver or 'unknown'}", fix))
    return found


def check_speed() -> Finding:
    """Half a second of matrix products on one thread: what a training worker gets."""
    try:
        import torch
    except ImportError:
        return Finding("compute", "problem", "unknown without torch")
    threads, size, count = torch.get_num_threads(), 512, 0
    torch.set_num_threads(1)
    a = torch.randn(size, size)
    started = time.perf_counter()
    while time.perf_counter() - started < 0.5:
        a = (a @ a).clamp_(-1, 1)
        count += 1
    rate = count * 2 * size**3 / (time.perf_counter() - started) / 1e9
    torch.set_num_threads(threads)
    slow = rate <= GOOD_GFLOPS
    verdict: Verdict = "warning" if slow else "ok"
    return Finding("compute", verdict, f"{rate:.0f} GFLOP/s on one thread", "training will be slow" if slow else "")


def check_signing() -> Finding:
    import coincurve

    return Finding("signing", "ok", f"libsecp256k1 through coincurve {coincurve.__version__}")


def check_memory() -> Finding:
    """What may be used: the machine's memory, or less where a container or a service limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    limit = memory_limit()
    detail = f"{total:.1f} GiB"
    if limit is not None and limit / 2**30 < total:
        total = limit / 2**30
        detail = f"{total:.1f} GiB: a control group's limit, of {detail}"
    short = total < MEMORY_GB
    fix = "four workers want 4 GiB; one worker with a small stage needs less" if short else ""
    return Finding("memory", "warning" if short else "ok", detail, fix)


def check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < OPEN_FILES
    most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard}"
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft}"
    fix = f"ulimit -n {OPEN_FILES} before the start; `tessera service install` sets it" if few else ""
    return Finding("open files", "warning" if few else "ok", f"{shown} for a process, at most {most}", fix)


def check_clock() -> Finding:
    """Whether the kernel says that something keeps its clock right, and to within what."""
    state = kernel_clock()
    if state is None:
        return Finding("clock", "warning", "this system does not say whether its clock is kept right")
    synchronised, error_s = state
    fix = "timedatectl set-ntp true, or another time service: a wrong clock refuses invitations that are good"
    if not synchronised:
        return Finding("clock", "warning", "nothing keeps the clock right", fix)
    if error_s > CLOCK_ERROR_S:
        return Finding("clock", "warning", f"kept right, but only to within {error_s:.1f} s", fix)
    return Finding("clock", "ok", f"kept right to within {max(error_s, 0.001):.3f} s")


def memory_limit(root: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The tightest memory limit of the control groups that we are in (version 2), in bytes; None = no limit."""
    try:
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder = root / line[3:].lstrip("/")
    limits = []
    for group in (folder, *folder.parents):
        try:
            text = (group / "memory.max").read_text().strip()
        except OSError:
            text = "max"
        if text.isdigit():
            limits.append(int(text))
        if group == root:
            break
    return min(limits, default=None)


def kernel_clock() -> tuple[bool, float] | None:
    """Whether the clock is synchronised, and its greatest error in seconds; None where the kernel does not say."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        times = (ctypes.c_long * 64)()  # struct timex, with room to spare; modes = 0 only reads
        status = libc.adjtimex(times)
    except (OSError, AttributeError):
        return None
    if status < 0:
        return None
    max_error_us, flags = times[3], ctypes.c_int.from_buffer(times, 5 * ctypes.sizeof(ctypes.c_long)).value
    return not flags & NOT_SYNCHRONISED, max_error_us / 1e6


def _nvidia_driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version")


CHECKS: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
    ("Python", check_python),
    ("torch", check_torch),
    ("device", check_device),
    ("compute", check_speed),
    ("signing", check_signing),
    ("memory", check_memory),
    ("open files", check_open_files),
    ("clock", check_clock),
]
