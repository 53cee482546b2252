"""Time that passes only when nothing else can: an hour of timeouts takes milliseconds.

`run_virtual` runs on an asyncio loop whose clock jumps to the next timer whenever no task is ready, so every deadline
of anyio, and every sleep, is virtual. Work in threads is waited for in real time, during which the clock stands still.
A program in which every task waits for something that cannot come is reported instead of hanging.

Threads are seen through anyio's default limiter only. Real sockets do not belong here: their answers take real time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, TypeVarTuple

import anyio
from anyio import to_thread

__all__ = ["VirtualClock", "run_virtual"]

Args = TypeVarTuple("Args")
T = TypeVar("T")

START = 1_800_000_000.0  # seconds since 1970 at loop time 0
THREAD_POLL_S = 0.02
HORIZON_S = 100 * 365 * 86_400.0  # `sleep_forever` is a timer too: nobody waits a century for anything else
LAST_CHANCE_S = 1.0  # real seconds that something outside may still wake a loop that has nothing to do


def run_virtual(function: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
    """`await function(*args)` in virtual time, from ordinary code.

    Raises: what `function` raises; RuntimeError when every task waits for something that cannot come.

    >>> run_virtual(anyio.sleep, 3600)
    """

    async def main() -> T:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, _VirtualLoop):
            raise TypeError(f"expected our own loop, not {type(loop).__name__}")
        loop.threads = to_thread.current_default_thread_limiter()
        return await function(*args)

    return anyio.run(main, backend="asyncio", backend_options={"loop_factory": _VirtualLoop})


class VirtualClock:
    """A `Clock` that follows the running loop: virtual under `run_virtual`."""

    def time(self) -> float:
        return START + anyio.current_time()


class _VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that owns its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.threads: anyio.CapacityLimiter | None = None
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: moves the loop's clock instead."""

    def __init__(self, loop: _VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._loop.threads is not None and self._loop.threads.borrowed_tokens:
            return super().select(THREAD_POLL_S)
        if timeout is not None:
            self._loop.now += timeout
            if self._loop.now < HORIZON_S:
                return events
        events = super().select(LAST_CHANCE_S)
        if not events:
            raise RuntimeError("deadlock: every task waits for something that cannot come")
        return events
