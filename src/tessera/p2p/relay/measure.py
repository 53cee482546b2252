"""How fast messages go between two nodes of this machine: directly, and through a relay in a process of its own.

Both in the same run, so that the ratio says what the detour costs. The relayed way is made the only one by turning the
two nodes deaf: a filter on their UDP sockets drops whatever arrives.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from tessera.core.errors import Unavailable
from tessera.core.signing import PeerKey
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.relay.probe import probe_relay
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import Stream

__all__ = ["LinkSpeed", "deafen", "measure_links", "relay_process"]

MB = 1_000_000
SO_ATTACH_FILTER = 26  # linux/include/uapi/asm-generic/socket.h; Python has no name for it
START_S = 15.0
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)  # BPF: return 0 bytes of the packet
_SERVE = """
import anyio, structlog
from tessera.p2p.relay.server import Relay, RelayConfig
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
async def main():
    async with Relay.start(RelayConfig()) as relay:
        print(relay.url, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What `measure_links` found. MB = 10^6 bytes."""

    direct_mb_s: float
    relay_mb_s: float
    direct_rtt_s: float  # of 1 KiB there and back, the median
    relay_rtt_s: float
    relay_cpu_share: float  # of one core, while it forwarded


async def measure_links(*, message_bytes: int = 8 << 20, messages: int = 8) -> LinkSpeed:
    """Send `messages` of `message_bytes` each over one stream, on both ways, on loopback. Needs Linux.

    Raises: Unavailable where sockets cannot be made deaf, or nothing arrives.
    """
    async with _pair() as (caller, server):
        direct, direct_rtt = await _flow(caller, server, message_bytes, messages)
    async with relay_process() as (relay, pid):
        async with _pair(relay) as (caller, server):
            before, began = _cpu_s(pid), time.perf_counter()
            relayed, relay_rtt = await _flow(caller, server, message_bytes, messages)
            share = (_cpu_s(pid) - before) / (time.perf_counter() - began)
    return LinkSpeed(direct, relayed, direct_rtt, relay_rtt, share)


@asynccontextmanager
async def relay_process() -> AsyncIterator[tuple[RelayUrl, int]]:
    """A relay on loopback, open to all, in a process of its own: its URL and process id."""
    async with await anyio.open_process([sys.executable, "-c", _SERVE], stderr=None) as process:
        try:
            line = b""
            with anyio.fail_after(START_S):
                while process.stdout is not None and not line.endswith(b"\n"):
                    line += await process.stdout.receive()
            relay = RelayUrl(line.decode().strip())
            await probe_relay(relay.url)
            yield relay, process.pid
        finally:
            if process.returncode is None:
                process.terminate()


def deafen(transport: IrohTransport) -> None:
    """Let no UDP packet reach this node any more: only its relays stay. Raises: Unavailable where that is no Linux."""
    ports = {int(str(bound).rpartition(":")[2]) for bound in transport._endpoint.bound_sockets()}
    done = 0
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        done += _deaf(int(name), ports)
    if done < len(ports):
        raise Unavailable(f"found {done} of this node's {len(ports)} UDP sockets; this needs Linux")


def _deaf(descriptor: int, ports: set[int]) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        copy = socket.socket(fileno=os.dup(descriptor))
    except OSError:  # it was closed meanwhile
        return False
    with copy:
        inet = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_DGRAM
        if not inet or copy.getsockname()[1] not in ports:
            return False
        program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
        copy.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
        return True


@asynccontextmanager
async def _pair(relay: RelayUrl | None = None) -> AsyncIterator[tuple[IrohTransport, IrohTransport]]:
    relays = (relay,) if relay is not None else ()
    async with AsyncExitStack() as stack:
        pair = [
            await stack.enter_async_context(IrohTransport.start(PeerKey.generate(), relays=relays, direct=not relays))
            for _ in range(2)
        ]
        for transport in pair if relays else ():
            deafen(transport)
            if not await transport.online(START_S):
                raise Unavailable("the relay does not let the nodes in")
        yield pair[0], pair[1]


async def _flow(caller: IrohTransport, server: IrohTransport, size: int, count: int) -> tuple[float, float]:
    """MB/s one way, and the round trip of 1 KiB in seconds."""

    async def take(stream: Stream) -> None:
        while data := await stream.recv(size):
            await stream.send(data[:1024])

    server.serve("measure/1", take)
    stream = await caller.open(server.record(), "measure/1", timeout_s=START_S)
    trips = []
    for _ in range(20):
        began = time.perf_counter()
        await stream.send(bytes(1024))
        await stream.recv(1024)
        trips.append(time.perf_counter() - began)
    data, began = os.urandom(size), time.perf_counter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_send_all, stream, data, count)
        for _ in range(count):
            await stream.recv(1024)
    seconds = time.perf_counter() - began
    await stream.abort()
    return size * count / seconds / MB, sorted(trips)[len(trips) // 2]


def _cpu_s(pid: int) -> float:
    """User and system seconds of a process (proc(5): fields 14 and 15; the second one may hold spaces)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _send_all(stream: Stream, data: bytes, count: int) -> None:
    for _ in range(count):
        await stream.send(data)
