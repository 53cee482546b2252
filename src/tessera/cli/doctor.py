"""`tessera doctor`: what this machine can do, and what is wrong with its set-up."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console

from tessera import __version__
from tessera.core.errors import TesseraError

__all__ = ["run_doctor"]

Verdict = Literal["ok", "warning", "problem"]
SIGNS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}
DISK_GB = 2.0  # what a default run needs, generously
MEMORY_GB = 4.0


@dataclass(frozen=True)
class Finding:
    what: str
    verdict: Verdict
    detail: str
    fix: str = ""


def run_doctor(state_dir: Path, as_json: bool) -> None:
    """Print one line for each check; exits with 1 when something must be mended."""
    checks: list[Callable[[], Finding]] = [
        _python, _torch, _device, _speed, _peer_link, _signing, _memory, lambda: _disk(state_dir),
        lambda: _state(state_dir),
    ]  # fmt: skip
    findings = [check() for check in checks]
    if as_json:
        print(json.dumps({"version": __version__, "findings": [asdict(f) for f in findings]}))  # noqa: T201
    else:
        console = Console()
        for finding in findings:
            fix = f"  → {finding.fix}" if finding.fix else ""
            console.print(f"{SIGNS[finding.verdict]} {finding.what}: {finding.detail}{fix}", highlight=False)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def _python() -> Finding:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Finding("Python", "ok", f"{platform.python_version()} on {system}")


def _torch() -> Finding:
    try:
        return Finding("torch", "ok", importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", "problem", "not installed", "pip install 'tessera-network[train,serve]'")


def _device() -> Finding:
    try:
        from tessera.models.device import native_bfloat16, pick_device
    except ImportError:
        return Finding("device", "problem", "unknown without torch")
    device = pick_device("auto")
    detail = f"{device}, bfloat16 {'native' if native_bfloat16() else 'emulated'}"
    if device == "cpu" and Path("/proc/driver/nvidia/version").exists():
        return Finding("device", "warning", detail, "an NVIDIA driver is here, but torch cannot use it")
    return Finding("device", "ok", detail)


def _speed() -> Finding:
    """One second of matrix products on one thread: what a training worker gets."""
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
    verdict: Verdict = "ok" if rate > 5 else "warning"
    return Finding("compute", verdict, f"{rate:.0f} GFLOP/s on one thread", "" if rate > 5 else "training will be slow")


def _peer_link() -> Finding:
    """A real echo between two endpoints of this machine."""
    import anyio

    from tessera.core.signing import PeerKey
    from tessera.p2p.calls import call, serve_calls
    from tessera.p2p.iroh_transport import IrohTransport

    async def echo() -> float:
        async with (
            IrohTransport.start(PeerKey.generate(), bind="127.0.0.1:0") as a,
            IrohTransport.start(PeerKey.generate(), bind="127.0.0.1:0") as b,
        ):

            async def answer(peer: object, request: dict[str, object], body: bytes) -> tuple[dict[str, object], bytes]:
                return request, body

            serve_calls(b, "tessera/doctor/1", answer)
            await call(a, b.record(), "tessera/doctor/1", {}, timeout_s=5, reply_limit=1024)
            started = time.perf_counter()
            await call(a, b.record(), "tessera/doctor/1", {}, timeout_s=5, reply_limit=1024)
            return time.perf_counter() - started

    try:
        return Finding("peer link", "ok", f"encrypted round trip on this machine in {anyio.run(echo) * 1000:.1f} ms")
    except (TesseraError, OSError, ImportError) as error:
        return Finding("peer link", "problem", str(error), "is UDP on the loopback interface blocked?")


def _signing() -> Finding:
    import coincurve

    return Finding("signing", "ok", f"libsecp256k1 through coincurve {coincurve.__version__}")


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return Finding("memory", "warning", "unknown on this system")
    verdict: Verdict = "ok" if total >= MEMORY_GB else "warning"
    return Finding("memory", verdict, f"{total:.1f} GiB", "" if verdict == "ok" else "four workers want 4 GiB")


def _disk(state_dir: Path) -> Finding:
    folder = next(p for p in (state_dir, *state_dir.parents) if p.exists())
    free = shutil.disk_usage(folder).free / 2**30
    verdict: Verdict = "ok" if free >= DISK_GB else "problem"
    fix = "" if verdict == "ok" else f"free {DISK_GB:.0f} GiB or give another --state-dir"
    return Finding("disk", verdict, f"{free:.1f} GiB free at {folder}", fix)


def _state(state_dir: Path) -> Finding:
    from tessera.training.home import Home

    if not state_dir.exists():
        return Finding("state", "ok", f"{state_dir} will be created at the first start")
    try:
        home = Home.existing(state_dir)
        with home.locked():
            return Finding("state", "ok", f"{state_dir}, {len(home.runs())} runs")
    except TesseraError as error:
        verdict: Verdict = "warning" if error.code == "conflict" else "problem"
        return Finding("state", verdict, error.message)
