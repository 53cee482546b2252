"""One stage's work, taken together: what waits while a forward runs is the next forward.

There is no task of its own: whoever waits and finds nobody computing computes for all. Each session has one step in the
queue at most, and the queue is served in order, so that every session gets as much as every other; a long prompt comes
in pieces between which the others have their turn.

Invariants: the decoder is used from one place at a time; a caller who is cancelled leaves nobody waiting; the queue is
bounded by the sessions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import structlog

from tessera.core.errors import TesseraError, Unavailable
from tessera.models.steps import Step

__all__ = ["Batches", "Compute", "in_thread"]

log = structlog.get_logger()
T = TypeVar("T")
Compute = Callable[[Callable[[], Any], Sequence[Step]], Awaitable[Any]]  # runs work that blocks, for these steps


async def in_thread(work: Callable[[], Any], steps: Sequence[Step]) -> Any:
    return await anyio.to_thread.run_sync(work)


@dataclass
class _Wish:
    """A step, or (`step` None) something short to do with the decoder while it rests."""

    step: Step | None
    act: Callable[[], Any] | None = None
    answer: Any = None
    done: bool = False
    event: anyio.Event = field(default_factory=anyio.Event)


class Batches:
    """Answers steps through `run`, which takes several at once.

    Args:
        run: gives an answer, or an error, for each step.
        most_tokens: of one forward, beyond its first step.
        compute: where `run` runs.
    """

    def __init__(
        self, run: Callable[[list[Step]], Sequence[Any]], *, most_tokens: int, compute: Compute = in_thread
    ) -> None:
        self._run = run
        self._most_tokens = most_tokens
        self._compute = compute
        self._waiting: deque[_Wish] = deque()
        self._computing = False

    async def step(self, step: Step) -> Any:
        """What `run` says to this step. Raises: what it says, if that is an error."""
        return await self._wait(_Wish(step))

    async def resting(self, act: Callable[[], T]) -> T:
        """Does something short while nothing is computed. Raises: what it raises."""
        answer: T = await self._wait(_Wish(None, act))
        return answer

    async def _wait(self, wish: _Wish) -> Any:
        await anyio.lowlevel.checkpoint_if_cancelled()  # a forward is shielded: here is where a caller can be stopped
        self._waiting.append(wish)
        try:
            while not wish.done:
                if self._computing:
                    await wish.event.wait()
                    wish.event = anyio.Event()
                else:
                    await self._serve()
        finally:
            if not wish.done and wish in self._waiting:
                self._waiting.remove(wish)
                self._wake()  # whoever this one would have computed for
        if isinstance(wish.answer, Exception):
            raise wish.answer
        return wish.answer

    async def _serve(self) -> None:
        """The short things first, then one forward for as many as fit."""
        self._computing = True
        try:
            for wish in [wish for wish in self._waiting if wish.step is None]:
                self._waiting.remove(wish)
                self._answer(wish, _outcome(wish.act) if wish.act is not None else None)
            batch = self._take()
            if batch:
                with anyio.CancelScope(shield=True):  # bounded: a forward ends
                    answers = await self._forward([wish.step for wish in batch if wish.step is not None])
                for wish, answer in zip(batch, answers, strict=True):
                    self._answer(wish, answer)
        finally:
            self._computing = False
            self._wake()

    def _take(self) -> list[_Wish]:
        batch, tokens = list[_Wish](), 0
        while self._waiting and (step := self._waiting[0].step) is not None:
            if batch and tokens + len(step.ids) > self._most_tokens:
                break
            tokens += len(step.ids)
            batch.append(self._waiting.popleft())
        return batch

    async def _forward(self, steps: list[Step]) -> Sequence[Any]:
        try:
            answers: Sequence[Any] = await self._compute(partial(self._run, steps), steps)
        except TesseraError as error:
            return [error] * len(steps)
        except Exception:  # out of memory, a broken device: these sessions end, the stage goes on
            log.exception("forward_failed", sessions=len(steps))
            return [Unavailable("the stage could not compute this step")] * len(steps)
        return answers

    def _answer(self, wish: _Wish, answer: Any) -> None:
        wish.answer, wish.done = answer, True
        wish.event.set()

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].event.set()


def _outcome(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except TesseraError as error:
        return error
