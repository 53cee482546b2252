"""What a worker notices of the machine that it runs on: who else computes, who types, how much is left.

A reading that this system cannot give is None, and a rule that needs it stays open: better a worker that does not
notice than one that never works. `FakeSensors` says what a test wants.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from tessera.models.memory import free_ram_bytes

__all__ = ["FakeSensors", "MachineSensors", "Reading", "Sensors"]

_BUSY = ("user", "nice", "system", "irq", "softirq")  # of the processor's times; steal is another machine's
LOGIND_S = 2.0
TERMINALS = Path("/dev/pts")


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the machine."""

    others_cpu: float | None  # part of all cores that programs other than workers used since the last look
    user_idle_s: float | None  # since somebody last typed
    on_battery: bool
    disk_free_bytes: int
    memory_free_bytes: int


class Sensors(Protocol):
    """How the gate sees the machine. Called from a thread; may take a tenth of a second."""

    def read(self) -> Reading: ...


class FakeSensors:
    """Says `reading`, which a test may replace."""

    def __init__(self, reading: Reading | None = None) -> None:
        self.reading = reading or Reading(0.0, None, False, 2**40, 2**40)

    def read(self) -> Reading:
        return self.reading


class MachineSensors:
    """This machine.

    Args:
        folder: on the disk that the worker fills.
        people: look for people at the keyboard and for other programs at all; costs 20 ms a look with 300 processes.
    """

    def __init__(self, folder: Path, *, people: bool = True) -> None:
        self._folder, self._people = folder, people
        self._before = (0.0, 0.0)  # seconds of processor time that were to be had, and that others used
        self._workers: dict[tuple[int, float], float] = {}  # (pid, start) -> seconds of processor time

    def read(self) -> Reading:
        """Raises: OSError when the folder is gone."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return Reading(
            others_cpu=self._others_cpu() if self._people else None,
            user_idle_s=user_idle_s() if self._people else None,
            on_battery=battery is not None and battery.power_plugged is False,
            disk_free_bytes=shutil.disk_usage(self._folder).free,
            memory_free_bytes=free_ram_bytes(),
        )

    def _others_cpu(self) -> float | None:
        """Everything that was computed since the last look, less what workers of ours did. None the first time."""
        times = psutil.cpu_times()
        total, busy = sum(times), sum(getattr(times, name, 0.0) for name in _BUSY)
        workers = _worker_times()
        ours = sum(max(0.0, s - self._workers.get(key, 0.0 if self._workers else s)) for key, s in workers.items())
        (total_before, busy_before), self._before, self._workers = self._before, (total, busy), workers
        if total_before == 0.0 or total <= total_before:
            return None
        return min(1.0, max(0.0, (busy - busy_before - ours) / (total - total_before)))


def _worker_times() -> dict[tuple[int, float], float]:
    """Processor seconds of each worker process here, ours or a sibling on another device, and of our children."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    found = {}
    for process in psutil.process_iter():
        try:
            if process.pid in own or _is_worker(process.cmdline()):
                times = process.cpu_times()
                found[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:  # it ended meanwhile, or belongs to somebody whose business is not ours
            continue
    return found


def _is_worker(command: list[str]) -> bool:
    """`python -m tessera …`, `torchrun … -m tessera …`, or `…/bin/tessera …`."""
    words = [Path(word).name for word in command[:24]]
    if any(pair == ("-m", "tessera") for pair in itertools.pairwise(words)):
        return True
    return words[:1] == ["tessera"] or (words[1:2] == ["tessera"] and words[0].startswith("python"))


def user_idle_s() -> float | None:
    """Seconds since somebody typed: into a terminal, or at the desktop as logind knows it. None: nobody is here."""
    idle = [_terminal_idle_s(path) for path in TERMINALS.glob("[0-9]*")] if TERMINALS.is_dir() else []
    known = [seconds for seconds in (*idle, _desktop_idle_s()) if seconds is not None]
    return min(known, default=None)


def _terminal_idle_s(path: Path) -> float | None:
    """Reading from a terminal moves its access time, as `w` shows."""
    try:
        return max(0.0, time.time() - path.stat().st_atime)
    except OSError:  # closed meanwhile
        return None


def _desktop_idle_s() -> float | None:
    """From logind's hint for the whole machine: 0 while somebody is active at a desktop."""
    if shutil.which("loginctl") is None or not Path("/run/systemd/seats").is_dir():
        return None
    wanted = [f"-p{name}" for name in ("Type", "IdleHint", "IdleSinceHintMonotonic", "State")]
    try:
        sessions = _loginctl("list-sessions", "--no-legend").splitlines()
        shown = [_loginctl("show-session", line.split()[0], *wanted) for line in sessions if line.strip()]
    except (OSError, subprocess.SubprocessError):
        return None
    idle = []
    for text in shown:
        facts = dict(line.partition("=")[::2] for line in text.splitlines())
        if facts.get("Type") not in ("x11", "wayland", "mir") or facts.get("State") != "active":
            continue
        since = facts.get("IdleSinceHintMonotonic", "0")
        asleep = facts.get("IdleHint") == "yes" and since.isdecimal()
        idle.append(max(0.0, time.monotonic() - int(since) / 1e6) if asleep else 0.0)
    return min(idle, default=None)


def _loginctl(*words: str) -> str:
    done = subprocess.run(["loginctl", *words], capture_output=True, text=True, timeout=LOGIND_S, check=True)
    return done.stdout
