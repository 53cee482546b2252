"""Two processes behind one worker: rank 0 is the test's own process, rank 1 a real one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tessera.models.parallel_link import RankLink, World, parallel_world

FOLLOWER = """
import torch
from tessera.models.parallel import run_follower
from tessera.models.parallel_link import RankLink, parallel_world
torch.set_num_threads(1)
world = parallel_world()
with RankLink(world, world.device("cpu"), timeout_s=30) as link:
    run_follower(link)
"""


def environment(rank: int, port: int) -> dict[str, str]:
    """As torchrun would set it."""
    return {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@contextmanager
def two_ranks(timeout_s: float = 30.0) -> Iterator[tuple[RankLink, subprocess.Popen[str]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER], env=os.environ | environment(1, port), stderr=subprocess.PIPE, text=True
    )
    before = dict(os.environ)
    os.environ.update(environment(0, port))
    try:
        world = parallel_world()
        assert world == World(0, 2, 0, 2)
        with RankLink(world, "cpu", timeout_s=timeout_s) as link:
            yield link, follower
    finally:
        os.environ.clear()
        os.environ.update(before)
        follower.kill()
        follower.communicate(timeout=20)
