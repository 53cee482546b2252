"""Two network namespaces with a slow link between them, for real engines; needs root and /dev/net/tun.

Each namespace has one TUN device; a process moves the packets from one to the other at a rate, after a delay, through a
queue that drops what comes when it is full: a home uplink. `python tests/shaped_link.py ROLE …` are the processes.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio

NAMESPACES = ("tessera-a", "tessera-b")
ADDRESSES = ("10.78.0.1", "10.78.0.2")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
BURST = 64  # packets read before the queue is looked at


def possible() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and Path("/dev/net/tun").exists()


@contextmanager
def shaped(rate_bytes_per_s: float, delay_s: float, queue_s: float = 0.2) -> Iterator[None]:
    """The namespaces exist and their link works while the body runs. The delay is one way."""
    command = [sys.executable, __file__, "shape", str(rate_bytes_per_s), str(delay_s), str(queue_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline().strip() != "READY":
                raise RuntimeError("the link could not be made")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def inside(end: int, *role: str) -> list[str]:
    """The command that runs `role` of this file at one end of the link."""
    return ["nsenter", f"--net=/run/netns/{NAMESPACES[end]}", sys.executable, __file__, *role]


# --- the link -------------------------------------------------------------------------------------------------------


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stderr=subprocess.PIPE)


def _tun(end: int) -> int:
    name, namespace = f"tess{end}", NAMESPACES[end]
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    _ip("netns", "add", namespace)
    _ip("link", "set", name, "netns", namespace)  # the descriptor stays with the device
    _ip("-n", namespace, "addr", "add", f"{ADDRESSES[end]}/24", "dev", name)
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", namespace, "link", "set", name, "mtu", "1500", "txqueuelen", "2000", "up")
    return descriptor


def _remove() -> None:
    for namespace in NAMESPACES:
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "del", namespace)


def _shape(rate: float, delay_s: float, queue_s: float) -> None:
    _remove()
    going = True

    def stop(*_: object) -> None:
        nonlocal going
        going = False

    signal.signal(signal.SIGTERM, stop)
    try:
        ends = [_tun(0), _tun(1)]
        sys.stdout.write("READY\n")
        sys.stdout.flush()
        poll, free = select.epoll(), [0.0, 0.0]
        under_way: list[tuple[float, int, int, bytes]] = []
        for end in ends:
            poll.register(end, select.EPOLLIN)
        number = 0
        while going:
            for descriptor, _ in poll.poll(max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.5):
                source = ends.index(descriptor)
                for packet in _read(descriptor):
                    now = time.monotonic()
                    start = max(now, free[source])
                    if start - now <= queue_s:  # else the queue is full, and the packet is lost
                        free[source] = start + len(packet) / rate
                        number += 1
                        heapq.heappush(under_way, (free[source] + delay_s, number, 1 - source, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(under_way)
                with suppress(OSError):
                    os.write(ends[target], packet)
    finally:
        _remove()


def _read(descriptor: int) -> Iterator[bytes]:
    for _ in range(BURST):
        try:
            yield os.read(descriptor, 2048)
        except BlockingIOError:
            return


# --- its ends -------------------------------------------------------------------------------------------------------


async def _serve() -> None:
    from p2p_world import key, serve_all
    from tessera.p2p.iroh_transport import IrohTransport
    from tessera.p2p.transport import Stream

    async def swallow(stream: Stream) -> None:
        while await stream.recv(1 << 24):
            pass

    async with IrohTransport.start(key(2), bind=f"{ADDRESSES[1]}:0") as transport:
        serve_all(transport)
        transport.serve("swallow/1", swallow)
        sys.stdout.write(transport.record().to_text() + "\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


async def _upload(record_text: str, uplink: str, warm_s: float) -> None:
    """Two uploads, and 1 KiB calls beside them. Prints the round trips in seconds, and the bytes per second."""
    from p2p_world import key
    from tessera.p2p.calls import call
    from tessera.p2p.iroh_transport import IrohTransport
    from tessera.p2p.pacer import Pacer
    from tessera.p2p.transport import PeerRecord

    record = PeerRecord.from_text(record_text)
    pacer = None if uplink == "none" else Pacer() if uplink == "measured" else Pacer(float(uplink))
    async with IrohTransport.start(key(1), bind=f"{ADDRESSES[0]}:0", pacer=pacer) as transport:
        streams = [await transport.open(record, "swallow/1", timeout_s=10, bulk=True) for _ in range(2)]

        async def upload(number: int) -> None:
            while True:
                await streams[number].send(bytes(1 << 20))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upload, 0)
            tasks.start_soon(upload, 1)
            await anyio.sleep(warm_s)
            started, before = time.monotonic(), sum(stream.sent_bytes for stream in streams)
            trips = []
            while time.monotonic() < started + 6:
                at = time.monotonic()
                await call(transport, record, "answer/1", {}, bytes(1024), timeout_s=10, reply_limit=4096)
                trips.append(time.monotonic() - at)
                await anyio.sleep(0.05)
            rate = (sum(stream.sent_bytes for stream in streams) - before) / (time.monotonic() - started)
            found = pacer.uplink_bytes_per_s if pacer is not None else None
            sys.stdout.write(json.dumps({"trips": trips, "rate": rate, "uplink": found}) + "\n")
            sys.stdout.flush()
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    role, arguments = sys.argv[1], sys.argv[2:]
    if role == "shape":
        _shape(*map(float, arguments))
    elif role == "serve":
        anyio.run(_serve)
    else:
        anyio.run(_upload, arguments[0], arguments[1], float(arguments[2]))
