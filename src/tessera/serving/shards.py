"""The worker's side of decoding over peers: protocol "tessera/decode/3".

    gateway ──open, step──▶ stage 0 ──▶ stage 1 ──▶ ... ──▶ last stage ──token──▶ gateway

A session is a chain of streams: the gateway opens one to stage 0, each stage opens one to the next, and the gateway
listens at the last stage, which samples and answers straight to it. Steps flow one way only, and so do failures: a
stage that fails tells the next one, and the last tells the gateway.

Invariants: a session's cache lives as long as its stream; every wait on a peer has a deadline; sessions, frames and
prompts are bounded; a stage takes sessions from workers of the stage before it only. Where a stage has several workers,
any of them will do, and one that is away is passed over; the last stage's is whom the gateway listens to.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.to_thread
import structlog

from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId, parse_peer_id
from tessera.serving.engine import Sampling
from tessera.serving.frames import Frame
from tessera.serving.links import PROTOCOL, Limits, Link, Record, Roster, Stream, Transport

__all__ = ["Decoder", "FixedRoster", "ShardConfig", "ShardServer", "serve_decode"]

SESSION_CHARACTERS = 32  # of a session's name: 128 random bits as hex, so that nobody guesses another's
log = structlog.get_logger()


class Decoder(Protocol):
    """What a stage can do; `tessera.models.decode.StageDecoder` is one. Called from one thread at a time."""

    def step(self, session: str, ids: list[int], payload: bytes | None, *, position: int | None = None) -> Any:
        """The next stage's message, or the logits on the last stage."""
        ...

    def drop(self, session: str) -> None: ...

    def payload_limit(self, tokens: int) -> int: ...


