"""One session at one stage: its steps in, its results on.

Steps come from the stage before, at stage 0 from the gateway. A step may say that stage 0 shall go on by itself for
some tokens (`more`): then stage 0 hears each token from the last stage and feeds it at once, a hop earlier than the
gateway could. Results go to the next stage or, on the last, to whoever listens.

Invariants: a frame is checked before it costs anything; steps are computed in the order in which they came; the session
ends everywhere when one end of it ends, and the next stage is told why.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from tessera.core.errors import Misbehaviour, TesseraError, Unavailable
from tessera.models.steps import Step
from tessera.serving.decoding.batches import Batches
from tessera.serving.decoding.frames import Frame
from tessera.serving.decoding.links import Link
from tessera.serving.income.gate import Budget

__all__ = ["MAX_GUESSES", "MAX_MORE", "ShardConfig", "Sink", "StageSession", "TowardsNext"]

MAX_GUESSES = 16
MAX_MORE = 64  # tokens that stage 0 may go on by itself; each waits in the gateway's stream at most


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """Limits of one stage. Times in seconds."""

    context: int  # most tokens of a session
    vocab_size: int
    max_sessions: int = 32
    max_step_tokens: int = 128  # of one session at once; longer prompts come in pieces
    batch_tokens: int = 256  # of one forward over several sessions
    idle_timeout_s: float = 60.0  # without a step from the stage before
    open_timeout_s: float = 10.0  # for the stages after this one to be ready, and for a listener's session to open
    send_timeout_s: float = 10.0  # for a peer to take a frame


@dataclass(frozen=True, slots=True)
class Asked:
    """A step that came: `step`, and how many tokens stage 0 shall feed by itself after it."""

    step: Step
    more: int


class Sink(Protocol):
    """Where the results of a session's steps go."""

    async def put(self, step: Step, answer: Any) -> None: ...

    async def watch(self) -> None:
        """Ends, or raises, when whoever takes the results is gone."""
        ...


class TowardsNext:
    """The results of a stage before the last.

    Args:
        needed: the next stage has the messages of so many tokens.
        messages: what this stage made of tokens from and to a place.
    """

    def __init__(
        self, link: Link, needed: int, messages: Callable[[int, int], Awaitable[bytes]], config: ShardConfig
    ) -> None:
        self._link = link
        self._needed = needed
        self._messages = messages
        self._config = config

    async def replay(self, ids: list[int], kept: int) -> None:
        """Sends what this stage has of `ids` and the next has not: the messages of tokens computed before."""
        for start in range(self._needed, kept, self._config.max_step_tokens):
            end = min(kept, start + self._config.max_step_tokens)
            await self._send(start, 0, ids[start:end], await self._messages(start, end))

    async def put(self, step: Step, answer: bytes) -> None:
        start = step.start or 0
        skip = self._needed - start
        if skip >= len(step.ids):
            return
        if skip > 0:
            answer = await self._messages(self._needed, start + len(step.ids))
        await self._send(start + max(0, skip), step.want, step.ids[max(0, skip) :], answer)

    async def watch(self) -> None:
        await self._link.receive(math.inf)  # as long as the session, which has its own deadlines
        raise Unavailable("the next stage hung up")

    async def _send(self, start: int, want: int, ids: list[int], payload: bytes) -> None:
        header = {"op": "step", "start": start, "want": want}
        await self._link.send(header, ids, payload, timeout_s=self._config.send_timeout_s)


