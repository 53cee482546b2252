"""The worker's side of decoding over peers: protocol "tessera/decode/3".

    gateway ──open, step──▶ stage 0 ──▶ stage 1 ──▶ ... ──▶ last stage ──token──▶ gateway
                               ▲                                 │
                               └──────────────token──────────────┘

A session is a chain of streams: the gateway opens one to stage 0, each stage opens one to the next, and the gateway
listens at the last stage, which samples and answers straight to it. Stage 0 listens there too, so that it can feed a
token before the gateway has seen it. `open` carries the session's text so far; each stage answers how much of it it
still has from before, and is fed from there on: by the messages that the stage before it kept, or by new ones. So a
session that lost a stage, or had to make way somewhere, is opened again and computes only what is gone.

Failures flow both ways: a stage that fails tells the next one, the last tells the gateway, and the one before learns
it.

Invariants: a session's cache is held as long as its stream; every wait on a peer has a deadline; sessions, frames and
prompts are bounded; a stage takes sessions from workers of the stage before it only. Where a stage has several workers,
any of them will do, and one that is away is passed over; the last stage's is whom the gateway listens to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import anyio
import structlog

from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId, parse_peer_id
from tessera.models.steps import Step
from tessera.serving.decoding.batches import Batches, Compute, in_thread
from tessera.serving.decoding.dialling import Dialler
from tessera.serving.decoding.frames import Frame, pack_hidden, pack_logprobs
from tessera.serving.decoding.links import PROTOCOL, Limits, Link, Record, Roster, Stream, Transport
from tessera.serving.decoding.stage_session import MAX_GUESSES, ShardConfig, StageSession, TowardsNext
from tessera.serving.engine import Sampling, Token
from tessera.serving.income.gate import Budget, Gate, OpenGate

__all__ = ["Decoder", "FixedRoster", "ShardConfig", "ShardServer", "serve_decode"]

SESSION_CHARACTERS = 32  # of a session's name: 128 random bits as hex, so that nobody guesses another's
log = structlog.get_logger()


class Decoder(Protocol):
    """What a stage can do; `tessera.models.decode.StageDecoder` is one. Called from one thread at a time."""

    def open(self, session: str, ids: Sequence[int], *, source: str = "") -> int:
        """How many of the text `ids` need not be fed: what was computed before from messages of the same source."""
        ...

    def run(self, steps: Sequence[Step]) -> Sequence[Any]:
        """For each step the next stage's message, on the last stage logits or hidden states; or an error."""
        ...

    def messages(self, session: str, start: int, end: int) -> bytes: ...

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


