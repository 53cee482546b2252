"""What the tests of relays share: peers that have only a relay, relays that meddle, and peers as processes.

`python tests/relay_world.py serve|call …` is a peer of its own, for network namespaces.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import anyio

from p2p_world import LIMIT, Doomed, key, serve_all
from tessera.cli.logs import configure_logs
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.relay.connection import Connection
from tessera.p2p.relay.frames import Kind
from tessera.p2p.relay.measure import deafen
from tessera.p2p.relay.probe import Visitor
from tessera.p2p.relay.server import Relay, RelayConfig
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord

TOKEN = "open-sesame-open"


def url_of(relay: Relay, token: str = "") -> RelayUrl:
    return RelayUrl(relay.url, token)


@asynccontextmanager
async def far_peers(*relays: RelayUrl, count: int = 2) -> AsyncIterator[list[IrohTransport]]:
    """Peers that hear nothing but what comes through a relay; each serves `echo/1` and `answer/1`."""
    async with AsyncExitStack() as stack:
        peers = []
        for number in range(1, count + 1):
            start = IrohTransport.start(key(number), relays=relays, direct=False)
            peers.append(await stack.enter_async_context(start))
            deafen(peers[-1])
            serve_all(peers[-1])
        for peer in peers:
            assert await peer.online(10)
        yield peers


async def ask(caller: IrohTransport, peer: PeerRecord, body: bytes = b"x", timeout_s: float = 15) -> bytes:
    _, back = await call(caller, peer, "answer/1", {}, body, timeout_s=timeout_s, reply_limit=LIMIT)
    return back


async def big(caller: IrohTransport, peer: PeerRecord, data: bytes) -> bytes:
    """One large message there and back."""
    stream = await caller.open(peer, "echo/1", timeout_s=10)
    try:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as sending:
                sending.start_soon(stream.send, data)
                return await stream.recv(LIMIT)
    finally:
        await stream.abort()


def paths(peer: IrohTransport) -> list[Any]:
    """The engine's paths to all peers, as it describes them."""
    return [path for links in peer._links.values() for link in links for path in link._connection.paths()]


def relay_bytes(transport: IrohTransport) -> int:
    """Received through relays, by this node's engine."""
    return int(transport._endpoint.stats()["socket:recv_data_relay"].value)


@asynccontextmanager
async def visitor(relay: Relay, peer: PeerKey, token: str = "") -> AsyncIterator[Visitor]:
    """A client without an engine, which can say whatever it likes."""
    with anyio.fail_after(5):
        guest = await Visitor.enter(url_of(relay, token), peer)
    try:
        yield guest
    finally:
        await guest.leave()


def datagram(to: PeerKey, content: bytes) -> bytes:
    return bytes((Kind.SEND,)) + bytes.fromhex(to.id) + b"\0" + content


@asynccontextmanager
async def far_peer_process(relay: Relay, seed: int = 9) -> AsyncIterator[Doomed]:
    """A peer that has only the relay, in a process that can be killed."""
    async with await anyio.open_process(
        [sys.executable, __file__, "far", str(seed), relay.url], stderr=None
    ) as process:
        assert process.stdout is not None
        try:
            text = b""
            with anyio.fail_after(30):
                while not text.endswith(b"\n"):
                    text += await process.stdout.receive()
            yield Doomed(PeerRecord.from_text(text.decode().strip()), process.kill, process.pid)
        finally:
            if process.returncode is None:
                process.kill()


class Meddler(Relay):
    """A relay that does with datagrams whatever `meddle` says; `meddling` is how many it has touched."""

    meddling = 0
    on = False

    def forward(self, source: Connection, payload: bytes) -> None:
        for changed in self.meddle(payload) if self.on else (payload,):
            super().forward(source, changed)

    def meddle(self, payload: bytes) -> Iterator[bytes]:
        raise NotImplementedError


class Witness(Relay):
    """A relay that writes down everything that anybody says to it, as it comes and once more unmasked."""

    def __init__(self, config: RelayConfig) -> None:
        super().__init__(config)
        self.record = record = bytearray()

        class Recorded(Connection):
            def buffer_updated(self, nbytes: int) -> None:
                kept = len(self._tail)
                record.extend(self._hub.buffer[kept : kept + nbytes])  # as it came, requests and all
                super().buffer_updated(nbytes)

            def hear(self, payload: bytes) -> None:
                record.extend(payload)
                super().hear(payload)

        self.connection = Recorded  # type: ignore[misc]


# --- peers as processes, in network namespaces ----------------------------------------------------------------------


