"""A decode stream seen as frames with deadlines, and what serving asks of a transport.

Invariants: every wait has a deadline; every frame is bounded and checked; a link is closed once, with a reason if there
is one, and closing never raises.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from tessera.core.errors import Late, Misbehaviour, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.serving.decoding.frames import Frame, frame_limit, pack, unpack

__all__ = ["PROTOCOL", "Limits", "Link", "Record", "Roster", "Stream", "Transport"]

PROTOCOL = "tessera/decode/3"
CLOSE_TIMEOUT_S = 1.0


class Record(Protocol):
    """How to reach a peer; `tessera.p2p.PeerRecord` is one."""

    @property
    def id(self) -> PeerId: ...


class Stream(Protocol):
    """A framed stream to an authenticated peer."""

    @property
    def peer(self) -> PeerId: ...

    async def send(self, data: bytes, *, last: bool = False) -> None: ...
    async def recv(self, limit: int) -> bytes: ...
    async def abort(self, code: int = 0) -> None: ...


class Transport(Protocol):
    """What serving asks of the peers' transport; those of `tessera.p2p` fit."""

    def serve(self, protocol: str, handler: Callable[[Stream], Awaitable[None]], *, max_streams: int = 64) -> None: ...

    async def open(self, peer: Any, protocol: str, *, timeout_s: float, confirm: bool = True) -> Stream:
        """Without `confirm` a refusal comes with what is received."""
        ...


class Roster(Protocol):
    """Who holds which stage now."""

    @property
    def stages(self) -> int: ...

    def holders(self, stage: int) -> Sequence[Record]:
        """At least one; any of them will do."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest frame that may come: `payload` code bytes beside `tokens` ids."""

    tokens: int
    vocab_size: int
    payload: int = 0


class Link:
    """One stream of the decode protocol."""

    def __init__(self, stream: Stream, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._closed = False

    @property
    def peer(self) -> PeerId:
        return self._stream.peer

    async def receive(self, timeout_s: float) -> Frame | None:
        """The next frame; None when the peer is done. An error frame is raised as what it says.

        Raises: Late, Misbehaviour, Unavailable.
        """
        limits = self._limits
        try:
            with anyio.fail_after(timeout_s):
                data = await self._stream.recv(frame_limit(limits.tokens, limits.payload))
        except TimeoutError:
            raise Late(f"nothing from {self.peer[:16]}… within {timeout_s:g} s") from None
        if not data:
            return None
        frame = unpack(data, max_tokens=limits.tokens, vocab_size=limits.vocab_size)
        if frame.op == "error":
            raise _peer_error(frame)
        return None if frame.op == "close" else frame

    async def send(
        self, header: dict[str, Any], ids: Sequence[int] = (), payload: bytes = b"", *, timeout_s: float
    ) -> None:
        """Raises: Late when the peer does not take it in time; Unavailable when it is gone."""
        try:
            with anyio.fail_after(timeout_s):
                await self._stream.send(pack(header, ids, payload))
        except TimeoutError:
            raise Late(f"{self.peer[:16]}… took no frame within {timeout_s:g} s") from None

    async def await_ready(self, timeout_s: float) -> Frame:
        """The peer's ready. Raises: what it said instead."""
        frame = await self.receive(timeout_s)
        if frame is None:
            raise Unavailable(f"{self.peer[:16]}… hung up before it was ready")
        if frame.op != "ready":
            raise Misbehaviour(f"expected ready, not {str(frame.op)[:40]!r}", evidence=str(frame.header)[:200])
        return frame

    async def close(self, error: TesseraError | None = None) -> None:
        """Says goodbye, or why not, and ends the stream. Never raises; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        header = {"op": "close"} if error is None else _error_header(error)
        done = False
        with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            try:
                await self._stream.send(pack(header), last=True)
                done = True
            except TesseraError:  # it is gone: nobody to tell
                pass
        if not done:
            await self.abort()

    async def abort(self) -> None:
        """Drops the stream at once, both ways. Never raises."""
        self._closed = True
        with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            try:
                await self._stream.abort()
            except TesseraError:
                return


def _error_header(error: TesseraError) -> dict[str, Any]:
    """A failure for the wire: its class and message, and at which stage it was; without evidence or other fields."""
    stage = error.fields.get("stage")
    return {
        "op": "error",
        "code": error.fields.get("peer_code", error.code),
        "message": error.message[:500],
        "at": stage,
    }


def _peer_error(frame: Frame) -> TesseraError:
    """What to raise for a peer's error frame. Whatever it was there, here it is a stage that did not do its work.

    `peer_code` is the code that it had there, `stage` where that was, None when nobody said.
    """
    header = frame.header
    stage = header.get("at") if type(header.get("at")) is int else None
    fields: dict[str, Any] = {"peer_code": str(header.get("code"))[:40], "stage": stage}
    message = str(header.get("message"))[:500]
    if fields["peer_code"] == Late.code:
        return Late(message if message.startswith("a stage") else f"a stage timed out: {message}", **fields)
    if message.startswith("a stage failed"):
        return Unavailable(message, **fields)
    return Unavailable(f"a stage failed ({fields['peer_code']}): {message}", **fields)