@dataclass
class _Audience:
    """Who listens to a session at the last stage: the gateway, and stage 0."""

    links: dict[bool, Link] = field(default_factory=dict)  # by whether it is stage 0
    opened: anyio.Event = field(default_factory=anyio.Event)
    closed: anyio.Event = field(default_factory=anyio.Event)
    deserted: anyio.Event = field(default_factory=anyio.Event)  # by the gateway


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
        compute: Compute,
        gate: Gate,
    ) -> None:
        if not 0 <= stage < roster.stages:
            raise Invalid(f"stage {stage} of {roster.stages}")
        self._decoder = decoder
        self._stage = stage
        self._roster = roster
        self._config = config
        self._gateways = gateways
        self._gate = gate
        self._last = stage == roster.stages - 1
        self._sessions: dict[str, Sampling | None] = {}
        self._audiences: dict[str, _Audience] = {}
        self._batches = Batches(self._run, most_tokens=config.batch_tokens, compute=compute)
        self._dialler = Dialler(transport, Limits(MAX_GUESSES + 1, config.vocab_size))

    @property
    def sessions(self) -> int:
        """Sessions open now, each with its cache."""
        return len(self._sessions)

    @property
    def listeners(self) -> int:
        """Streams on which somebody listens now; always 0 but on the last stage."""
        return sum(len(audience.links) for audience in self._audiences.values())

    async def handle(self, stream: Stream) -> None:
        """One stream of the protocol, from its first frame to its end. Peers' failures end it, they do not escape."""
        link = Link(stream, self._limits())
        try:
            frame = await link.receive(self._config.open_timeout_s)
            if frame is None:
                return
            session = _session_name(frame)
            if frame.op == "listen":
                await self._listen(link, session, frame)
            elif frame.op == "open":
                await self._decode(link, session, frame)
            else:
                raise Misbehaviour(f"a decode stream starts with open or listen, not {str(frame.op)[:40]!r}")
        except TesseraError as error:
            log.info("decode_stream_failed", stage=self._stage, peer_id=link.peer, error=error.code)
            await link.close(error)
        finally:
            await link.close()

    # --- listening, on the last stage -------------------------------------------------------------------------------

    async def _listen(self, link: Link, session: str, frame: Frame) -> None:
        """Lends a stream to its session, until that ends or whoever listens hangs up."""
        ring = self._check_listen(link.peer, frame)
        audience = self._audiences.setdefault(session, _Audience())
        if ring in audience.links:
            raise Conflict("somebody listens to this session already")
        audience.links[ring] = link
        late = False
        try:
            await link.send({"op": "ready"}, timeout_s=self._config.send_timeout_s)
            async with anyio.create_task_group() as group:
                group.start_soon(_when_hung_up, link, group.cancel_scope)
                with anyio.move_on_after(self._config.open_timeout_s):
                    await audience.opened.wait()
                if audience.opened.is_set():
                    await audience.closed.wait()  # bounded: a session ends by its own deadlines
                late = not audience.opened.is_set()
                group.cancel_scope.cancel()
            if late:
                raise Late(f"no session was opened within {self._config.open_timeout_s:g} s of listening")
        finally:
            del audience.links[ring]
            if not ring:
                audience.deserted.set()
            if not audience.links and self._audiences.get(session) is audience:
                del self._audiences[session]

    def _check_listen(self, peer: PeerId, frame: Frame) -> bool:
        """Whether it is stage 0 that listens."""
        ring = frame.header.get("ring")
        if frame.header.keys() != {"op", "session", "ring"} or type(ring) is not bool or frame.ids or frame.payload:
            raise Misbehaviour("listen holds session and ring", evidence=str(sorted(frame.header))[:200])
        if not self._last:
            raise Invalid(f"stage {self._stage} is not the last: there is nothing to listen to")
        if not ring:
            self._check_gateway(peer)
        elif peer not in {record.id for record in self._roster.holders(0)}:
            raise Refused("only workers of stage 0 listen for what they feed next", rule="stage_0")
        if self.listeners >= 2 * self._config.max_sessions:
            raise Unavailable(f"{self.listeners} streams listen already")
        return ring

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def _decode(self, link: Link, session: str, opened: Frame) -> None:
        sampling = self._check_open(link.peer, session, opened)
        self._sessions[session] = sampling
        budget: Budget | None = None
        try:
            budget = await self._gate.admit(link.peer, opened.header.get("voucher"))
            source = link.peer if self._stage else ""  # stage 0 computes from ids alone: nobody can spoil those
            kept = await self._batches.resting(partial(self._decoder.open, session, opened.ids, source=source))
            run = self._run_last if self._last else self._run_before
            await run(link, session, opened, kept, budget)
        finally:
            if budget is not None:
                budget.close()
            with anyio.CancelScope(shield=True):  # waits for a step that still runs
                await self._batches.resting(partial(self._decoder.drop, session))
            del self._sessions[session]

    async def _run_before(self, link: Link, session: str, opened: Frame, kept: int, budget: Budget) -> None:
        """A stage that has another after it: compute, pass on."""
        ring = await self._open_ring(session, opened) if self._stage == 0 else None
        try:
            after, needed = await self._open_next(opened)
        except BaseException:
            if ring is not None:
                await ring.abort()
            raise
        try:
            await self._ready(link, kept)
            onward = TowardsNext(after, needed, partial(self._messages, session), self._config)
            await onward.replay(opened.ids, kept)
            await self._session(session, link, onward, ring, budget).run()
        except TesseraError as error:
            if self._is_at_fault(error):
                self._dialler.blame(after.peer)
            await after.close(error)
            raise
        finally:
            await after.close()
            if ring is not None:
                await ring.close()

    async def _run_last(self, link: Link, session: str, opened: Frame, kept: int, budget: Budget) -> None:
        """The last stage: compute, choose, tell whoever listens."""
        audience = self._audiences.get(session)
        if audience is None or False not in audience.links or audience.opened.is_set():
            raise Missing("nobody listens to this session: listen first, then open")
        audience.opened.set()
        try:
            await self._ready(link, kept)
            await self._session(session, link, _Telling(audience, self._config), None, budget).run()
        except TesseraError as error:
            for listening in list(audience.links.values()):
                await listening.close(error)
            raise
        finally:
            audience.closed.set()

    def _session(
        self, name: str, link: Link, sink: TowardsNext | _Telling, ring: Link | None, budget: Budget
    ) -> StageSession:
        hidden, loop = self._sessions[name] is None, self._stage == 0 and self._last
        return StageSession(
            name, link, sink, self._batches, self._config, budget,
            stage=self._stage, hidden=hidden, ring=ring, loop=loop,
        )  # fmt: skip

    async def _ready(self, link: Link, kept: int) -> None:
        await link.send({"op": "ready", "kept": kept}, timeout_s=self._config.send_timeout_s)

    async def _open_next(self, opened: Frame) -> tuple[Link, int]:
        """The session at the next stage, and how much that has of it.

        It is at the worker whom the gateway listens to, or at the first who answers.

        Raises: what the last one of them said.
        """
        config, stage, last = self._config, self._stage + 1, opened.header["last"]

        async def greet(link: Link) -> int:
            await link.send(opened.header | {"stage": stage}, opened.ids, timeout_s=config.send_timeout_s)
            return check_kept(await link.await_ready(config.open_timeout_s), len(opened.ids))

        holders = [r for r in self._roster.holders(stage) if stage < self._roster.stages - 1 or r.id == last]
        if not holders:
            raise Unavailable(f"nobody whom the gateway listens to holds stage {stage}")
        return await self._dialler.reach(holders, greet, timeout_s=config.open_timeout_s)

    async def _open_ring(self, session: str, opened: Frame) -> Link | None:
        """Stage 0 listens where the gateway does."""
        if self._last:
            return None
        config, last = self._config, opened.header["last"]

        async def greet(link: Link) -> None:
            # Its ready is not waited for: the session hears it, or why not, before any token.
            await link.send({"op": "listen", "session": session, "ring": True}, timeout_s=config.send_timeout_s)

        holders = [record for record in self._roster.holders(self._roster.stages - 1) if record.id == last]
        link, _ = await self._dialler.reach(holders, greet, timeout_s=config.open_timeout_s)
        return link

    async def _messages(self, session: str, start: int, end: int) -> bytes:
        return await self._batches.resting(partial(self._decoder.messages, session, start, end))

    def _is_at_fault(self, error: TesseraError) -> bool:
        """Whether the next stage's worker is to be asked last from now on: its stream broke, or it said it cannot."""
        if "peer_code" not in error.fields:
            return isinstance(error, (Unavailable, Late)) and "stage" not in error.fields
        return error.fields.get("stage") == self._stage + 1 and error.fields["peer_code"] != Conflict.code

    def _run(self, steps: list[Step]) -> list[Any]:
        """One forward; on the last stage also what follows from it: tokens, or hidden states."""
        answers = list(self._decoder.run(steps))
        if self._last:
            for place, (step, answer) in enumerate(zip(steps, answers, strict=True)):
                if not isinstance(answer, TesseraError):
                    answers[place] = self._follow(step, answer)
        return answers

    def _follow(self, step: Step, told: Any) -> list[Token] | list[float] | TesseraError:
        from tessera.serving.decoding.sampling import follow  # torch, which only the last stage needs here

        sampling = self._sessions.get(step.session)
        if sampling is None:
            return [float(value) for value in told[-1]] if step.want else []
        guesses, position = step.ids[step.final :], (step.start or 0) + step.final
        try:
            return follow(told, guesses, sampling, position) if step.want else []
        except TesseraError as error:
            return error

    def _check_open(self, peer: PeerId, session: str, frame: Frame) -> Sampling | None:
        header = frame.header
        keys = {"op", "session", "stage", "last", "sampling"}
        if header.keys() - {"voucher"} != keys or not frame.ids or frame.payload:
            raise Misbehaviour(
                "open holds session, stage, last, sampling, the text, and perhaps a voucher",
                evidence=str(sorted(header))[:200],
            )
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
        return None if header["sampling"] is None else Sampling.from_dict(header["sampling"])

    def _check_gateway(self, peer: PeerId) -> None:
        if self._gateways is not None and peer not in self._gateways:
            raise Refused("this peer is not a gateway of the run", rule="gateways")

    def _limits(self) -> Limits:
        payload = self._decoder.payload_limit(self._config.max_step_tokens) if self._stage else 0
        return Limits(self._config.context, self._config.vocab_size, payload)


