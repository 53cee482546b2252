"""Who is here: the lead's view of every worker with a seat, over one line each.

A worker is away until its line stands, behind until it is in step with its stage, and then ready. One that is ready
gets work unless its owner wants the machine, or it was left out for a while because it held the others up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, TypeGuard

import anyio
import anyio.abc
import structlog

from tessera.core.errors import Conflict, Misbehaviour, TesseraError
from tessera.core.ids import PeerId
from tessera.training.control import Line, Message
from tessera.training.mailbox import Mailbox
from tessera.training.roster import Roster, Seat

__all__ = ["Crew", "Member", "Standing", "read_state"]

log = structlog.get_logger()

Standing = Literal["away", "behind", "ready"]

REDIAL_S = 1.0
LOOK_S = 1.0  # between two looks at the roster
INBOX = 8192


@dataclass(slots=True, eq=False)
class Member:
    """One worker."""

    peer: PeerId
    stage: int
    line: Line | None = None
    standing: Standing = "away"
    step: int | None = None  # the step that is open in its memory; None when nothing is loaded
    term: int = 0  # the newest that it has seen
    past: int = 0  # the term in which those parameters were last loaded: equal steps of other pasts differ
    checkpoints: list[int] = field(default_factory=list)
    rests: str = ""  # why it gets no work now
    out_until: float = 0.0  # left out because it held the others up

    def say(self, message: Message) -> None:
        if self.line is not None:
            self.line.say(message)

    def works(self, now: float) -> bool:
        return self.standing == "ready" and not self.rests and now >= self.out_until


class Crew:
    """Dials every seat, again and again, and puts what the workers say into one inbox.

    Args:
        dial: a line to the holder of a seat, and his answer to our hello. Raises `Conflict` when he follows another.
    """

    def __init__(self, roster: Callable[[], Roster], dial: Callable[[Seat], Awaitable[tuple[Line, Message]]]) -> None:
        self._roster, self._dial = roster, dial
        self.members: dict[PeerId, Member] = {}
        self._inbox = Mailbox[tuple[Member, Message]](INBOX)
        self.superseded = ""  # whom a worker follows instead of us

    async def run(self) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                seats = {seat.peer: seat for seat in self._roster().seats}
                for peer in [peer for peer in self.members if peer not in seats]:
                    self._let_go(self.members.pop(peer))
                for peer, seat in seats.items():
                    if peer not in self.members:
                        self.members[peer] = Member(peer, seat.stage)
                        tasks.start_soon(self._keep, self.members[peer])
                await anyio.sleep(LOOK_S)

    async def hear(self, within_s: float) -> tuple[Member, Message] | None:
        """The next thing that a worker says, or that happens to its line (`here`, `gone`); None when nothing comes."""
        with anyio.move_on_after(within_s):
            return await self._inbox.get()
        return None

    def hear_nowait(self) -> tuple[Member, Message] | None:
        return self._inbox.look()

    def of_stage(self, stage: int) -> list[Member]:
        return [m for m in self.members.values() if m.stage == stage]

    def present(self) -> list[Member]:
        return [m for m in self.members.values() if m.standing != "away"]

    def say_all(self, message: Message, standing: tuple[Standing, ...] = ("ready", "behind")) -> None:
        for member in self.members.values():
            if member.standing in standing:
                member.say(message)

    # --- one worker -------------------------------------------------------------------------------------------------

    async def _keep(self, member: Member) -> None:
        while self.members.get(member.peer) is member:
            seat = next((seat for seat in self._roster().seats if seat.peer == member.peer), None)
            if seat is None:
                return
            try:
                line, state = await self._dial(seat)
            except Conflict as error:
                self.superseded = str(error.fields.get("lead", "")) or self.superseded
                await anyio.sleep(REDIAL_S)
                continue
            except TesseraError as error:
                log.debug("worker_away", peer_id=member.peer, code=error.code, reason=error.message)
                await anyio.sleep(REDIAL_S)
                continue
            await self._live(member, line, state)
            await anyio.sleep(REDIAL_S)

    async def _live(self, member: Member, line: Line, state: Message) -> None:
        try:
            read_state(member, state)
            member.line, member.standing = line, "behind"
            self._post(member, {"op": "here"})
            await line.run(lambda message: self._post(member, message))
        except TesseraError as error:
            log.info("worker_gone", peer_id=member.peer, stage=member.stage, code=error.code, reason=error.message)
        finally:
            member.line, member.standing, member.step = None, "away", None
        self._post(member, {"op": "gone"})

    def _post(self, member: Member, message: Message) -> None:
        if not self._inbox.put((member, message)):
            log.warning("worker_says_too_much", peer_id=member.peer, messages=INBOX)
            self._let_go(member)

    def _let_go(self, member: Member) -> None:
        if member.line is not None:
            member.line.cut()


def read_state(member: Member, state: Message) -> None:
    """What a worker holds. Raises `Misbehaviour` for anything else."""
    step, checkpoints, rests = state.get("step"), state.get("checkpoints"), state.get("rests")
    term, past = state.get("term"), state.get("past")
    if not (step is None or _is_step(step)) or not _is_step(past) or not _is_step(term) or not isinstance(rests, str):
        raise Misbehaviour(f"a worker's state is {str(state)[:100]}", evidence=member.peer)
    if not isinstance(checkpoints, list) or len(checkpoints) > 64 or not all(_is_step(c) for c in checkpoints):
        raise Misbehaviour(f"a worker's checkpoints are {str(checkpoints)[:100]}", evidence=member.peer)
    member.step, member.term, member.past = step, term, past
    member.checkpoints, member.rests = list(checkpoints), rests[:100]


def _is_step(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**31
