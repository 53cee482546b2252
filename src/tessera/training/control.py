"""The line between the lead and a worker: small messages in both directions, in order, queued with a bound.

    lead     hello, load, sync, open, take, windows, reset, prepare, commit, trained
    worker   state, loaded, done, evaluated, lost, prepared, unprepared, in_step, gate

A line that is full or silent is cut; the lead dials again. The lead's own worker has a line without a wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import anyio

from tessera.core import encoding
from tessera.core.errors import Late, Misbehaviour, TesseraError, Unavailable
from tessera.p2p.transport import Stream
from tessera.training.both_ways import both_ways
from tessera.training.mailbox import Mailbox

__all__ = ["Line", "LocalLine", "Message", "StreamLine", "local_pair"]

Message = dict[str, Any]

LINE_LIMIT = 1 << 20  # bytes of one message
TAKE_S = 30.0  # the other side takes a message in this time, or is gone
QUEUE = 4096  # messages


class Line(Protocol):
    """One end."""

    def say(self, message: Message) -> None:
        """Queue a message; never waits, never raises. A line whose queue is full is cut."""
        ...

    async def run(self, hear: Callable[[Message], None]) -> None:
        """Carry messages until the other side is gone. Raises: why it is."""
        ...

    def cut(self) -> None: ...


class StreamLine:
    """Over a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._outbox = Mailbox[bytes](QUEUE)
        self._scope = anyio.CancelScope()

    def say(self, message: Message) -> None:
        if not self._outbox.put(encoding.encode(message)):
            self._scope.cancel()

    def cut(self) -> None:
        self._scope.cancel()

    async def run(self, hear: Callable[[Message], None]) -> None:
        failure: TesseraError = Unavailable(f"the line to {self._stream.peer[:16]}… was cut")
        try:
            with self._scope:
                failure = await both_ways(lambda: self._read(hear), self._write)
        finally:
            with anyio.CancelScope(shield=True):
                await self._stream.abort()
        raise failure

    async def _read(self, hear: Callable[[Message], None]) -> NoReturn:
        while data := await self._stream.recv(LINE_LIMIT):
            message = encoding.decode(data, LINE_LIMIT)
            if not isinstance(message, dict) or not isinstance(message.get("op"), str):
                raise Misbehaviour("a message on the line is an object with an op", evidence=data[:64].hex())
            hear(message)
        raise Unavailable(f"{self._stream.peer[:16]}… closed the line")

    async def _write(self) -> NoReturn:
        while True:
            data = await self._outbox.get()
            with anyio.move_on_after(TAKE_S) as scope:
                await self._stream.send(data)
            if scope.cancelled_caught:
                raise Late(f"{self._stream.peer[:16]}… did not take a message for {TAKE_S:.0f} s")


class LocalLine:
    """Within one process. Made by `local_pair`."""

    def __init__(self) -> None:
        self._other: LocalLine | None = None
        self._inbox = Mailbox[Message](QUEUE)
        self._scope = anyio.CancelScope()

    def say(self, message: Message) -> None:
        if self._other is not None and not self._other._inbox.put(message):
            self.cut()

    def cut(self) -> None:
        if self._other is not None:
            self._other._scope.cancel()
        self._scope.cancel()

    async def first(self) -> Message:
        """What the other side says first."""
        return await self._inbox.get()

    async def run(self, hear: Callable[[Message], None]) -> None:
        with self._scope:
            while True:
                hear(await self._inbox.get())
        raise Unavailable("the line was cut")


def local_pair() -> tuple[LocalLine, LocalLine]:
    """Two ends; what one says the other hears."""
    a, b = LocalLine(), LocalLine()
    a._other, b._other = b, a
    return a, b