class _Telling:
    """The results of the last stage, to whoever listens."""

    def __init__(self, audience: _Audience, config: ShardConfig) -> None:
        self._audience = audience
        self._timeout_s = config.send_timeout_s

    async def put(self, step: Step, answer: Any) -> None:
        if not step.want:
            return
        position = (step.start or 0) + step.final
        if step.hidden:
            op, ids, payload = "hidden", list[int](), pack_hidden(answer)
        else:
            op, ids, payload = "token", [token.id for token in answer], pack_logprobs(answer)
        header = {"op": op, "position": position}
        for ring, link in list(self._audience.links.items()):
            await link.send(header, ids, b"" if ring else payload, timeout_s=self._timeout_s)

    async def watch(self) -> None:
        await self._audience.deserted.wait()
        raise Unavailable("the gateway hung up")


def serve_decode(
    transport: Transport,
    decoder: Decoder,
    stage: int,
    roster: Roster,
    config: ShardConfig,
    *,
    gateways: frozenset[PeerId] | None = None,
    compute: Compute = in_thread,
    gate: Gate | None = None,
) -> ShardServer:
    """Serves `stage` to the peers of `roster`.

    Args:
        gateways: who may open sessions at stage 0 and listen at the last stage; None = anybody.
        compute: where the decoder runs.
        gate: lets sessions in that are paid for; None = all are.

    Returns: the server, whose counters tell how busy it is.
    """
    server = ShardServer(transport, decoder, stage, roster, config, gateways, compute, gate or OpenGate())
    transport.serve(PROTOCOL, server.handle, max_streams=3 * config.max_sessions + 2)
    return server


def check_kept(ready: Frame, text: int) -> int:
    """How much of a text of `text` tokens a stage says it has. Raises: Misbehaviour."""
    kept = ready.header.get("kept")
    if type(kept) is not int or not 0 <= kept < text:
        raise Misbehaviour(f"of {text} tokens a stage cannot have {str(kept)[:20]}", evidence=str(ready.header)[:200])
    return kept


async def _when_hung_up(link: Link, scope: anyio.CancelScope) -> None:
    """Cancels `scope` when the listening peer goes; it has nothing to say, so anything ends it."""
    with suppress(TesseraError):
        await link.receive(math.inf)  # as long as the session, which has its own deadlines
    scope.cancel()


def _session_name(frame: Frame) -> str:
    session = frame.header.get("session")
    if not isinstance(session, str) or len(session) != SESSION_CHARACTERS:
        raise Misbehaviour(f"a session's name has {SESSION_CHARACTERS} characters", evidence=str(session)[:80])
    return session
