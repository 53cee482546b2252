"""Machines that are network namespaces: each with its own addresses, and no way but those that a test lays.

Needs root and iproute2. Without them a test is skipped, except with CI=true, where that is a failure.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ETH_P_ALL = 3
RELAY_ADDRESS = "10.99.0.1"


def need_namespaces() -> None:
    """Skip, or fail in CI, where namespaces cannot be made."""
    if os.geteuid() == 0 and shutil.which("ip") and _run("ip", "netns", "list").returncode == 0:
        return
    reason = "network namespaces need root and iproute2"
    if os.environ.get("CI") == "true" and os.geteuid() == 0:
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Machine:
    """One namespace. `address` is where others may reach it, if anything leads there."""

    name: str
    address: str

    def command(self, *words: str | Path) -> list[str]:
        """`words`, to be run inside."""
        return ["ip", "netns", "exec", self.name, *map(str, words)]

    def run(self, *words: str | Path, check: bool = True) -> str:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{words} in {self.name}: {done.stderr.strip()}")
        return done.stdout


@contextmanager
def machines_on_a_lan(names: list[str], rate: str = "") -> Iterator[list[Machine]]:
    """All on one bridge: 10.66.0.1, 10.66.0.2 …

    Args:
        rate: of each one's link in both directions, as tc writes it (80mbit); empty = unlimited.
    """
    tag = f"t{os.getpid() % 10_000}"
    with ExitStack() as stack:
        hub = stack.enter_context(_namespace(f"{tag}hub"))
        _ip("-n", hub, "link", "add", "lan", "type", "bridge")
        _ip("-n", hub, "link", "set", "lan", "up")
        machines = []
        for number, name in enumerate(names, start=1):
            machine = Machine(stack.enter_context(_namespace(f"{tag}{name}")), f"10.66.0.{number}")
            _cable(hub, f"p{number}", machine.name, rate)
            _ip("-n", hub, "link", "set", f"p{number}", "master", "lan")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            machines.append(machine)
        yield machines


@contextmanager
def machines_behind_a_relay(names: list[str]) -> Iterator[tuple[Machine, list[Machine]]]:
    """Each on a cable of its own to the relay's machine, which forwards no packet: nothing else can be reached."""
    tag = f"t{os.getpid() % 10_000}"
    with ExitStack() as stack:
        relay = Machine(stack.enter_context(_namespace(f"{tag}relay")), RELAY_ADDRESS)
        _ip("-n", relay.name, "addr", "add", f"{RELAY_ADDRESS}/32", "dev", "lo")
        relay.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=0")
        machines = []
        for number, name in enumerate(names, start=1):
            machine = Machine(stack.enter_context(_namespace(f"{tag}{name}")), f"10.67.{number}.2")
            _cable(relay.name, f"p{number}", machine.name, "")
            _ip("-n", relay.name, "addr", "add", f"10.67.{number}.1/24", "dev", f"p{number}")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            _ip("-n", machine.name, "route", "add", RELAY_ADDRESS, "via", f"10.67.{number}.1")
            machines.append(machine)
        yield relay, machines


class Recorder:
    """Everything that passes a machine's interfaces, in memory, while the `with` lasts."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._stop = machine, threading.Event()
        self._chunks: list[bytes] = []
        self._socket: socket.socket | None = None

    def __enter__(self) -> Recorder:
        opened: list[socket.socket] = []

        def open_inside() -> None:  # a namespace belongs to a thread: this one does nothing else
            with Path(f"/run/netns/{self._machine.name}").open() as file:
                os.setns(file.fileno(), 0x40000000) if hasattr(os, "setns") else _setns(file.fileno())
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
            raw.settimeout(0.2)
            opened.append(raw)
            while not self._stop.is_set():
                try:
                    self._chunks.append(raw.recv(65_536))
                except TimeoutError:
                    continue

        self._thread = threading.Thread(target=open_inside, daemon=True)
        self._thread.start()
        while not opened:
            if not self._thread.is_alive():
                raise RuntimeError("the recorder did not start")
            self._stop.wait(0.01)
        self._socket = opened[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)
        if self._socket is not None:
            self._socket.close()

    @property
    def bytes_seen(self) -> int:
        return sum(map(len, self._chunks))

    def holds(self, secret: bytes) -> bool:
        """Whether any packet holds these bytes, as they are or in hex."""
        forms = (secret, secret.hex().encode())
        return any(form in chunk for chunk in self._chunks for form in forms)


def _setns(descriptor: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        for pid in _run("ip", "netns", "pids", name).stdout.split():
            _run("kill", "-9", pid)
        _run("ip", "netns", "del", name)


def _cable(hub: str, port: str, machine: str, rate: str) -> None:
    _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", machine)
    _ip("-n", hub, "link", "set", port, "up")
    _ip("-n", machine, "link", "set", "eth0", "up")
    for namespace, device in ((hub, port), (machine, "eth0")):
        if rate:
            limit = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "100ms")
            _ip("netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, *limit)


def _ip(*words: str) -> None:
    done = _run("ip", *words)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=30)
