"""A worker's training life: sessions come and go, checkpoints stay.

Stage 0 drives: it asks everybody which checkpoints they hold, picks the newest that all have, tells each stage to load
it, last stage first, and starts. Whatever breaks, the links close one after another, and stage 0 tries again. So a dead
worker makes training pause, and a restarted one makes it go on from the last common checkpoint.

Invariants: one attempt at a time touches the trainer, and a newer one takes over only when the older has let go;
an older number never replaces a newer one; later checkpoints are forgotten only once the run has really gone on from an
earlier one, that is, when the first step of a session is done.

Each worker has a gate: while it is shut (its owner wants the machine, the run is paused, the disk is full) he holds his
breath between two steps for a while, then lets the session go; it starts again when all gates are open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.abc
import structlog
from anyio import to_thread

from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import Stream, Transport
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.manifest import Manifest
from tessera.training.protocols import CALL_S, CONTROL, PIPELINE, SMALL, WORK_S
from tessera.training.roster import Roster, Seat
from tessera.training.session import Batches, Session, Trainer

__all__ = ["Pipeline", "SavedTrainer"]

log = structlog.get_logger()

CHECKPOINT_EVERY = 10  # steps
RETRY_S = 1.0
RETRY_MISBEHAVIOUR_S = 5.0
HOLD_S = 60.0  # how long a shut gate holds a session up before it ends; a neighbour waits twice as long
ABORT_S = 2.0  # how long a broken session may take to drop its links
MAX_NUMBER = 2**53  # of a session; milliseconds since 1970, unless a clock went backwards


class SavedTrainer(Trainer, Protocol):
    """A trainer whose state can be put on disk."""

    def save(self) -> bytes: ...
    def load(self, data: bytes) -> None: ...
    def reset_step(self) -> None: ...


class Watcher(Protocol):
    """Told of progress, for people to see."""

    def step_done(self, step: int, loss: float | None) -> None: ...
    def validated(self, steps: int, loss: float) -> None: ...


class Gate(Protocol):
    """Whether this worker may work now; `tessera.training.gate.Gate`."""

    @property
    def reason(self) -> str:
        """Why not; empty while it is open."""
        ...

    async def wait_open(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Attempt:
    """One try at a session: where its upstream link will arrive, how to stop it, and what became of it."""

    number: int
    step: int
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    up: Stream | None = None
    down: Stream | None = None
    arrived: anyio.Event = field(default_factory=anyio.Event)  # the link from above is here
    ready: anyio.Event = field(default_factory=anyio.Event)  # checkpoint loaded and link below open, or failed
    over: anyio.Event = field(default_factory=anyio.Event)  # nothing of it touches the trainer any more
    failure: TesseraError | None = None
    started: bool = False  # its first step is done
    stepped: float = 0.0  # when its last step was done, seconds since 1970


class Pipeline:
    """Trains this worker's stage of `manifest`, as driver (stage 0) or follower.

    Args:
        roster: the newest roster that is known.
        refresh: fetch it again, because a peer may have come back at another address.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        stage: int,
        key: PeerKey,
        transport: Transport,
        trainer: SavedTrainer,
        batches: Batches,
        book: ReceiptBook,
        checkpoints: Checkpoints,
        roster: Callable[[], Roster],
        refresh: Callable[[], Awaitable[None]],
        watcher: Watcher,
        gate: Gate,
        clock: Clock,
    ) -> None:
        self._gate, self._frozen = gate, False
        self._manifest, self._stage, self._key, self._transport = manifest, stage, key, transport
        self._trainer, self._batches, self._book, self._checkpoints = trainer, batches, book, checkpoints
        self._roster, self._refresh, self._watcher, self._clock = roster, refresh, watcher, clock
        self._attempt: _Attempt | None = None
        self._last_number = -1
        self._earlier_wire = (0, 0)
        self._session_wire = (0, 0)
        self.sessions = 0
        self.trouble = "starting"  # why no session runs; empty while one does
        self.last_step: tuple[float, float] | None = None  # seconds since 1970, and how many it took
        self.steps_done = max(checkpoints.steps(), default=0)
        self.trained = anyio.Event()
        if 0 not in checkpoints.steps():
            checkpoints.save(0, trainer.save())

    @property
    def wire(self) -> tuple[int, int]:
        """Bytes and tokens that crossed the boundary below, both directions together, over all sessions."""
        return self._earlier_wire[0] + self._session_wire[0], self._earlier_wire[1] + self._session_wire[1]

    async def run(self) -> None:
        """Serve the others and, at stage 0, drive; until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            if self._stage > 0:
                await self.catch_up()  # before anybody can start a session on the same trainer
            self._transport.serve(PIPELINE, self._accept)
            serve_calls(self._transport, CONTROL, self._control, request_limit=SMALL)
            if self._stage == 0:
                await self._drive()
            await anyio.sleep_forever()

    async def freeze(self) -> None:
        """Stop, and start nothing until `thaw`: the checkpoints stay as they are."""
        self._frozen = True
        if self._attempt is not None:
            self._attempt.scope.cancel()
            await self._attempt.over.wait()

    def thaw(self) -> None:
        self._frozen = False

    async def catch_up(self) -> None:
        """Checkpoints came from another worker of our stage: we are as far as they are."""
        steps = self._checkpoints.steps()
        self.steps_done = max(self.steps_done, *steps)
        if self._manifest.schedule.steps in steps and not self.trained.is_set():
            await self._resume_finished()

    async def may_leave(self) -> bool:
        """Whether another worker of our stage holds our newest checkpoint."""
        newest = max(self._checkpoints.steps())
        for seat in self._roster().of_stage(self._stage):
            if seat.peer != self._transport.id:
                reply = await self._ask(seat, {"op": "status"}, CALL_S)
                steps = reply.get("steps")
                if isinstance(steps, list) and newest in steps:
                    return True
        return False

    # --- driving ----------------------------------------------------------------------------------------------------

    async def _drive(self) -> None:
        while not self.trained.is_set():
            pause_s = RETRY_S
            try:
                if self._first(0).peer != self._transport.id:
                    raise Unavailable("another worker of stage 0 drives")
                self._check_free()
                step, number = await self._next_session()
                for stage in reversed(range(1, self._manifest.model.stages)):
                    await self._ask(self._first(stage), {"op": "start", "session": number, "step": step}, WORK_S)
                attempt = await self._start(number, step)
                await attempt.over.wait()
                if attempt.failure is not None:
                    raise attempt.failure
            except TesseraError as error:
                log.info("pipeline_not_ready", code=error.code, reason=error.message)
                self.trouble = error.message
                pause_s = RETRY_MISBEHAVIOUR_S if isinstance(error, Misbehaviour) else RETRY_S
            if not self.trained.is_set():
                await anyio.sleep(pause_s)
                await self._gate.wait_open()
                await self._refresh()

    async def _next_session(self) -> tuple[int, int]:
        """The newest step of which every worker holds a checkpoint, and a number that none of them has seen."""
        common, last = set(self._checkpoints.steps()), self._last_number
        for stage in range(1, self._manifest.model.stages):
            reply = await self._ask(self._first(stage), {"op": "status"}, CALL_S)
            steps, seen = reply.get("steps"), reply.get("session")
            if not isinstance(steps, list) or not all(type(step) is int for step in steps):
                raise Misbehaviour(f"stage {stage} answers its status with {str(steps)[:80]}")
            if type(seen) is not int or not -1 <= seen < MAX_NUMBER:
                raise Misbehaviour(f"stage {stage} says that its last session was {str(seen)[:80]}")
            common, last = common & set(steps), max(last, seen)
        if not common:
            raise Conflict("the workers hold no common checkpoint")
        return max(common), max(last + 1, int(self._clock.time() * 1000))

    def _first(self, stage: int) -> Seat:
        """Who trains `stage`: whoever was admitted first; the others of it stand by."""
        return self._roster().of_stage(stage)[0]

    async def _ask(self, seat: Seat, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        reply, _ = await call(self._transport, seat.record, CONTROL, request, timeout_s=timeout_s, reply_limit=SMALL)
        return reply

    # --- following --------------------------------------------------------------------------------------------------

    async def _control(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        drives, stage = peer == self._first(0).peer, self._roster().stage_of(peer)
        if not drives and not (stage == self._stage and request.get("op") == "status"):
            raise Refused("only stage 0 drives the pipeline", rule="driver")
        if request.get("op") == "status":
            return {"steps": self._checkpoints.steps(), "session": self._last_number}, b""
        if request.get("op") == "start":
            number, step = request.get("session"), request.get("step")
            if type(number) is not int or type(step) is not int or not 0 <= number < MAX_NUMBER:
                raise Invalid("a session starts with two integers: session and step")
            await self._refresh()
            await self._start(number, step)
            return {}, b""
        raise Invalid(f"unknown operation {str(request.get('op'))[:40]!r}")

    async def _accept(self, stream: Stream) -> None:
        """The link from the stage above arrives; hold it until the session is over."""
        if self._stage == 0 or stream.peer != self._first(self._stage - 1).peer:
            raise Refused("only the stage above may open this link", rule="neighbour")
        with anyio.move_on_after(CALL_S) as scope:
            hello = encoding.decode(await stream.recv(SMALL), SMALL)
        if scope.cancelled_caught:
            raise Late(f"the stage above did not name its session within {CALL_S:.0f} s")
        attempt = self._attempt
        expected = None if attempt is None else {"run_id": self._manifest.run_id, "session": attempt.number}
        if attempt is None or hello != expected or attempt.arrived.is_set() or attempt.over.is_set():
            raise Conflict("no session waits for this link")
        attempt.up = stream
        attempt.arrived.set()
        await attempt.over.wait()

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def _start(self, number: int, step: int) -> _Attempt:
        """Begin an attempt in the background; return when its checkpoint is loaded and its link below open.

        The attempt before it is stopped, whatever it was doing. Raises what kept this one from becoming ready.
        """
        self._check_free()
        if number <= self._last_number:
            raise Conflict(f"session {number} is not newer than {self._last_number}")
        before, attempt = self._attempt, _Attempt(number, step)
        self._last_number, self._attempt = number, attempt
        self._tasks.start_soon(self._run_attempt, attempt, before)
        await attempt.ready.wait()
        if attempt.failure is not None:
            raise attempt.failure
        return attempt

    def _check_free(self) -> None:
        if self._frozen:
            raise Unavailable(f"stage {self._stage} stands still for a worker who leaves", retry_after_s=RETRY_S)
        if self._gate.reason:
            raise Unavailable(f"stage {self._stage} pauses: {self._gate.reason}", retry_after_s=RETRY_S)

    async def _run_attempt(self, attempt: _Attempt, before: _Attempt | None) -> None:
        try:
            if before is not None:
                before.scope.cancel()
                with anyio.CancelScope(shield=True):  # it still holds the trainer; it ends with its present call
                    await before.over.wait()
            with attempt.scope:
                await self._open(attempt)
                attempt.ready.set()
                await self._train(attempt)
            if attempt.scope.cancelled_caught:
                attempt.failure = Conflict(f"session {attempt.number} gave way to a newer one")
        except TesseraError as error:
            attempt.failure = error
            log.warning("session_broken", stage=self._stage, code=error.code, reason=error.message)
            self.trouble = error.message
        finally:
            with anyio.move_on_after(ABORT_S, shield=True):
                for stream in (attempt.up, attempt.down):
                    if stream is not None:
                        await stream.abort()  # nothing to abort when both sides said their last
            earlier, present = self._earlier_wire, self._session_wire
            self._earlier_wire, self._session_wire = (earlier[0] + present[0], earlier[1] + present[1]), (0, 0)
            attempt.over.set()
            attempt.ready.set()

    async def _open(self, attempt: _Attempt) -> None:
        """Load the step and dial the stage below."""
        steps = self._manifest.schedule.steps
        if attempt.step < steps:
            self.trained = anyio.Event()
        if not self.trained.is_set():  # else it is loaded, and may be serving
            await to_thread.run_sync(self._load, attempt.step)
            if attempt.step < steps:  # fetching may take a while, and in a session a neighbour waits for us
                await self._batches.ready(attempt.step)
        if self._stage + 1 < self._manifest.model.stages:
            below = self._first(self._stage + 1).record
            attempt.down = await self._transport.open(below, PIPELINE, timeout_s=CALL_S)
            hello = {"run_id": self._manifest.run_id, "session": attempt.number}
            with anyio.move_on_after(CALL_S):
                await attempt.down.send(encoding.encode(hello))
                return
            raise Late(f"stage {self._stage + 1} did not take our hello within {CALL_S:.0f} s")

    def _load(self, step: int) -> None:
        self._trainer.reset_step()
        self._trainer.load(self._checkpoints.load(step))

    async def _resume_finished(self) -> None:
        """A stage that was trained and then restarted can serve at once, whether or not stage 0 is here."""
        try:
            await to_thread.run_sync(self._load, self._manifest.schedule.steps)
        except TesseraError as error:
            log.warning("checkpoint_unusable", stage=self._stage, code=error.code, reason=error.message)
            return
        self.trained.set()

    async def _train(self, attempt: _Attempt) -> None:
        if self._stage > 0:
            with anyio.move_on_after(WORK_S) as scope:
                await attempt.arrived.wait()
            if scope.cancelled_caught:
                raise Late("the stage above never opened its link")
        log.info("session_started", stage=self._stage, step=attempt.step)
        self.sessions += 1
        self.trouble, attempt.stepped = "", self._clock.time()
        session = Session(
            manifest=self._manifest,
            stage=self._stage,
            key=self._key,
            trainer=self._trainer,
            batches=self._batches,
            book=self._book,
            events=_Events(self, attempt),
            up=(attempt.up.peer, attempt.up) if attempt.up is not None else None,
            down=(attempt.down.peer, attempt.down) if attempt.down is not None else None,
            first_step=attempt.step,
        )
        try:
            await session.run()
        except BaseExceptionGroup as group:
            raise _named(group) from group
        self.trained.set()

    # --- what a session tells ---------------------------------------------------------------------------------------

    async def _step_done(self, attempt: _Attempt, step: int, loss: float | None, wire: dict[str, int]) -> None:
        done = step + 1
        if not attempt.started:  # the run has gone on from here: whatever was ahead belongs to another past
            await to_thread.run_sync(self._checkpoints.drop_after, attempt.step)
            attempt.started = True
            log.info("working", stage=self._stage, step=done)
        self.steps_done = max(self.steps_done, done)
        now = self._clock.time()
        self.last_step, attempt.stepped = (now, max(0.0, now - attempt.stepped)), now
        self._session_wire = (wire.get("bytes", 0), wire.get("tokens", 0))
        if done % CHECKPOINT_EVERY == 0 or done == self._manifest.schedule.steps:
            await to_thread.run_sync(lambda: self._checkpoints.save(done, self._trainer.save()))
        self._watcher.step_done(done, loss)
        if self._gate.reason:
            await self._hold()

    async def _hold(self) -> None:
        log.info("paused", stage=self._stage, reason=self._gate.reason)
        with anyio.move_on_after(HOLD_S):
            await self._gate.wait_open()
        self._check_free()
        log.info("goes_on", stage=self._stage)


@dataclass(frozen=True, slots=True)
class _Events:
    """What one attempt's session tells the pipeline."""

    pipeline: Pipeline
    attempt: _Attempt

    async def step_done(self, step: int, loss: float | None, wire: dict[str, int]) -> None:
        await self.pipeline._step_done(self.attempt, step, loss, wire)

    def validated(self, steps: int, loss: float) -> None:
        self.pipeline._watcher.validated(steps, loss)


def _named(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure to report of several that happened together: one that we can name, if there is one."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_named(error) if isinstance(error, BaseExceptionGroup) else error)
    named = [error for error in leaves if isinstance(error, TesseraError)]
    wrong = [error for error in named if not isinstance(error, Unavailable)]
    return (wrong or named or leaves)[0]
