"""Figures of blobs, measured between processes on loopback over encrypted links. Import the functions; no command here.

- `resume_bytes_ratio`: bytes sent for a blob that is interrupted 20 times at random, ÷ its bytes.
- `blob_mb_s_ratio`: rate of a fetch from three capped peers ÷ from one of them.
- `loopback_mb_s`: rate of a fetch, and of a raw stream of the same transport in the same run.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio

from tessera.core.ids import BlobId
from tessera.core.signing import PeerKey
from tessera.p2p.blobs import BlobStore, fetch
from tessera.p2p.iroh_transport import IrohTransport
from tessera.p2p.transport import PeerRecord

CHILD = Path(__file__).parent / "blob_peer.py"
RAW = "raw/1"
RAW_BYTES = 256 * 1024
CUTS = 20
KINDS = {  # how often each, in a quick and in a full run: some take seconds to be noticed
    "streams cut": (7, 4),
    "link silent": (1, 4),
    "server killed": (1, 4),
    "fetcher cancelled": (6, 4),
    "fetcher killed": (5, 4),
}
SILENCE_S = 4.0  # a link is given up after 3
GIVE_UP_S = 240.0


def resume_bytes_ratio(*, quick: bool, seed: int = 1) -> dict[str, Any]:
    """Interrupt a fetch 20 times, at random places and in random order: streams cut, link silent, server killed, fetch
    cancelled, fetch killed. Returns `resume_bytes_ratio` (everything the servers sent in UDP datagrams, QUIC's headers
    and repeats included, ÷ the blob's bytes), `size_bytes`, `sent_bytes`, `interruptions`, `seconds`.
    """
    size, rate = (16_000_000, 8e6) if quick else (100_000_000, 25e6)
    rng, started = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        blob, data = _blob(folder / "theirs", size, seed)
        places = sorted(rng.sample(range(size // 50, size - size // 50), CUTS))
        kinds = [kind for kind, times in KINDS.items() for _ in range(times[not quick])]
        rng.shuffle(kinds)
        with Server(folder, 2, port=_free_port(), bytes_per_s=rate) as server, Fetcher(folder, blob, server) as fetcher:
            done = 0
            for place, kind in zip(places, kinds, strict=True):
                fetcher.wait_for(place)
                _interrupt(kind, server, fetcher)
                done += 1
            fetcher.wait_for(None)
            sent = server.sent_bytes
        if BlobStore(folder / "mine").path(blob).read_bytes() != data:
            raise RuntimeError("the blob that came is another one")
    return {
        "resume_bytes_ratio": sent / size,
        "size_bytes": size,
        "sent_bytes": sent,
        "interruptions": done,
        "seconds": time.monotonic() - started,
    }


def blob_mb_s_ratio(*, quick: bool) -> dict[str, float]:
    """Returns `one_mb_s`, `three_mb_s`, `blob_mb_s_ratio`: a fetch from one capped peer, and from three."""
    size, rate = (6_000_000, 1e6) if quick else (48_000_000, 4e6)  # low enough that the caps bind, not the processor
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        blob, _ = _blob(folder / "theirs", size, 2)
        servers = [stack.enter_context(Server(folder, number, bytes_per_s=rate)) for number in (2, 3, 4)]
        records = [server.record for server in servers]
        one = anyio.run(_fetch_s, folder / "one", blob, records[:1])
        three = anyio.run(_fetch_s, folder / "three", blob, records)
    return {"one_mb_s": size / one / 1e6, "three_mb_s": size / three / 1e6, "blob_mb_s_ratio": one / three}


def loopback_mb_s(*, quick: bool) -> dict[str, float]:
    """Returns `blob_loopback_mb_s`, `raw_loopback_mb_s` and `blob_to_raw`: the median of three turns of each."""
    size, blob_s, raw_s = 32_000_000 if quick else 256_000_000, list[float](), list[float]()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        blob, _ = _blob(folder / "theirs", size, 3)
        with Server(folder, 2) as server:
            for turn in range(3):
                raw_s.append(anyio.run(_raw_s, server.record, size))
                blob_s.append(anyio.run(_fetch_s, folder / f"mine{turn}", blob, [server.record]))
    blob_rate, raw_rate = (size / statistics.median(seconds) / 1e6 for seconds in (blob_s, raw_s))
    return {"blob_loopback_mb_s": blob_rate, "raw_loopback_mb_s": raw_rate, "blob_to_raw": blob_rate / raw_rate}


# --- processes ------------------------------------------------------------------------------------------------------


class Server:
    """A process that serves `folder/theirs`."""

    def __init__(self, folder: Path, number: int, *, port: int = 0, bytes_per_s: float = 0) -> None:
        self._counter = folder / f"sent{number}"
        self._counter.write_bytes(bytes(8))
        self._command = ["serve", bytes([number] * 32).hex(), folder / "theirs", port, bytes_per_s, self._counter]
        self.start()

    @property
    def sent_bytes(self) -> int:
        return int.from_bytes(self._counter.read_bytes(), "big")

    def start(self) -> None:
        self._process = _start(*self._command)
        self.record = PeerRecord.from_text(_line(self._process))

    def kill(self) -> None:
        _kill(self._process)

    def cut(self) -> None:
        """Drop its streams."""
        self._process.send_signal(signal.SIGHUP)

    def fall_silent(self) -> None:
        """Long enough for its links to be given up."""
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(SILENCE_S)
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Fetcher:
    """A process that fetches into `folder/mine`, started again as long as the blob is not there."""

    def __init__(self, folder: Path, blob: BlobId, server: Server) -> None:
        self._command = ["fetch", bytes([9] * 32).hex(), folder / "mine", blob, server.record.to_text()]
        self._give_up = time.monotonic() + GIVE_UP_S
        self.start()

    def start(self) -> None:
        self.process = _start(*self._command)

    def wait_for(self, place: int | None) -> None:
        """Until this many bytes are here; None: all."""
        while time.monotonic() < self._give_up:
            line = self.process.stdout.readline().strip() if self.process.stdout else ""
            if line == "done":
                if place is not None:
                    raise RuntimeError(f"the fetch was complete before byte {place}")
                return
            if not line:
                if self.process.wait() != 75:
                    raise RuntimeError(f"the fetcher ended with {self.process.returncode}")
                _kill(self.process)
                self.start()
            elif place is not None and int(line) >= place:
                return
        raise RuntimeError(f"not complete within {GIVE_UP_S:g} s")

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait()
        _kill(self.process)

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self.process)


def _interrupt(kind: str, server: Server, fetcher: Fetcher) -> None:
    if kind == "streams cut":
        server.cut()
    elif kind == "link silent":
        server.fall_silent()
    elif kind == "server killed":
        server.kill()
        server.start()
    else:
        fetcher.stop(signal.SIGKILL if kind == "fetcher killed" else signal.SIGTERM)
        fetcher.start()


def _start(*command: object) -> subprocess.Popen[str]:
    words = [sys.executable, str(CHILD), *map(str, command)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline().strip() if process.stdout else ""
    if not line:
        raise RuntimeError(f"a peer process ended with {process.wait()}")
    return line


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- one measurement ------------------------------------------------------------------------------------------------


def _blob(folder: Path, size: int, seed: int) -> tuple[BlobId, bytes]:
    data = random.Random(seed).randbytes(size)
    return BlobStore(folder).put(data), data


async def _fetch_s(folder: Path, blob: BlobId, peers: list[PeerRecord]) -> float:
    async with _me() as transport:
        started = time.monotonic()
        await fetch(transport, peers, blob, BlobStore(folder), timeout_s=GIVE_UP_S)
        return time.monotonic() - started


async def _raw_s(peer: PeerRecord, size: int) -> float:
    async with _me() as transport:
        started = time.monotonic()
        stream = await transport.open(peer, RAW, timeout_s=10, bulk=True)
        await stream.send(str(size).encode(), last=True)
        while data := await stream.recv(RAW_BYTES):
            size -= len(data)
        if size:
            raise RuntimeError(f"{size} bytes did not come")
        return time.monotonic() - started


def _me() -> Any:
    return IrohTransport.start(PeerKey(os.urandom(32)))