@dataclass(frozen=True, slots=True)
class FixedRoster:
    """A roster that never changes: records by stage."""

    records: tuple[tuple[Record, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.records)

    def holders(self, stage: int) -> Sequence[Record]:
        return self.records[stage]


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """Limits of one stage. Times in seconds."""

    context: int  # most tokens of a session
    vocab_size: int
    max_sessions: int = 32
    idle_timeout_s: float = 60.0  # without a step from the stage before
    open_timeout_s: float = 10.0  # for the stages after this one to be ready, and for a listener's session to open
    send_timeout_s: float = 10.0  # for a peer to take a frame


@dataclass
class _Listener:
    link: Link
    taken: anyio.Event = field(default_factory=anyio.Event)
    done: anyio.Event = field(default_factory=anyio.Event)


class ShardServer:
    """One stage that decodes; `serve_decode` makes it answer peers."""

    def __init__(
        self,
        transport: Transport,
        decoder: Decoder,
        stage: int,
        roster: Roster,
        config: ShardConfig,
        gateways: frozenset[PeerId] | None,
    ) -> None:
        if not 0 <= stage < roster.stages:
            raise Invalid(f"stage {stage} of {roster.stages}")
        self._transport = transport
        self._decoder = decoder
        self._stage = stage
        self._roster = roster
        self._config = config
        self._gateways = gateways
        self._last = stage == roster.stages - 1
        self._sessions: set[str] = set()
        self._listeners: dict[str, _Listener] = {}
        self._computing = anyio.CapacityLimiter(1)  # a decoder is used from one thread at a time

    @property
    def sessions(self) -> int:
        """Sessions open now, each with its cache."""
        return len(self._sessions)

    @property
    def listeners(self) -> int:
        """Gateways listening now; always 0 but on the last stage."""
        return len(self._listeners)

    async def handle(self, stream: Stream) -> None:
        """One stream of the protocol, from its first frame to its end. Peers' failures end it, they do not escape."""
        link = Link(stream, self._limits())
        try:
            frame = await link.receive(self._config.open_timeout_s)
            if frame is None:
                return
            session = _session_name(frame)
            if frame.op == "listen":
                await self._listen(link, session)
            elif frame.op == "open":
                await self._decode(link, session, frame)
            else:
                raise Misbehaviour(f"a decode stream starts with open or listen, not {str(frame.op)[:40]!r}")
        except TesseraError as error:
            log.info("decode_stream_failed", stage=self._stage, peer_id=link.peer, error=error.code)
            await link.close(error)
        finally:
            await link.close()

    async def _listen(self, link: Link, session: str) -> None:
        """Lends the gateway's stream to its session, until that ends or the gateway hangs up."""
        if not self._last:
            raise Invalid(f"stage {self._stage} is not the last: there is nothing to listen to")
        self._check_gateway(link.peer)
        if session in self._listeners:
            raise Conflict("somebody listens to this session already")
        if len(self._listeners) >= self._config.max_sessions:
            raise Unavailable(f"{self._config.max_sessions} gateways listen already")
        listener = self._listeners[session] = _Listener(link)
        late = False
        try:
            await link.send({"op": "ready"}, timeout_s=self._config.send_timeout_s)
            async with anyio.create_task_group() as group:
                group.start_soon(_when_hung_up, link, group.cancel_scope)
                with anyio.move_on_after(self._config.open_timeout_s):
                    await listener.taken.wait()
                if listener.taken.is_set():
                    await listener.done.wait()  # bounded: a session ends by its own deadlines
                late = not listener.taken.is_set()
                group.cancel_scope.cancel()
            if late:
                raise Late(f"no session was opened within {self._config.open_timeout_s:g} s of listening")
        finally:
            self._listeners.pop(session, None)

    async def _decode(self, link: Link, session: str, opened: Frame) -> None:
        sampling = self._check_open(link.peer, session, opened)
        self._sessions.add(session)
        try:
            if self._last:
                await self._run_last(link, session, sampling)
            else:
                await self._run_before(link, session, opened)
        finally:
            with anyio.CancelScope(shield=True):  # waits for a step that still runs
                await anyio.to_thread.run_sync(self._decoder.drop, session, limiter=self._computing)
            self._sessions.discard(session)

    async def _run_before(self, link: Link, session: str, opened: Frame) -> None:
        """A stage that has another after it: compute, pass on."""
        config = self._config
        after = await self._open_next(opened)
        try:
            await link.send({"op": "ready"}, timeout_s=config.send_timeout_s)
            async for step in self._steps(link):
                out = await self._step(session, step)
                await after.send(step.header, step.ids, out, timeout_s=config.send_timeout_s)
        except TesseraError as error:
            await after.close(error)
            raise
        finally:
            await after.close()

    async def _open_next(self, opened: Frame) -> Link:
        """The session at the next stage: at the worker whom the gateway listens to, or at the first who answers.

        Raises: what the last one of them said.
        """
        config, stage, last = self._config, self._stage + 1, opened.header["last"]
        holders = [r for r in self._roster.holders(stage) if stage < self._roster.stages - 1 or r.id == last]
        failure: TesseraError = Unavailable(f"nobody whom the gateway listens to holds stage {stage}")
        for record in holders:
            try:
                share_s = config.open_timeout_s / len(holders)
                after = Link(await self._transport.open(record, PROTOCOL, timeout_s=share_s), self._limits())
                try:
                    await after.send(opened.header | {"stage": stage}, timeout_s=config.send_timeout_s)
                    await after.await_ready(config.open_timeout_s)
                    return after
                except TesseraError as error:
                    await after.close(error)
                    raise
            except (Unavailable, Late) as error:
                failure = error
        raise failure

    async def _run_last(self, link: Link, session: str, sampling: Sampling) -> None:
        """The last stage: compute, choose, tell the gateway."""
        listener = self._listeners.get(session)
        if listener is None or listener.taken.is_set():
            raise Missing("nobody listens to this session: listen first, then open")
        listener.taken.set()
        try:
            await link.send({"op": "ready"}, timeout_s=self._config.send_timeout_s)
            async for step in self._steps(link):
                position = step.header["start"] + len(step.ids)
                token = await self._step(session, step, sampling)
                header = {"op": "token", "position": position}
                await listener.link.send(header, [token], timeout_s=self._config.send_timeout_s)
        except TesseraError as error:
            await listener.link.close(error)
            raise
        finally:
            listener.done.set()

    async def _steps(self, link: Link) -> AsyncIterator[Frame]:
        """The session's steps in order, until the stage before says goodbye."""
        position = 0
        while (frame := await link.receive(self._config.idle_timeout_s)) is not None:
            start = frame.header.get("start")
            if frame.op != "step" or not frame.ids or type(start) is not int or start != position:
                raise Misbehaviour(f"expected a step at token {position}", evidence=str(frame.header)[:200])
            if position + len(frame.ids) > self._config.context:
                raise Invalid(f"{position} + {len(frame.ids)} tokens do not fit a context of {self._config.context}")
            position += len(frame.ids)
            yield frame

    async def _step(self, session: str, frame: Frame, sampling: Sampling | None = None) -> Any:
        """The stage's own work, in a thread, one session at a time: the next stage's message, or the chosen token."""
        payload = frame.payload if self._stage or frame.payload else None
        start = frame.header["start"]

        def work() -> Any:
            out = self._decoder.step(session, frame.ids, payload, position=start)
            return out if sampling is None else _choose(out, sampling, start + len(frame.ids))

        return await anyio.to_thread.run_sync(work, limiter=self._computing)

    def _check_open(self, peer: PeerId, session: str, frame: Frame) -> Sampling:
        header = frame.header
        if header.keys() != {"op", "session", "stage", "last", "sampling"} or frame.ids or frame.payload:
            raise Misbehaviour("open holds session, stage, last and sampling", evidence=str(sorted(header))[:200])
        parse_peer_id(header["last"])
        if header["stage"] != self._stage:
            raise Invalid(f"this is stage {self._stage}, not {str(header['stage'])[:20]}")
        if self._stage == 0:
            self._check_gateway(peer)
        elif peer not in {record.id for record in self._roster.holders(self._stage - 1)}:
            raise Refused(f"only workers of stage {self._stage - 1} open sessions here", rule="stage_before")
        if session in self._sessions:
            raise Conflict("this session is open already")
        if len(self._sessions) >= self._config.max_sessions:
            raise Unavailable(f"{self._config.max_sessions} sessions are open on stage {self._stage}")
        return Sampling.from_dict(header["sampling"])

    def _check_gateway(self, peer: PeerId) -> None:
        if self._gateways is not None and peer not in self._gateways:
            raise Refused("this peer is not a gateway of the run", rule="gateways")

    def _limits(self) -> Limits:
        payload = self._decoder.payload_limit(self._config.context) if self._stage else 0
        return Limits(self._config.context, self._config.vocab_size, payload)


def serve_decode(
    transport: Transport,
    decoder: Decoder,
    stage: int,
    roster: Roster,
    config: ShardConfig,
    *,
    gateways: frozenset[PeerId] | None = None,
) -> ShardServer:
    """Serves `stage` to the peers of `roster`.

    Args:
        gateways: who may open sessions at stage 0 and listen at the last stage; None = anybody.

    Returns: the server, whose counters tell how busy it is.
    """
    server = ShardServer(transport, decoder, stage, roster, config, gateways)
    transport.serve(PROTOCOL, server.handle, max_streams=2 * config.max_sessions + 2)
    return server


def _choose(logits: Any, sampling: Sampling, position: int) -> int:
    from tessera.serving.sampling import choose  # torch, which only the last stage needs here

    return choose(logits, sampling, position)


async def _when_hung_up(link: Link, scope: anyio.CancelScope) -> None:
    """Cancels `scope` when the listening gateway goes; it has nothing to say, so anything ends it."""
    with suppress(TesseraError):
        await link.receive(math.inf)  # as long as the session, which has its own deadlines
    scope.cancel()


def _session_name(frame: Frame) -> str:
    session = frame.header.get("session")
    if not isinstance(session, str) or len(session) != SESSION_CHARACTERS:
        raise Misbehaviour(f"a session's name has {SESSION_CHARACTERS} characters", evidence=str(session)[:80])
    return session
