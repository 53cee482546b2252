"""The host of a served model: gives stages to machines that come with an invitation, and keeps the roster.

A newcomer gets the stage that fewest hold; while it fetches and loads, the stage counts as held for other newcomers.
When its stream ends, or is silent for too long, it is out of the roster, and the engine asks others.
"""

from __future__ import annotations

import hmac
from contextlib import suppress

import anyio
import structlog

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Misbehaviour, Refused, TesseraError
from tessera.devnet.stage_invitation import StageInvitation
from tessera.devnet.stage_table import ALIVE_S, STAGES, StageTable, Stream, receive, send
from tessera.models.card import ModelCard
from tessera.p2p.transport import PeerRecord, Transport

__all__ = ["StageDesk"]

log = structlog.get_logger()

MAX_MEMBERS = 256


class StageDesk:
    """Answers machines that want to hold a stage of `card`, on `transport`, from now on."""

    def __init__(
        self, transport: Transport, card: ModelCard, table: StageTable, invitation: StageInvitation, clock: Clock
    ) -> None:
        self._card, self._table, self._invitation, self._clock = card, table, invitation, clock
        self._coming = [0] * table.stages  # newcomers who are not ready yet
        self._members: set[str] = set()
        transport.serve(STAGES, self._handle, max_streams=2)

    @property
    def members(self) -> int:
        """Machines that hold a stage or are about to."""
        return len(self._members)

    async def _handle(self, stream: Stream) -> None:
        try:
            await self._member(stream)
        except TesseraError as error:
            log.info("stage_member_lost", peer_id=stream.peer, error=error.code, reason=error.message)
            with suppress(TesseraError):
                await send(stream, {"op": "sorry", "reason": error.message[:500]})

    async def _member(self, stream: Stream) -> None:
        want = self._check(stream, await receive(stream, secret=str, digest=str, want=int))
        stage = self._table.least_held(self._coming, want)
        self._members.add(stream.peer)
        self._coming[stage] += 1
        loading = True
        try:
            card = self._card.canonical.decode()
            await send(stream, {"op": "seat", "stage": stage, "card": card})
            record = await _until_ready(stream)
            if record is None:
                return
            self._coming[stage] -= 1
            loading = False
            self._table.add(stage, record)
            log.info("stage_held", stage=stage, peer_id=stream.peer)
            await self._while_there(stream)
        finally:
            self._coming[stage] -= loading
            self._members.discard(stream.peer)
            self._table.remove(stage, stream.peer)

    def _check(self, stream: Stream, asked: dict[str, object] | None) -> int:
        """The stage that the newcomer would like, -1 = any. Raises: Refused, Conflict, Misbehaviour."""
        if asked is None or asked.keys() != {"op", "secret", "digest", "want"} or asked["op"] != "ask":
            raise Misbehaviour("a member begins with ask, secret, digest and want", evidence=str(asked)[:80])
        known = hmac.compare_digest(str(asked["secret"]).encode(), self._invitation.secret.encode())
        if not known or asked["digest"] != self._card.digest or self._invitation.expires < self._clock.time():
            raise Refused("this invitation is not, or no longer, one to hold a stage here", rule="invitation")
        if stream.peer in self._members:
            raise Conflict("this machine holds a stage already: give another --state-dir for a second one")
        if len(self._members) >= MAX_MEMBERS:
            raise Refused(f"{MAX_MEMBERS} machines hold stages already", rule="members")
        want = asked["want"]
        return want if isinstance(want, int) else -1

    async def _while_there(self, stream: Stream) -> None:
        """Tells the roster after each change, until the member is gone."""
        failure: TesseraError | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._tell, stream, group.cancel_scope)
            try:
                while (said := await receive(stream)) is not None:
                    if said["op"] != "alive":
                        raise Misbehaviour(f"a holder says alive, not {said['op'][:20]}", evidence=str(said)[:80])
            except TesseraError as error:
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _tell(self, stream: Stream, scope: anyio.CancelScope) -> None:
        try:
            while True:
                change = self._table.change
                await send(stream, {"op": "roster", "stages": self._table.to_value()})
                with anyio.move_on_after(ALIVE_S):
                    await change.wait()
        except TesseraError:
            scope.cancel()  # it does not listen: it is gone


async def _until_ready(stream: Stream) -> PeerRecord | None:
    """The newcomer's record; None when it left before."""
    while (said := await receive(stream, record=str)) is not None:
        if said["op"] == "ready" and "record" in said:
            record = PeerRecord.from_text(said["record"])
            if record.id != stream.peer:
                raise Misbehaviour("a holder shows a record that is not its own", evidence=record.id)
            return record
        if said["op"] != "alive":
            raise Misbehaviour(f"a newcomer says alive or ready, not {said['op'][:20]}", evidence=str(said)[:80])
    return None
