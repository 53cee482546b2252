"""How a command lives and dies: Ctrl-C and SIGTERM cancel it in order, a failure keeps its name."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from tessera.core.errors import TesseraError

__all__ = ["run_until_signal"]


def run_until_signal(start: Callable[[], Coroutine[Any, Any, None]], *, until_stdin_closes: bool = False) -> None:
    """Run `start()` to its end, or until SIGINT or SIGTERM cancels it; everything it opened is closed then.

    Args:
        until_stdin_closes: end as well when whoever holds the other end of our standard input is gone, however it went.

    Raises: the command's own TesseraError, taken out of any group it came in; KeyboardInterrupt after SIGINT.
    """
    caught: list[int] = []

    async def main() -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_watch, tasks.cancel_scope, caught)
                if until_stdin_closes:
                    tasks.start_soon(_watch_stdin, tasks.cancel_scope)
                await start()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _only(group) from group

    anyio.run(main)
    if signal.SIGINT in caught:
        raise KeyboardInterrupt


async def _watch(scope: anyio.CancelScope, caught: list[int]) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            caught.append(number)
            scope.cancel()
            return


async def _watch_stdin(scope: anyio.CancelScope) -> None:
    while True:
        await anyio.wait_readable(sys.stdin)
        if not os.read(sys.stdin.fileno(), 4096):
            scope.cancel()
            return


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one failure to show: a named one if there is any."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_only(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in leaves if isinstance(error, TesseraError)), leaves[0])
