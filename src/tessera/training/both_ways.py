"""Reading and writing one stream at the same time, until either fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NoReturn

import anyio

from tessera.core.errors import Misbehaviour, TesseraError

__all__ = ["both_ways"]

Way = Callable[[], Awaitable[NoReturn]]


async def both_ways(read: Way, write: Way) -> TesseraError:
    """Why one of them failed; the other is cancelled. When both did at once, misbehaviour counts before all else."""
    failures: list[TesseraError] = []

    async def guarded(way: Way) -> None:
        try:
            await way()
        except TesseraError as error:
            failures.append(error)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guarded, read)
        tasks.start_soon(guarded, write)
    return next((e for e in failures if isinstance(e, Misbehaviour)), failures[0])
