"""The wires and pipes of `MemoryNetwork`: bytes that take time, in order, with faults.

A wire is one direction between two peers; its rate is shared by all its streams, and that of the uplink by all wires
from one peer. A pipe is one direction of one stream: what was written waits there until it has arrived and is read,
`WINDOW` bytes at most, so that a slow reader slows the writer.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel

from tessera.core.errors import Unavailable
from tessera.p2p.framing import READ_AHEAD

__all__ = ["MemoryChannel", "Pipe", "Uplink", "Wire"]

WINDOW = 1 << 20  # bytes of one pipe under way
RESEND_S = 0.2  # a lost packet is late by this, or by three delays


@dataclass(eq=False, slots=True)
class Uplink:
    """What all wires from one peer share. Packets leave in the order in which they were written."""

    rate_bytes_per_s: float | None = None
    _free_at: float = 0.0

    def departure(self, size: int, now: float) -> float:
        """When the last of `size` bytes, written `now`, has left."""
        if self.rate_bytes_per_s is None:
            return now
        self._free_at = max(now, self._free_at) + size / self.rate_bytes_per_s
        return self._free_at


@dataclass(eq=False, slots=True)
class Wire:
    """One direction between two peers. Change the fields while it runs."""

    rng: random.Random
    uplink: Uplink = field(default_factory=Uplink)
    delay_s: float = 0.0
    rate_bytes_per_s: float | None = None
    loss: float = 0.0  # chance that a packet of up to 16 KiB arrives late
    corrupt: float = 0.0  # chance that a packet has a byte changed: what a hostile peer's own engine could send
    read_bytes_per_s: float | None = None  # how fast the receiving application reads each stream
    cut: bool = False  # nothing arrives; what was sent arrives when it is mended
    carried_bytes: int = 0
    delivered_bytes: int = 0  # taken out by the reader
    pipes: set[Pipe] = field(default_factory=set)
    _free_at: float = 0.0

    def arrival(self, size: int) -> float:
        """When `size` bytes that are sent now have arrived."""
        self.carried_bytes += size
        start = max(self.uplink.departure(size, anyio.current_time()), self._free_at)
        self._free_at = start + (size / self.rate_bytes_per_s if self.rate_bytes_per_s else 0.0)
        late = max(RESEND_S, 3 * self.delay_s) if self.loss and self.rng.random() < self.loss else 0.0
        return self._free_at + self.delay_s + late

    def spoil(self, data: bytes) -> bytes:
        if not self.corrupt or self.rng.random() >= self.corrupt:
            return data
        place = self.rng.randrange(len(data))
        changed = data[place] ^ self.rng.randrange(1, 256)
        return data[:place] + bytes([changed]) + data[place + 1 :]

    def wake(self) -> None:
        for pipe in list(self.pipes):
            pipe.wake()


class Pipe:
    """One direction of one stream.

    Args:
        on_done: called once, when nothing more can come out of it.
    """

    def __init__(self, wire: Wire, on_done: Callable[[], None]) -> None:
        self._wire, self._on_done = wire, on_done
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued = 0
        self._last_arrival = 0.0
        self._finished = self._done = False
        self._writer_error: Unavailable | None = None
        self._reader_error: Unavailable | None = None
        self._changed = anyio.Event()
        wire.pipes.add(self)

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), READ_AHEAD):
            await anyio.lowlevel.checkpoint_if_cancelled()
            while self._writer_error is None and self._queued >= WINDOW:
                await self._changed.wait()
            self._check(self._writer_error)
            packet = self._wire.spoil(data[start : start + READ_AHEAD])
            self._last_arrival = max(self._last_arrival, self._wire.arrival(len(packet)))
            self._queue.append((self._last_arrival, packet))
            self._queued += len(packet)
            self.wake()

    async def read(self) -> bytes:
        """The next packet that has arrived; b"" at the end. Nothing is taken out when it is cancelled."""
        await self.readable()
        self._check(self._reader_error)
        if not self._queue:
            return b""
        rate = self._wire.read_bytes_per_s
        if rate:
            await anyio.sleep(len(self._queue[0][1]) / rate)
            self._check(self._reader_error)
        _, packet = self._queue.popleft()
        self._queued -= len(packet)
        self._wire.delivered_bytes += len(packet)
        self._settle()
        self.wake()
        return packet

    async def readable(self) -> None:
        """Wait until `read` has something to say: bytes, the end, or a failure."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        while self._reader_error is None:
            changed, timer = self._changed, None
            if not self._wire.cut:
                if not self._queue and self._finished:
                    return
                if self._queue:
                    loop, arrival = asyncio.get_running_loop(), self._queue[0][0]
                    if arrival <= loop.time():
                        return
                    timer = loop.call_at(arrival, self.wake)  # a fraction of what a cancel scope costs
            try:
                await changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    def finish(self) -> None:
        self._check(self._writer_error)
        self._finished = True
        self._settle()
        self.wake()

    @property
    def delivered(self) -> bool:
        """Whether nothing that was written and finished is still on its way."""
        return self._done or not self._finished

    def fail(self, reason: str, *, spare_finished: bool = False) -> None:
        """Both ends raise from now on, and what is under way is lost; a finished pipe may be spared."""
        if self._done or (spare_finished and self._finished):
            return
        self._writer_error = self._writer_error or Unavailable(reason, reason=reason)
        self._reader_error = self._reader_error or Unavailable(reason, reason=reason)
        self._queue.clear()
        self._queued = 0
        self._settle()
        self.wake()

    def abandon_writer(self, reason: str) -> None:
        """The writing process is dead: nothing more is written, and the reader is told nothing."""
        self._writer_error = self._writer_error or Unavailable(reason, reason=reason)
        self.wake()

    def abandon_reader(self, reason: str) -> None:
        """The reading process is dead: nothing more is read, and the writer is told nothing."""
        self._reader_error = self._reader_error or Unavailable(reason, reason=reason)
        self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _settle(self) -> None:
        over = self._reader_error is not None or (self._finished and not self._queue)
        if over and not self._done:
            self._done = True
            self._wire.pipes.discard(self)
            self._on_done()

    def _check(self, error: Unavailable | None) -> None:
        if error is not None:
            raise Unavailable(error.message, **error.fields)


class MemoryChannel:
    """A `Channel` on two pipes.

    Args:
        alive: whether the process on this side still runs; a dead one breaks off nothing, it is just silent.
    """

    def __init__(self, out: Pipe, back: Pipe, alive: Callable[[], bool]) -> None:
        self._out, self._back, self._alive = out, back, alive

    async def read(self, want: int) -> bytes:
        return await self._back.read()

    async def readable(self) -> None:
        await self._back.readable()

    async def write(self, data: bytes) -> None:
        await self._out.write(data)

    async def finish(self) -> None:
        self._out.finish()

    async def give_way(self) -> None:
        """Streams share a wire evenly here."""

    def release(self) -> None:
        """A pipe is done once it is finished and empty."""

    async def reset(self, code: int) -> None:
        if self._alive():
            self._out.fail(f"the stream was reset with code {code}")

    async def stop(self, code: int) -> None:
        if self._alive():
            self._back.fail(f"the stream was stopped with code {code}")