class Namespaces:
    """A small internet: the namespace `net` with the relay's address, and peers around it. Root only."""

    RELAY = "10.99.0.1"

    def __init__(self, prefix: str) -> None:
        self.prefix, self.made = prefix, [f"{prefix}-net"]
        self.net = self.made[0]

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def inside(self, name: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", name, *words]

    def run(self, name: str, *words: str) -> None:
        subprocess.run(self.inside(name, *words), check=True, capture_output=True)

    def open(self) -> None:
        self._add(self.net)
        self.ip("-n", self.net, "addr", "add", f"{self.RELAY}/32", "dev", "lo")

    def lonely(self, number: int) -> str:
        """A peer that reaches the relay's address and nothing else."""
        name = self._add(f"{self.prefix}-p{number}", new=True)
        self._wire(self.net, name, f"10.99.{number}.1/30", f"10.99.{number}.2/30", number)
        self.ip("-n", name, "route", "add", f"{self.RELAY}/32", "via", f"10.99.{number}.1")
        return name

    def behind_router(self, number: int) -> str:
        """A peer at home: a private address, and a router that translates it and lets nobody in."""
        router = self._add(f"{self.prefix}-r{number}", new=True)
        peer = self._add(f"{self.prefix}-h{number}", new=True)
        self._wire(self.net, router, f"10.99.{number}.1/30", f"10.99.{number}.2/30", number)
        self.ip("-n", router, "route", "add", "default", "via", f"10.99.{number}.1")
        self._wire(router, peer, "192.168.7.1/24", "192.168.7.2/24", 100 + number)
        self.ip("-n", peer, "route", "add", "default", "via", "192.168.7.1")
        outside = f"v{number}b"
        for rule in (
            ["-t", "nat", "-A", "POSTROUTING", "-o", outside, "-j", "MASQUERADE"],
            ["-A", "FORWARD", "-i", outside, "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"],
            ["-A", "FORWARD", "-i", outside, "-j", "DROP"],
            ["-A", "INPUT", "-i", outside, "-p", "udp", "-j", "DROP"],
        ):
            self.run(router, "iptables", *rule)
        for name in (router, self.net):
            self.run(name, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        return peer

    def close(self) -> None:
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _add(self, name: str, new: bool = False) -> str:
        if new:
            self.made.append(name)
        self.ip("netns", "add", name)
        self.ip("-n", name, "link", "set", "lo", "up")
        return name

    def _wire(self, one: str, other: str, one_address: str, other_address: str, number: int) -> None:
        ends = (f"v{number}a", f"v{number}b")
        self.ip("link", "add", ends[0], "netns", one, "type", "veth", "peer", "name", ends[1], "netns", other)
        for name, end, address in ((one, ends[0], one_address), (other, ends[1], other_address)):
            self.ip("-n", name, "addr", "add", address, "dev", end)
            self.ip("-n", name, "link", "set", end, "up")


@contextmanager
def namespaces(prefix: str) -> Iterator[Namespaces]:
    world = Namespaces(prefix)
    try:
        world.open()
        yield world
    finally:
        world.close()


def spawn(world: Namespaces, name: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        world.inside(name, sys.executable, *words), stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )


async def _serve(seed: int, relay: RelayUrl) -> None:
    async with IrohTransport.start(key(seed), bind="0.0.0.0:0", relays=(relay,)) as peer:
        serve_all(peer)
        await peer.online(10)
        await anyio.sleep(1)  # until it knows how it looks from outside
        sys.stdout.write(peer.record().to_text() + "\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


async def _far(seed: int, relay: RelayUrl) -> None:
    async with IrohTransport.start(key(seed), relays=(relay,), direct=False) as peer:
        deafen(peer)
        serve_all(peer)
        await peer.online(10)
        sys.stdout.write(peer.record().to_text() + "\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


async def _call(seed: int, relay: RelayUrl, record: PeerRecord, direct_s: float) -> dict[str, Any]:
    """Through nothing but the relay's address in the record; then see whether a direct path is found in time."""
    async with IrohTransport.start(key(seed), bind="0.0.0.0:0", relays=(relay,)) as peer:
        online = await peer.online(10)
        small = await ask(peer, record, b"hello")
        began = time.monotonic()
        data = bytes(8 << 20)
        whole = await big(peer, record, data) == data
        seconds = time.monotonic() - began
        with anyio.move_on_after(direct_s):
            while not any(path.is_ip and path.is_selected for path in paths(peer)):
                await ask(peer, record)
                await anyio.sleep(0.1)
        found = [{"relay": path.is_relay, "selected": path.is_selected} for path in paths(peer)]
        return {"online": online, "small": small.decode(), "whole": whole, "seconds": seconds, "paths": found}


def _main(role: str, seed: str, url: str, *rest: str) -> None:
    configure_logs("warning")  # to standard error; standard output is for the answer
    relay = RelayUrl(url, TOKEN)
    if role in ("serve", "far"):
        anyio.run(_serve if role == "serve" else _far, int(seed), relay)
    else:
        result = anyio.run(_call, int(seed), relay, PeerRecord.from_text(rest[0]), float(rest[1]))
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
