"""Peers in network namespaces, as they are in homes: only the relay can be dialled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import relay_world
from p2p_world import key
from relay_world import TOKEN, Namespaces, namespaces, spawn
from tessera.p2p.transport import PeerRecord

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2"),
]

RELAY = """
import sys, anyio
from tessera.cli.logs import configure_logs
from tessera.p2p.relay.server import Relay, RelayConfig
configure_logs("warning")
async def main():
    async with Relay.start(RelayConfig(host="0.0.0.0", port=3340, tokens=(sys.argv[1],))) as relay:
        print("up", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


@contextmanager
def running(*processes: subprocess.Popen[str]) -> Iterator[list[str]]:
    """The first line that each says; they are killed at the end."""
    try:
        yield [(process.stdout.readline() if process.stdout else "").strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def meet(world: Namespaces, server: str, caller: str, direct_s: float) -> dict[str, Any]:
    """One calls the other, of which it knows only the relay; what it saw."""
    url, peer = f"http://{world.RELAY}:3340", relay_world.__file__
    with running(spawn(world, world.net, "-c", RELAY, TOKEN)) as (said,):
        assert said == "up"
        with running(spawn(world, server, peer, "serve", "1", url)) as (text,):
            full = PeerRecord.from_text(text)
            only_relay = PeerRecord.sign(key(1), (f"relay:{url}",), full.expires)
            command = [peer, "call", "2", url, only_relay.to_text(), str(direct_s)]
            calling = spawn(world, caller, *command)
            out, _ = calling.communicate(timeout=60)
            assert calling.returncode == 0
            return {**json.loads(out), "addrs": full.addrs}


def test_two_peers_that_reach_only_the_relay_exchange_messages() -> None:
    with namespaces("tsl") as world:
        seen = meet(world, world.lonely(1), world.lonely(2), direct_s=1.5)
    assert seen["online"]
    assert seen["small"] == "hello"
    assert seen["whole"]
    assert [path for path in seen["paths"] if path["selected"]] == [{"relay": True, "selected": True}]


@pytest.mark.skipif(shutil.which("iptables") is None, reason="needs iptables")
def test_two_peers_behind_home_routers_end_up_on_a_direct_path() -> None:
    with namespaces("tsh") as world:
        seen = meet(world, world.behind_router(1), world.behind_router(2), direct_s=15)
    assert seen["whole"]
    assert any(addr.startswith("iroh:10.99.1.2:") for addr in seen["addrs"]), "the router's address is published"
    assert {"relay": False, "selected": True} in seen["paths"]
