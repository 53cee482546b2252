"""A disk that really is full, while a blob comes in. Needs root, for a small file system in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blob_world import DATA, served, stores
from tessera.core.errors import Unavailable
from tessera.p2p.blob_room import SPARE_BYTES
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blobs import fetch, serve_blobs
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import Transport


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SPARE_BYTES + 2 * len(DATA)}", "none", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            continue
    return folder / "filler"


def test_a_disk_that_is_filled_by_somebody_else_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    (theirs,) = stores(tmp_path, "theirs")
    mine = BlobStore(small_disk / "blobs")
    blob, fillers = theirs.put(DATA), list[Path]()

    def progress(here: int, size: int) -> None:
        if here > size // 2 and not fillers:
            fillers.append(fill(small_disk))

    async def body(network: MemoryNetwork, me: Transport, peer: Transport) -> None:
        serve_blobs(peer, theirs)
        with pytest.raises(Unavailable, match="No space left on device; free some space"):
            await fetch(me, [peer.record()], blob, mine, timeout_s=60, progress=progress)
        with pytest.raises(Unavailable, match="free some space, or choose a folder on another disk"):
            await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        with pytest.raises(Unavailable, match="no room"):
            mine.put(b"x")
        fillers[0].unlink()
        got = await fetch(me, [peer.record()], blob, mine, timeout_s=60)
        assert got.kept_bytes > len(DATA) // 2
        assert got.path.read_bytes() == DATA

    served(1, body)
