"""Room on the disk: what a store's folder holds, what may go, and whether something new fits.

A blob with a pin stays. Without a quota nothing ever goes by itself. With one, what was not used for the longest time
goes first, blobs and interrupted fetches alike, and only when that makes enough room: a request that cannot be met
takes nothing away. A blob's last use is the modification time of its index, so it outlives the process.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from tessera.core.errors import Conflict, Unavailable
from tessera.core.ids import BlobId
from tessera.p2p.blob_disk import disk, lock_file, open_file

__all__ = ["PART", "PIN", "PUT", "Holding", "Room", "Usage", "forget", "holdings", "is_held"]

log = structlog.get_logger()

SPARE_BYTES = 16 << 20  # of the disk, left to everything else that has to write there
PIN = ".pin-"  # <id>.pin-<name>: empty, there while that name wants the blob kept
PART = ".part"  # a fetch under way or interrupted
PUT = ".put"  # a copy under way, under a name of its own until its id is known
LOCK = ".room"
_NAME = re.compile(r"([0-9a-f]{64})((?:\.[a-z-]+)?)(?:[A-Za-z0-9._-]*)")


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes in a store's folder; an interrupted fetch counts with the whole size that it will have."""

    used_bytes: int
    pinned_bytes: int  # of these, what no quota takes away
    partial_bytes: int  # of these, fetches under way or interrupted
    quota_bytes: int | None
    free_bytes: int  # on the disk


@dataclass(slots=True)
class Holding:
    """What lies in the folder under one id."""

    blob: BlobId
    files: dict[str, os.stat_result] = field(default_factory=dict)  # by suffix
    pins: set[str] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        return "" in self.files and ".index" in self.files

    @property
    def bytes(self) -> int:
        return sum(found.st_size for found in self.files.values())

    @property
    def used_at(self) -> float:
        return max((found.st_mtime for suffix, found in self.files.items() if suffix != ""), default=0.0)


def holdings(folder: Path) -> dict[BlobId, Holding]:
    """Everything in the folder, by id. Cost: one look at each file."""
    found: dict[BlobId, Holding] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is None:
                continue
            blob = BlobId(match[1])
            holding = found.setdefault(blob, Holding(blob))
            suffix = entry.name.removeprefix(blob)
            if suffix.startswith(PIN):
                holding.pins.add(suffix.removeprefix(PIN))
                continue
            try:
                holding.files[suffix] = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another process took it away in the meantime
                continue
    return found


class Room:
    """Keeps `folder` within `quota_bytes`, or within the disk alone when that is None."""

    def __init__(self, folder: Path, quota_bytes: int | None) -> None:
        self._folder, self._quota = folder, quota_bytes

    def usage(self) -> Usage:
        found = holdings(self._folder).values()
        return Usage(
            used_bytes=sum(holding.bytes for holding in found),
            pinned_bytes=sum(holding.bytes for holding in found if holding.pins),
            partial_bytes=sum(holding.bytes for holding in found if not holding.whole),
            quota_bytes=self._quota,
            free_bytes=shutil.disk_usage(self._folder).free,
        )

    @contextmanager
    def make(self, blob: BlobId | None, size: int) -> Iterator[None]:
        """Have room for `size` bytes, of `blob` when its id is known: what is here of it then counts for it.

        The room is promised until the body ends, so the body takes it: a file of that size, with holes or without.

        Raises: Unavailable with `need_bytes` and `have_bytes`; nothing was taken away then.
        """
        with self.alone():
            with disk(self._folder):
                found = holdings(self._folder)
            own = found.pop(blob, None) if blob is not None else None
            short = self._short(found, own, size)
            if short > 0:
                self._evict(self._victims(found, short, size))
            yield

    def _short(self, found: dict[BlobId, Holding], own: Holding | None, size: int) -> int:
        """How many bytes have to go before `size` bytes fit."""
        here = sum(s.st_blocks * 512 for s in own.files.values()) if own is not None else 0
        short = max(0, size - here) + SPARE_BYTES - shutil.disk_usage(self._folder).free
        if self._quota is not None:
            short = max(short, size + sum(holding.bytes for holding in found.values()) - self._quota)
        return short

    def _victims(self, found: dict[BlobId, Holding], short: int, size: int) -> list[Holding]:
        victims: list[Holding] = []
        for holding in sorted(found.values(), key=lambda h: h.used_at):
            if short > 0 and not self._stays(holding):
                victims.append(holding)
                short -= holding.bytes
        if short > 0:
            raise self._refusal(found, size)
        return victims

    def _evict(self, victims: list[Holding]) -> None:
        for holding in victims:
            forget(self._folder, holding)
            log.info("blob_evicted", blob=holding.blob, size_bytes=holding.bytes, folder=str(self._folder))

    def _refusal(self, found: dict[BlobId, Holding], size: int) -> Unavailable:
        free = max(0, shutil.disk_usage(self._folder).free - SPARE_BYTES)
        stays = sum(holding.bytes for holding in found.values() if self._stays(holding))
        goes = sum(holding.bytes for holding in found.values()) - stays
        have, limit = free + goes, f"the disk of {self._folder} has {free:,} bytes to spare"
        fix = "free some space, or choose a folder on another disk"
        if self._quota is not None and self._quota - stays < have:
            have = max(0, self._quota - stays)
            limit = f"of the quota of {self._quota:,} for {self._folder}, {stays:,} are pinned or in use"
            fix = "raise the quota, or unpin or remove what is no longer needed"
        return Unavailable(
            f"no room for {size:,} bytes: {limit}, at most {have:,} can be had; {fix}",
            retry_after_s=60.0,
            need_bytes=size,
            have_bytes=have,
        )

    def _stays(self, holding: Holding) -> bool:
        return self._quota is None or bool(holding.pins) or _in_use(self._folder, holding)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process makes room, begins a fetch or drops one meanwhile.

        Two that made room at once would each count on what the other takes.
        """
        with disk(self._folder):
            fd = open_file(self._folder / LOCK)
        try:
            lock_file(fd, f"{self._folder} is being made room in", wait=True)
            yield
        finally:
            os.close(fd)


def forget(folder: Path, holding: Holding) -> None:
    """Take the files of one id away, the index first: without it, the rest is no blob."""
    for suffix in sorted(holding.files, key=lambda s: s != ".index"):
        (folder / f"{holding.blob}{suffix}").unlink(missing_ok=True)


def _in_use(folder: Path, holding: Holding) -> bool:
    """Whether somebody is fetching or putting it just now."""
    return any(is_held(folder / f"{holding.blob}{suffix}") for suffix in (PART, PUT) if suffix in holding.files)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of this file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        lock_file(fd, str(path))
    except Conflict:
        return True
    finally:
        os.close(fd)
    return False
