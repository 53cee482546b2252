"""A worker's side of the lead's line: orders become work, and whoever is behind catches up.

Who is behind collects the sums of each step while he fetches the state of a step before; then he makes the same
optimiser steps from the same sums, and has the same parameters to the bit. Nobody waits for him.

Invariants: one lead at a time, and a newer one only when the older one's line is gone; an order is executed between two
computations, in the order in which it came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import anyio
import anyio.abc
import structlog

from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, TesseraError, Unavailable
from tessera.core.ids import PeerId
from tessera.training.checkpoints import Checkpoints
from tessera.training.control import Line, Message
from tessera.training.copies import StageCopies
from tessera.training.manifest import CHECKPOINT_EVERY
from tessera.training.protocols import CALL_S, QUIET_S
from tessera.training.work import StageWork, Trainer

__all__ = ["Follower", "SavedTrainer", "StageSums"]

log = structlog.get_logger()

MISSED = 256  # steps whose sums somebody who is behind keeps
SYNC_RETRY_S = 2.0
DISK_RETRY_S = 5.0


class SavedTrainer(Trainer, Protocol):
    """A trainer whose state can be put on disk."""

    def save(self) -> bytes: ...
    def load(self, data: bytes) -> None: ...
    def partition(self, round_: int) -> bytes: ...
    def merge(self, round_: int, own: bytes, others: Sequence[bytes]) -> None: ...


class StageSums(Protocol):
    """What the workers of one stage exchange; `tessera.training.sums.Sums`."""

    async def offer(self, term: int, step: int, attempt: int, part: bytes) -> None: ...
    async def collect(
        self, term: int, step: int, attempt: int, owners: Sequence[PeerId], patience_s: float
    ) -> list[bytes]: ...
    async def offer_round(self, round_: int, part: bytes) -> None: ...
    async def collect_round(self, round_: int, owners: Sequence[PeerId], patience_s: float) -> list[bytes]: ...


class Follower:
    """One worker's part, under whoever leads.

    Args:
        every: steps of a round, after which the workers of the stage average a part of their state; 0 = they sum
            their gradients in each step instead.
        fetch: the state of another worker of our stage: his open step, and what his trainer saved.
        committed: told after each step: its number, and its loss where there is one.
    """

    def __init__(
        self,
        me: PeerId,
        work: StageWork,
        trainer: SavedTrainer,
        checkpoints: Checkpoints,
        sums: StageSums,
        *,
        steps: int,
        every: int,
        fetch: Callable[[PeerId], Awaitable[tuple[int, bytes]]],
        committed: Callable[[int, float | None], Awaitable[None]],
        trained: Callable[[bool], None],
        rests: Callable[[], str],
        trouble: Callable[[str], None],
        copies: StageCopies,
    ) -> None:
        self._me, self.work, self._trainer, self._checkpoints, self._sums = me, work, trainer, checkpoints, sums
        self._every, self._rounds = every, deque[tuple[int, bytes, list[bytes]]]()
        self._steps, self._fetch, self._committed, self._trained, self._rests = steps, fetch, committed, trained, rests
        self._trouble, self._copies = trouble, copies
        self._restoring = False
        self.lead: PeerId | None = None
        self.term, self.past = 0, 0
        self.in_step = False  # the parameters in memory are those of `work.step`
        self.alone = True  # nobody else of our stage is in step, as far as we know
        self._ready = False  # the lead counts on us
        self._line: Line | None = None
        self._parts: tuple[int, list[bytes]] | None = None  # prepared sums: step, and those of all
        self._missed: dict[int, list[bytes]] = {}
        self._missed_commits: set[int] = set()
        self._loaded_at: int | None = None  # a checkpoint that was loaded, until the run has gone on from it
        self._syncing: anyio.CancelScope | None = None
        self._handlers: dict[str, Callable[[Message], Awaitable[None]]] = {
            "open": self._open,
            "load": self._load,
            "take": self._take,
            "window": self._window,
            "reset": self._reset,
            "drop": self._drop,
            "prepare": self._prepare,
            "commit": self._commit,
            "trained": self._on_trained,
        }

    def state(self) -> Message:
        return {
            "op": "state",
            "step": self.work.step if self.in_step else None,
            "past": self.past,
            "term": self.term,
            "checkpoints": self._checkpoints.steps(),
            "rests": self._rests(),
        }

    def say(self, message: Message) -> None:
        """To the lead, if there is one."""
        if self._line is not None:
            self._line.say(message)

    async def follow(self, lead: PeerId, line: Line) -> None:
        """Obey `lead` until his line is gone; raises why it is. Raises `Conflict` at once while another leads."""
        if self._line is not None and self.lead != lead:
            raise Conflict("this worker follows another lead", lead=self.lead)
        if self._line is not None:
            self._line.cut()
        self.lead, self._line, self._ready = lead, line, False
        line.say(self.state())
        try:
            async with anyio.create_task_group() as self._tasks:
                try:
                    await line.run(self._hear)
                finally:
                    self._tasks.cancel_scope.cancel()
        finally:
            if self._line is line:
                self._line = self.lead = None

    def resume(self, step: int) -> None:
        """The trainer holds what a checkpoint of `step` held."""
        self._be_in_step(step, 0)

    def fall_behind(self) -> None:
        """The parameters in memory are good for nothing any more."""
        self.in_step = self._ready = False
        self.say(self.state())

    async def copy(self) -> tuple[int, bytes] | None:
        """Our open step and state, taken between two computations; None while we are behind."""
        if not self.in_step:
            return None
        done, copied = anyio.Event(), list[tuple[int, bytes]]()

        async def job() -> None:
            copied.append((self.work.step, await self.work.compute(self._trainer.save)))
            done.set()

        self.work.do(job)
        with anyio.fail_after(QUIET_S):
            await done.wait()
        return copied[0]

    # --- orders -----------------------------------------------------------------------------------------------------

    def _hear(self, message: Message) -> None:
        op = message["op"]
        if op == "sync":
            self._begin_sync(message)
        elif op == "restore":
            if not self._restoring:
                self._tasks.start_soon(self._restore)
        elif op == "alone":
            self.alone = message.get("alone") is True
        elif op in self._handlers:
            self.work.do(lambda: self._obey(self._handlers[op], message))
        else:
            raise Misbehaviour(f"the lead says {str(op)[:40]!r}", evidence=self.lead)

    async def _obey(self, handler: Callable[[Message], Awaitable[None]], message: Message) -> None:
        """An order that no honest lead gives costs him the line, not us our work."""
        try:
            await handler(message)
        except Misbehaviour as error:
            log.warning("lead_wrong", peer_id=self.lead, op=message["op"], reason=error.message)
            if self._line is not None:
                self._line.cut()

    async def _open(self, message: Message) -> None:
        term, step = _integer(message, "term"), _integer(message, "step")
        if self.in_step and message.get("jump") is True:
            await self._jump(step)
        if not self.in_step or step != self.work.step:
            self.fall_behind()
            return
        self.term, self._parts, self._ready = max(self.term, term), None, True
        await self.work.open(term, step)
        log.info("session_started", term=term, step=step)

    async def _jump(self, step: int) -> None:
        """Go on with the others' step: rounds will bring us together."""
        await self.work.compute(self._trainer.reset_step)
        while self._trainer.step < step:
            self._trainer.skip_step(self._trainer.step)
        self.work.step = max(self.work.step, step)

    async def _load(self, message: Message) -> None:
        """Go back to a checkpoint of ours. One that is damaged is dropped, and the lead hears it."""
        step, past = _integer(message, "step"), _integer(message, "past")
        try:
            await self.work.compute(lambda: self._trainer.load(self._checkpoints.load(step)))
        except (Invalid, Missing) as error:
            log.warning("checkpoint_unusable", step=step, code=error.code, reason=error.message)
            self.in_step = self._ready = False
            self.say({"op": "loaded", "step": None})
            return
        self._be_in_step(step, past)
        self._loaded_at = step
        if step < self._steps:
            self._trained(False)
        self.say({"op": "loaded", "step": step})

    def _be_in_step(self, step: int, past: int) -> None:
        self.in_step, self.past, self._parts = True, past, None
        self.work.step = step

    async def _take(self, message: Message) -> None:
        rows = message.get("rows")
        if not self._current(message) or not isinstance(rows, list):
            return
        self._parts = None
        for row in rows:
            if not isinstance(row, list) or len(row) != 4:
                raise Misbehaviour("a microbatch is given as index, source, target, again", evidence=self.lead)
            self.work.take(_index(row[0]), _peer(row[1]), _peer(row[2]), row[3] is True)

    async def _window(self, message: Message) -> None:
        if self._current(message):
            index = _integer(message, "index")
            self.work.take_window(index, _peer(message.get("source")), _peer(message.get("target")))

    async def _reset(self, message: Message) -> None:
        """We held the others up: they do our part of this step."""
        if self._current(message):
            self._parts, self._ready = None, False
            await self.work.reset()

    async def _drop(self, message: Message) -> None:
        indexes = message.get("indexes")
        if self._current(message) and isinstance(indexes, list):
            await self.work.drop([_index(index) for index in indexes])

    async def _on_trained(self, message: Message) -> None:
        if self.in_step and self.work.step == self._steps:
            self._trained(True)

    def _current(self, message: Message) -> bool:
        """Whether an order is for what is open here. One of an earlier term may have waited for us."""
        return self._in_open_step(message) and message.get("term") == self.work.term

    def _in_open_step(self, message: Message) -> bool:
        return self.in_step and message.get("step") == self.work.step

    # --- the end of a step ------------------------------------------------------------------------------------------

    async def _prepare(self, message: Message) -> None:
        """Offer our sums, and collect the others' beside the loop: somebody may be lost, and work come back."""
        step, attempt, owners = _integer(message, "step"), _integer(message, "attempt"), _owners(message)
        term = _integer(message, "term")
        if self._current(message) and self._me in owners:
            await self._sums.offer(term, step, attempt, await self.work.part())
        self._tasks.start_soon(self._collect, term, step, attempt, owners)

    async def _collect(self, term: int, step: int, attempt: int, owners: list[PeerId]) -> None:
        whole = await self._sums_of(term, step, attempt, owners, QUIET_S / 2)
        if whole is None:
            self.say({"op": "unprepared", "step": step, "attempt": attempt})
        elif self.in_step and step == self.work.step:
            self._parts = step, whole
            self.say({"op": "prepared", "step": step, "attempt": attempt})
        else:
            self._missed[step] = whole
            while len(self._missed) > MISSED:
                del self._missed[min(self._missed)]

    async def _sums_of(
        self, term: int, step: int, attempt: int, owners: list[PeerId], patience_s: float
    ) -> list[bytes] | None:
        """Of all these, in their order; None when somebody's do not come in time."""
        try:
            return await self._sums.collect(term, step, attempt, owners, patience_s)
        except TesseraError as error:
            log.warning("sums_missing", step=step, attempt=attempt, code=error.code, reason=error.message)
            return None

    async def _commit(self, message: Message) -> None:
        step = _integer(message, "step")
        if not self._in_open_step(message):
            self._missed_commits.add(step)
            self._missed_commits = {s for s in self._missed_commits if s > step - MISSED}
            return
        parts = self._parts[1] if self._parts is not None and self._parts[0] == step else self._missed.pop(step, None)
        if parts is None and message.get("owners") is not None:  # we came after the others had exchanged them
            term, attempt = _integer(message, "term"), _integer(message, "attempt")
            parts = await self._sums_of(term, step, attempt, _owners(message), CALL_S)
            if parts is None:
                self.fall_behind()
                return
        try:
            await self._step(step, parts, message.get("loss"))
            if self._every and (step + 1) % self._every == 0:
                await self._begin_round((step + 1) // self._every, _owners(message, "mates"))
        except Conflict as error:  # a microbatch under way, say: the lead thought otherwise
            log.warning("step_not_ended", step=step, reason=error.message)
            self.fall_behind()

    async def _step(self, step: int, parts: list[bytes] | None, loss: object) -> None:
        await self.work.commit(parts, self._end_rounds)
        self._parts = None
        if self._loaded_at is not None:  # the run has gone on from here: whatever was ahead belongs to another past
            await self.work.compute(self._checkpoints.drop_after, self._loaded_at)
            self._copies.went_back(self.past, self._loaded_at)
            self._loaded_at = None
        done = step + 1
        if done % CHECKPOINT_EVERY == 0 or done == self._steps:
            await self._keep(done)
        await self._committed(step, loss if isinstance(loss, float) else None)
        if not self._ready:
            self.say({"op": "in_step", "step": done})

    async def _begin_round(self, round_: int, mates: list[PeerId]) -> None:
        """Show our part of the state, and have the others' brought while training goes on."""
        own = await self.work.compute(self._trainer.partition, round_)
        await self._sums.offer_round(round_, own)
        self._tasks.start_soon(self._collect_round, round_, own, [peer for peer in mates if peer != self._me])

    async def _collect_round(self, round_: int, own: bytes, mates: list[PeerId]) -> None:
        others = await self._sums.collect_round(round_, mates, QUIET_S)
        if others and self.in_step:
            self._rounds.append((round_, own, others))

    async def _end_rounds(self) -> None:
        """Between two steps: move towards the others, by what has arrived of theirs."""
        while self._rounds:
            round_, own, others = self._rounds.popleft()
            await self.work.compute(self._trainer.merge, round_, own, others)

    async def _keep(self, done: int) -> None:
        """Save a checkpoint; while the disk does not take it, everything waits for room."""
        state = await self.work.compute(self._trainer.save)
        while True:
            try:
                await self.work.compute(self._checkpoints.save, done, state)
            except Unavailable as error:
                log.warning("checkpoint_not_saved", step=done, reason=error.message)
                self._trouble(error.message)
                await anyio.sleep(DISK_RETRY_S)
                continue
            self.say({"op": "checkpoint", "step": done})
            self._copies.offer(self.past, done)
            return

    # --- catching up ------------------------------------------------------------------------------------------------

    def _begin_sync(self, message: Message) -> None:
        donors, past = message.get("donors"), _integer(message, "past")
        if not isinstance(donors, list) or not donors:
            raise Misbehaviour("the lead names no donors", evidence=self.lead)
        if self._syncing is not None:
            self._syncing.cancel()
        self.in_step = self._ready = False
        self._missed.clear()
        self._missed_commits.clear()
        self._rounds.clear()
        self._tasks.start_soon(self._sync, [PeerId(str(donor)) for donor in donors], past)

    async def _sync(self, donors: list[PeerId], past: int) -> None:
        with anyio.CancelScope() as self._syncing:
            while True:
                for donor in donors:
                    try:
                        step, data = await self._fetch(donor)
                    except TesseraError as error:
                        log.info("state_not_fetched", donor=donor, code=error.code, reason=error.message)
                        continue
                    self.work.do(lambda step=step, data=data: self._take_state(step, data, past))  # type: ignore[misc]
                    return
                await anyio.sleep(SYNC_RETRY_S)

    async def _restore(self) -> None:
        """Nobody of our stage has its state: bring it back from the owners of other stages."""
        self._restoring = True
        try:
            if not await self._copies.restore() and not self._checkpoints.steps():
                log.warning("stage_begins_anew", reason="no copy of it was ever made")
                await self.work.compute(self._checkpoints.save, 0, self._trainer.save())
            self.say(self.state())
        except TesseraError as error:
            log.warning("stage_not_restored", code=error.code, reason=error.message)
            self._trouble(error.message)
        finally:
            self._restoring = False

    async def _take_state(self, step: int, data: bytes, past: int) -> None:
        try:
            await self.work.compute(self._trainer.load, data)
        except Invalid as error:
            raise Misbehaviour(f"the donor's state cannot be used: {error.message}") from error
        self._be_in_step(step, past)
        self._loaded_at = None
        await self.work.compute(self._checkpoints.drop_after, -1)
        await self.work.compute(self._checkpoints.save, step, data)
        self.say({"op": "checkpoint", "step": step})
        log.info("state_taken", step=step)
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Make the steps that went by meanwhile, from the sums that we have collected."""
        while self.work.step in self._missed_commits:
            step = self.work.step
            parts = self._missed.pop(step, None)
            if parts is None:
                self.fall_behind()
                return
            await self.work.compute(self._trainer.reset_step)
            await self._step(step, parts, None)
        self.say({"op": "in_step", "step": self.work.step})


def _owners(message: Message, name: str = "owners") -> list[PeerId]:
    owners = message.get(name)
    if not isinstance(owners, list) or not all(isinstance(owner, str) for owner in owners):
        raise Misbehaviour(f"the lead names no {name}")
    return [PeerId(owner) for owner in owners]


def _index(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**16:
        raise Misbehaviour(f"a microbatch has no index {str(value)[:40]}")
    return value


def _peer(value: object) -> PeerId | None:
    if value is not None and not isinstance(value, str):
        raise Misbehaviour(f"a neighbour is named by his id, not {str(value)[:40]}")
    return None if value is None else PeerId(value)


def _integer(message: Message, name: str) -> int:
    value = message.get(name)
    if type(value) is not int or value < 0:
        raise Misbehaviour(f"the lead's {name} is {str(value)[:40]}")
    return value
