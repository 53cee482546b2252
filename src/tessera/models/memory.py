"""Memory: how much is free here. No torch, so that it can be asked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

__all__ = ["free_ram_bytes"]

CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # bytes; version 1 says "no limit" with a number near 2^63
_FILES = {  # version: limit, use, and which of the use is file cache that would be dropped
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


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
