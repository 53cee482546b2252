"""A task group that is owned by an object and closed by it, without cancelling whoever opened it.

A failure of the `async with` body comes out as itself, not inside an exception group. A task that dies of a bug takes
the body down with it: nothing fails in silence.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVarTuple

import anyio
import anyio.abc

__all__ = ["Background", "background"]

Args = TypeVarTuple("Args")


class Background:
    """Made by `background()`."""

    def __init__(self) -> None:
        self._group: anyio.abc.TaskGroup | None = None
        self._over = anyio.Event()

    @property
    def closed(self) -> bool:
        return self._group is None

    def start_soon(self, function: Callable[[*Args], Coroutine[Any, Any, Any]], *args: *Args) -> None:
        """Run `function(*args)` until it ends or this closes. Does nothing once closed."""
        if self._group is not None:
            self._group.start_soon(function, *args)

    async def close(self) -> None:
        """Cancel everything and wait until it is gone. Must not be called from one of its own tasks."""
        group, self._group = self._group, None
        if group is not None:
            group.cancel_scope.cancel()
        await self._over.wait()

    def cancel(self) -> None:
        """Cancel everything without waiting."""
        group, self._group = self._group, None
        if group is not None:
            group.cancel_scope.cancel()

    async def _run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._group = None
            self._over.set()


@asynccontextmanager
async def background() -> AsyncIterator[Background]:
    """A `Background` that lives as long as the body."""
    failure: Exception | None = None
    tasks = Background()
    async with anyio.create_task_group() as outer:
        await outer.start(tasks._run)
        try:
            yield tasks
        except Exception as error:  # noqa: BLE001 - raised below, outside the group, so that it is not wrapped
            failure = error
        finally:
            with anyio.CancelScope(shield=True):
                await tasks.close()
    if failure is not None:
        raise failure
