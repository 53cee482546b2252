"""A worker's training life: he follows a lead, leads himself when it is his turn, and keeps checkpoints.

The first worker of stage 0 who is here leads. When he is gone, the next one notices that nobody does, and takes over.
So a dead worker of any stage costs no step while another one of his stage is here; else training waits for him, and
goes on from the newest checkpoint that every stage has.

Invariants: one loop touches the trainer; a worker follows one lead at a time; only workers of stage 0 lead, and only
with so many others that nobody else can.

Each worker has a gate: while it is shut (its owner wants the machine, the run is paused, the disk is full) he gets no
more work; a stage whose workers all rest makes the run wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio
import structlog
from anyio import to_thread

from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Late, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.transport import PeerRecord, Stream, Transport
from tessera.training.book import ReceiptBook
from tessera.training.boundary import Boundary
from tessera.training.checkpoints import Checkpoints
from tessera.training.control import Line, Message, StreamLine, local_pair
from tessera.training.copies import StageCopies
from tessera.training.crew import Crew
from tessera.training.follower import Follower, SavedTrainer, StageSums
from tessera.training.lead import Lead
from tessera.training.manifest import Manifest
from tessera.training.protocols import CALL_S, CONTROL, SMALL, WORK_S
from tessera.training.roster import Roster, Seat
from tessera.training.state_transfer import StateDonor, fetch_state
from tessera.training.work import Batches, Compute, Records, StageWork

__all__ = ["Pipeline"]

log = structlog.get_logger()

RETRY_S = 1.0
LOOK_S = 0.25  # between two looks at whether anybody leads, and at the gate
LEAD_S = 5.0  # without a lead, times our rank among the workers of stage 0, before we take over


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


class Pipeline:
    """Trains this worker's stage of `manifest`.

    Args:
        roster: the newest roster that is known.
        refresh: fetch it again, because a peer may have come, or come back at another address.
        records: of each step, for auditors.
        copies: of this stage, with others.
        compute: how a call of the trainer is made, beside the event loop.
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
        sums: StageSums,
        roster: Callable[[], Roster],
        refresh: Callable[[], Awaitable[None]],
        watcher: Watcher,
        gate: Gate,
        clock: Clock,
        records: Records,
        copies: StageCopies,
        compute: Compute = to_thread.run_sync,
    ) -> None:
        self._manifest, self._stage, self._me, self._transport = manifest, stage, key.id, transport
        self._trainer, self._checkpoints, self._batches = trainer, checkpoints, batches
        self._roster, self._refresh, self._watcher, self._gate, self._clock = roster, refresh, watcher, gate, clock
        self._work = StageWork(
            manifest,
            stage=stage,
            key=key,
            trainer=trainer,
            batches=batches,
            book=book,
            roster=roster,
            say=lambda message: self._follower.say(message),
            boundary=self._boundary,
            records=records,
            compute=compute,
        )
        self._follower = Follower(
            key.id,
            self._work,
            trainer,
            checkpoints,
            sums,
            steps=manifest.schedule.steps,
            every=manifest.averaging.every,
            fetch=self._fetch_state,
            committed=self._committed,
            trained=self._set_trained,
            rests=lambda: self._rests,
            trouble=self.leading,
            copies=copies,
        )
        self._donor = StateDonor(transport, admitted=self._of_my_stage, copy=self._follower.copy)
        self._stepped = 0.0
        self._told_rests = gate.reason
        self._leading: Lead | None = None
        self._leaves = False
        self.trouble = "starting"  # why nothing is trained; empty while something is
        self.last_step: tuple[float, float] | None = None  # seconds since 1970, and how many it took
        self._most_done = max(checkpoints.steps(), default=0)
        self.trained = anyio.Event()
        if not checkpoints.steps() and roster().changes == 0:  # else the run has begun without us: step 0 is no news
            checkpoints.save(0, trainer.save())

    @property
    def wire(self) -> tuple[int, int]:
        """Bytes and tokens that crossed the boundary below, both directions together."""
        boundary = self._work.boundary
        return boundary.bytes_below, boundary.frames_below * self._manifest.tokens_per_microbatch

    @property
    def steps_done(self) -> int:
        """The most that this stage has done, as far as we have seen or been given it."""
        return max(self._most_done, self._work.step if self._follower.in_step else 0)

    @property
    def sessions(self) -> int:
        """Terms that this worker took part in."""
        return self._work.terms

    @property
    def _rests(self) -> str:
        """Why we get no work; empty when we do."""
        fetching = "its data is on the way" if self._work.fetching else ""
        return self._gate.reason or ("leaves" if self._leaves else fetching)

    @property
    def past(self) -> int:
        """The term in which the parameters were last loaded from a checkpoint."""
        return self._follower.past

    async def may_leave(self) -> bool:
        """Whether another worker of our stage is in step, so that nothing is lost without us."""
        return not self._follower.alone

    async def freeze(self) -> None:
        """Take no more work, and finish what we have."""
        self._leaves = True
        with anyio.move_on_after(WORK_S):
            while self._work.busy or self._told_rests != self._rests:
                await anyio.sleep(LOOK_S)

    def thaw(self) -> None:
        self._leaves = False

    async def run(self) -> None:
        """Work, serve the others and lead when it is our turn; until cancelled."""
        if self._manifest.schedule.steps in self._checkpoints.steps():
            await self._resume_finished()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._compute)
            tasks.start_soon(self._watch_gate)
            self._donor.serve()
            self._transport.serve(CONTROL, self._accept)
            if self._stage == 0:
                await self._stand_by_to_lead()
            await anyio.sleep_forever()

    # --- working ----------------------------------------------------------------------------------------------------

    async def _compute(self) -> None:
        """Keep the loop going. What it cannot survive (training diverged, the disk is full) is tried again later."""
        while True:
            try:
                await self._work.run()
            except BaseExceptionGroup as group:
                error = _named(group)
                if not isinstance(error, TesseraError):
                    raise
                log.warning("work_broke_off", stage=self._stage, code=error.code, reason=error.message)
                self.trouble = error.message
            self._work.clear()
            self._follower.fall_behind()
            await anyio.sleep(RETRY_S)
            await self._gate.wait_open()

    async def _committed(self, step: int, loss: float | None) -> None:
        now = self._clock.time()
        if self._stepped == 0.0:
            log.info("working", stage=self._stage, step=step + 1)
        self.last_step, self._stepped = (now, max(0.0, now - (self._stepped or now))), now
        self._most_done = max(self._most_done, step + 1)
        self.trouble = ""
        self._watcher.step_done(step + 1, loss if self._leading is not None else None)

    def _set_trained(self, trained: bool) -> None:
        if trained:
            self.trained.set()
        elif self.trained.is_set():
            self.trained = anyio.Event()

    async def _resume_finished(self) -> None:
        """A stage that was trained and then restarted can serve at once, whether or not the others are here."""
        steps = self._manifest.schedule.steps
        try:
            await to_thread.run_sync(lambda: self._trainer.load(self._checkpoints.load(steps)))
        except TesseraError as error:
            log.warning("checkpoint_unusable", stage=self._stage, code=error.code, reason=error.message)
            return
        self._follower.resume(steps)
        self.trained.set()

    async def _watch_gate(self) -> None:
        while True:
            await anyio.sleep(LOOK_S)
            if self._rests != self._told_rests:
                self._told_rests = reason = self._rests
                log.info("paused", stage=self._stage, reason=reason) if reason else log.info(
                    "goes_on", stage=self._stage
                )
                self._follower.say({"op": "gate", "reason": reason})

    # --- neighbours and peers of our stage --------------------------------------------------------------------------

    def _boundary(self, **more: Any) -> Boundary:
        return Boundary(
            self._transport,
            self._manifest.run_id,
            record=lambda peer: self._record(peer, self._stage + 1),
            above=lambda peer: self._record(peer, self._stage - 1) is not None,
            **more,
        )

    def _record(self, peer: PeerId, stage: int) -> PeerRecord | None:
        if not 0 <= stage < self._manifest.model.stages:
            return None
        return next((seat.record for seat in self._roster().of_stage(stage) if seat.peer == peer), None)

    def _of_my_stage(self, peer: PeerId) -> bool:
        return self._record(peer, self._stage) is not None

    async def _fetch_state(self, donor: PeerId) -> tuple[int, bytes]:
        record = self._record(donor, self._stage)
        if record is None:
            await self._refresh()
            raise Unavailable(f"{donor[:16]}… has no seat in our stage")
        return await fetch_state(self._transport, record)

    # --- following --------------------------------------------------------------------------------------------------

    async def _accept(self, stream: Stream) -> None:
        """A worker of stage 0 wants to lead."""
        if self._record(stream.peer, 0) is None:
            await self._refresh()
        if self._record(stream.peer, 0) is None:
            raise Refused("only workers of stage 0 lead", rule="lead")
        with anyio.move_on_after(CALL_S) as scope:
            hello = encoding.decode(await stream.recv(SMALL), SMALL)
        if scope.cancelled_caught:
            raise Late(f"the lead did not say hello within {CALL_S:.0f} s")
        if not isinstance(hello, dict) or hello.get("run_id") != self._manifest.run_id:
            raise Conflict("this worker is in another run")
        if self._follower.lead not in (None, stream.peer):
            refused = {"op": "refused", "lead": self._follower.lead}
            await stream.send(encoding.encode(refused), last=True)
            return
        log.info("follows", stage=self._stage, lead=stream.peer)
        await self._follow(stream.peer, StreamLine(stream))

    async def _follow(self, lead: PeerId, line: Line) -> None:
        try:
            await self._follower.follow(lead, line)
        except BaseExceptionGroup as group:
            error = _named(group)
            if not isinstance(error, TesseraError):
                raise
            log.info("lead_gone", stage=self._stage, lead=lead, code=error.code, reason=error.message)
            self.trouble = f"nobody leads: {error.message}"

    # --- leading ----------------------------------------------------------------------------------------------------

    async def _stand_by_to_lead(self) -> None:
        alone_since = anyio.current_time()
        while True:
            await anyio.sleep(LOOK_S)
            if self._follower.lead is not None:
                alone_since = anyio.current_time()
                continue
            peers = [seat.peer for seat in self._roster().of_stage(0)]
            if self._me in peers and anyio.current_time() - alone_since >= LEAD_S * peers.index(self._me):
                await self._try_to_lead()
                alone_since = anyio.current_time()

    async def _try_to_lead(self) -> None:
        async with anyio.create_task_group() as tasks:
            crew = Crew(self._roster, self._dial)
            self._lead_tasks = tasks
            self._leading = lead = Lead(
                self._manifest,
                crew,
                majority=self._majority,
                events=self,
                now=anyio.current_time,
                next_term=lambda: max([self._follower.term, *(m.term for m in crew.members.values())]) + 1,
                refresh=self._refresh,
                validation_count=self._batches.validation_count,
                exact=self._manifest.averaging.every == 0,
                drop_late=self._manifest.schedule.drop_late,
            )
            tasks.start_soon(crew.run)
            try:
                await lead.run()
            except TesseraError as error:
                log.info("leads_no_more", code=error.code, reason=error.message)
                self.trouble = error.message
            self._leading = None
            tasks.cancel_scope.cancel()
        await anyio.sleep(RETRY_S)

    async def _dial(self, seat: Seat) -> tuple[Line, Message]:
        if seat.peer == self._me:
            ours, his = local_pair()
            self._lead_tasks.start_soon(self._follow, self._me, his)
            return ours, await ours.first()
        stream = await self._transport.open(seat.record, CONTROL, timeout_s=CALL_S)
        try:
            with anyio.fail_after(CALL_S):
                await stream.send(encoding.encode({"run_id": self._manifest.run_id}))
                state = encoding.decode(await stream.recv(SMALL), SMALL)
        except TimeoutError:
            await stream.abort()
            raise Late(f"{seat.peer[:16]}… did not answer our hello within {CALL_S:.0f} s") from None
        if not isinstance(state, dict):
            raise Misbehaviour("a worker answers a hello with his state", evidence=seat.peer)
        if state.get("op") == "refused":
            raise Conflict("the worker follows another lead", lead=state.get("lead"))
        return StreamLine(stream), state

    def _majority(self, here: set[PeerId]) -> bool:
        """Whether nobody else can have as many: more than half of the seats, or half with the first of them."""
        seats = [seat.peer for seat in self._roster().seats]
        return 2 * len(here) > len(seats) or (2 * len(here) == len(seats) and seats[0] in here)

    def leading(self, trouble: str) -> None:
        if trouble:
            self.trouble = trouble

    def validated(self, steps: int, loss: float) -> None:
        self._watcher.validated(steps, loss)


def _named(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure to report of several that happened together: one that we can name, if there is one."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_named(error) if isinstance(error, BaseExceptionGroup) else error)
    named = [error for error in leaves if isinstance(error, TesseraError)]
    wrong = [error for error in named if not isinstance(error, Unavailable)]
    return (wrong or named or leaves)[0]