class StageSession:
    """Runs until the stage before says goodbye, or something fails.

    Args:
        budget: how far it may go.
        hidden: hidden states are wanted instead of tokens.
        ring: at stage 0, where the last stage tells its tokens.
        loop: this stage is the first and the last: its own tokens are what it goes on with.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        sink: Sink,
        batches: Batches,
        config: ShardConfig,
        budget: Budget,
        *,
        stage: int,
        hidden: bool,
        ring: Link | None = None,
        loop: bool = False,
    ) -> None:
        self._name = name
        self._link = link
        self._sink = sink
        self._batches = batches
        self._config = config
        self._budget = budget
        self._stage = stage
        self._hidden = hidden
        self._ring = ring
        self._loop = loop
        self._more = 0  # tokens that stage 0 still feeds by itself
        self._next = 0  # the position of the token that it feeds next
        self._failure: TesseraError | None = None

    async def run(self) -> None:
        """Raises: why the session ended, unless by a goodbye."""
        inbox, steps = anyio.create_memory_object_stream[Asked](1)
        async with inbox, steps, anyio.create_task_group() as group:

            async def part(work: Awaitable[None]) -> None:
                try:
                    await work
                except TesseraError as error:
                    self._failure = self._failure or error
                group.cancel_scope.cancel()

            group.start_soon(part, self._hear(inbox))
            group.start_soon(part, self._sink.watch())
            if self._ring is not None:
                group.start_soon(part, self._go_on(self._ring, inbox))
            group.start_soon(part, self._work(steps))
        if self._failure is not None:
            raise self._failure

    async def _hear(self, inbox: MemoryObjectSendStream[Asked]) -> None:
        while (frame := await self._receive()) is not None:
            asked = self._check(frame)
            if self._more:
                raise Misbehaviour("a step came while this stage goes on by itself", evidence=str(frame.header)[:200])
            self._more, self._next = asked.more, (asked.step.start or 0) + len(asked.step.ids)
            await inbox.send(asked)

    async def _receive(self) -> Frame | None:
        try:
            return await self._link.receive(self._config.idle_timeout_s)
        except Unavailable as error:
            if "peer_code" not in error.fields:
                error.fields["stage"] = self._stage - 1  # it is the one that is gone, and cannot say so
            raise

    async def _go_on(self, ring: Link, inbox: MemoryObjectSendStream[Asked]) -> None:
        """Feeds the tokens that the last stage tells, as far as the gateway said."""
        while (frame := await ring.receive(math.inf)) is not None:
            if self._more and frame.op == "token" and frame.header.get("position") == self._next:
                if len(frame.ids) != 1:
                    raise Misbehaviour("one token was asked for", evidence=str(frame.header)[:200])
                await inbox.send(self._own(frame.ids[0]))
        raise Unavailable("the last stage hung up")

    def _own(self, token: int) -> Asked:
        start, self._next, self._more = self._next, self._next + 1, self._more - 1
        self._budget.reach(start, start + 1, start + 1)
        return Asked(Step(self._name, [token], None, start), self._more)

    async def _work(self, steps: MemoryObjectReceiveStream[Asked]) -> None:
        async for asked in steps:
            while True:
                try:
                    answer = await self._batches.step(asked.step)
                except TesseraError as error:
                    error.fields.setdefault("stage", self._stage)
                    raise
                await self._sink.put(asked.step, answer)
                if not (self._loop and asked.more):
                    break
                asked = self._own(answer[0].id)

    def _check(self, frame: Frame) -> Asked:
        """Raises: Misbehaviour, Invalid."""
        header, count = frame.header, len(frame.ids)
        keys = {"op", "start", "want"} | ({"more"} if self._stage == 0 else set())
        if frame.op != "step" or header.keys() != keys:
            raise Misbehaviour(f"a step holds {sorted(keys)}", evidence=str(header)[:200])
        start, want, more = header["start"], header["want"], header.get("more", 0)
        if (
            any(type(value) is not int for value in (start, want, more))
            or not 1 <= count <= self._config.max_step_tokens
        ):
            raise Misbehaviour(
                f"a step has integers and up to {self._config.max_step_tokens} ids", evidence=str(header)
            )
        if start < 0 or not 0 <= want <= min(count, MAX_GUESSES + 1) or not 0 <= more <= MAX_MORE:
            raise Misbehaviour("a step out of range", evidence=str(header)[:200])
        if more and (want != 1 or self._hidden):
            raise Misbehaviour("only after one chosen token a stage can go on by itself", evidence=str(header)[:200])
        if start + count + more > self._config.context:
            raise Misbehaviour(f"{start} + {count} + {more} tokens do not fit {self._config.context}")
        payload = frame.payload if self._stage or frame.payload else None
        step = Step(self._name, frame.ids, payload, start, want, self._hidden)
        self._budget.reach(start, start + step.final, start + count + more)
        return Asked(step, more)
