"""What is kept: the disk under the state directory, its keys, and how old its backup is."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from tessera.cli.findings import Finding, Verdict
from tessera.core.errors import TesseraError

__all__ = ["check_backup", "check_disk", "check_disk_speed", "check_keys", "check_state"]

DISK_GB = 2.0  # what a default run needs, generously
FSYNC_MS = 50.0
FSYNCS = 8
BACKUP_DAYS = 7
NEARLY = 0.9  # of the quota


def check_disk(state_dir: Path, quota_bytes: int | None) -> list[Finding]:
    """Free room, and what the state directory takes of its quota."""
    folder = _existing(state_dir)
    free = shutil.disk_usage(folder).free / 2**30
    enough = free >= DISK_GB
    fix = "" if enough else f"free {DISK_GB:.0f} GiB or give another --state-dir"
    found = [Finding("disk", "ok" if enough else "problem", f"{free:.1f} GiB free at {folder}", fix)]
    if (state_dir / "version").exists():
        found.append(_usage(state_dir, quota_bytes))
    return found


def check_disk_speed(state_dir: Path) -> Finding:
    """How long the disk takes to say that a small write is safe: every block of the chain waits for that."""
    times = []
    with tempfile.NamedTemporaryFile(dir=_existing(state_dir)) as file:
        for _ in range(FSYNCS):
            started = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - started) * 1000)
    median = sorted(times)[len(times) // 2]
    slow = median > FSYNC_MS
    fix = "put the state directory on an SSD" if slow else ""
    return Finding("disk speed", "warning" if slow else "ok", f"a safe write takes {median:.1f} ms", fix)


def check_state(state_dir: Path) -> Finding:
    from tessera.training.home import Home

    if not (state_dir / "version").exists():
        return Finding("state", "ok", f"{state_dir} will be created at the first start")
    try:
        home = Home.existing(state_dir)
        with home.locked():
            return Finding("state", "ok", f"{state_dir}, {len(home.runs())} runs")
    except TesseraError as error:
        verdict: Verdict = "ok" if error.code == "conflict" else "problem"
        return Finding("state", verdict, error.message if verdict == "problem" else f"{state_dir}, a node is at work")


def check_keys(state_dir: Path) -> Finding:
    """Whether who has the disk has the money."""
    from tessera.training.keystore import Keyring

    files = sorted(state_dir.glob("*.key"))
    if not files:
        return Finding("keys", "ok", "none yet")
    loose = [file for file in files if file.stat().st_mode & 0o077]
    if loose:
        return Finding("keys", "problem", f"others can read {loose[0]}", f"chmod 600 {loose[0].parent}/*.key")
    bare = [entry.name for entry in Keyring(state_dir).entries() if not entry.protected]
    if bare:
        fix = "tessera keys protect, if others might get this disk"
        return Finding("keys", "ok", f"{len(bare)} of {len(files)} lie open, readable to this user alone", fix)
    return Finding("keys", "ok", f"{len(files)}, protected by a passphrase")


def check_backup(state_dir: Path, now: float | None = None) -> Finding:
    """A key that is lost takes its shares with it."""
    from tessera.training.backup import last_backup

    if not (state_dir / "version").exists():
        return Finding("backup", "ok", "nothing to back up yet")
    fix = "tessera backup FILE, on another disk"
    taken = last_backup(state_dir)
    if taken is None:
        return Finding("backup", "warning", "none was ever taken: with this disk, keys and shares would be lost", fix)
    days = ((time.time() if now is None else now) - taken) / 86_400
    old = days > BACKUP_DAYS
    return Finding("backup", "warning" if old else "ok", f"the last one is {days:.1f} days old", fix if old else "")


def _usage(state_dir: Path, quota_bytes: int | None) -> Finding:
    from tessera.training.home import Home

    usage = Home.existing(state_dir).usage()
    parts = ", ".join(
        f"{kind} {size / 1e6:.0f} MB" for kind, size in usage.items() if kind != "all" and size >= 500_000
    )
    detail = f"{_size(usage['all'])}{f' ({parts})' if parts else ''}"
    if quota_bytes is None:
        return Finding("disk use", "ok", f"{detail}, no quota", "")
    detail += f" of {_size(quota_bytes)}"
    if usage["all"] > quota_bytes:
        return Finding("disk use", "warning", detail, "raise disk_quota, or leave runs that are over")
    full = usage["all"] > NEARLY * quota_bytes
    return Finding("disk use", "warning" if full else "ok", detail, "raise disk_quota soon" if full else "")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
