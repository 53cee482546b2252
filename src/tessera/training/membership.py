"""One worker's part in who comes and goes: it signs for others, and goes itself when its owner wants to leave.

It signs for a joiner whose bonded seat the contract has drawn, and whose account and peer never had one; for a leaver
whose stage has another worker; and against one who has not answered it for ten minutes, or an hour where he is the only
one of his stage, for whom the next who comes can then be drawn.

Until a change stands on the chain nothing has changed. Who wants to leave says so to the contract, which draws the next
who comes to his stage. Who leaves while he is the only one of his stage waits until another has come and is in step
with him; what is not credited to him by then is done again, or credited to the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio
import structlog
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.chain.faces import Run
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, TesseraError
from tessera.core.ids import Account, PeerId, parse_account
from tessera.core.signing import AccountKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.transport import Transport
from tessera.training.attendance import Attendance
from tessera.training.bond import Status, peer_bytes
from tessera.training.book import ReceiptBook
from tessera.training.manifest import Manifest
from tessera.training.proposal import Proposal, propose
from tessera.training.protocols import MEMBERSHIP, SMALL
from tessera.training.receipts import Receipt, why_not
from tessera.training.roster import Roster, Seat

__all__ = ["ABSENT_S", "Membership", "Training"]

log = structlog.get_logger()

LOOK_S = 1.0
ABSENT_S = 600.0  # without an answer: then a worker may be taken off the list
LAST_ABSENT_S = 3600.0  # the same, for the only one of a stage: his stage is lost with him
TURN_S = 60.0  # later each further worker proposes that, so that mostly one does
UNSIGNED_STEPS = 64  # whose receipts may not have reached everybody
LAST_RECEIPTS = 1024  # of a leaver; more of those steps have been told to all by then
RECEIPT_BYTES = 1024  # an upper bound for one receipt's row
VOTE_LIMIT = SMALL + LAST_RECEIPTS * RECEIPT_BYTES  # bytes of a question


class Training(Protocol):
    """What a leaver stops; `tessera.training.pipeline.Pipeline`."""

    @property
    def steps_done(self) -> int: ...

    async def may_leave(self) -> bool:
        """Whether another worker of our stage is in step with us, so that nothing is lost without us."""
        ...

    async def freeze(self) -> None:
        """Stop, and start nothing until `thaw`."""
        ...

    def thaw(self) -> None: ...


class Membership:
    """Args:
    changed: tells the host, if it can be reached, that the contract has something new.
    leaving: whether our owner wants to leave.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        transport: Transport,
        chain: RpcChain,
        account_key: AccountKey,
        book: ReceiptBook,
        training: Training,
        roster: Callable[[], Roster],
        attendance: Attendance,
        changed: Callable[[], Awaitable[None]],
        leaving: Callable[[], bool],
    ) -> None:
        self._manifest, self._transport, self._chain, self._key = manifest, transport, chain, account_key
        self._book, self._training, self._roster, self._attendance = book, training, roster, attendance
        self._changed, self._leaving = changed, leaving
        self._run = Run(chain, roster().run)
        self.left = anyio.Event()  # we are no worker any more

    def serve(self) -> None:
        serve_calls(self._transport, MEMBERSHIP, self._answer, request_limit=VOTE_LIMIT, max_streams=8)

    async def run(self) -> None:
        """Leave when our owner wants it; take the absent off the list. Until we have left, or are cancelled."""
        while not self.left.is_set():
            try:
                if self._leaving():
                    await self._leave()
                else:
                    await self._dismiss_absent()
            except TesseraError as error:  # too few are here, somebody was first, or the chain is away
                log.info("change_waits", code=error.code, reason=error.message)
                if isinstance(error, Conflict):  # who posted the last change may not have lived to tell
                    await self._changed()
            await anyio.sleep(LOOK_S)

    # --- going ------------------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        status = (await self._run.members(self._key.account)).status
        if status == Status.WORKER:
            await self._run.leave(self._key)  # for good: who stays after all has a companion in the next who comes
            log.info("leaving_announced")
        if status > Status.LEAVING:  # it stood there when we came, or a reply was lost
            self.left.set()
        elif await self._training.may_leave():
            await self._training.freeze()
            try:
                await self._propose(Proposal(leaver=self._key.account, last_signed=self._last_signed()))
                self.left.set()
            finally:
                if not self.left.is_set():
                    self._training.thaw()

    async def _dismiss_absent(self) -> None:
        roster = self._roster()
        turn_s = TURN_S * roster.accounts.index(self._key.account)
        for seat in roster.seats:
            patience_s = _patience_s(roster, seat) + turn_s
            if seat.peer != self._transport.id and self._attendance.absent_s(seat.peer) > patience_s:
                log.info("dismissing", peer_id=seat.peer, stage=seat.stage)
                await self._propose(Proposal(leaver=seat.account))
                await self._changed()
                return

    async def _propose(self, proposal: Proposal) -> None:
        await propose(self._transport, self._chain, self._key, self._manifest, self._roster(), proposal)

    def _last_signed(self) -> tuple[Receipt, ...]:
        """What we signed for our neighbours in the last steps, the newest first where there is too much."""
        steps = range(max(0, self._training.steps_done - UNSIGNED_STEPS), self._manifest.schedule.steps)
        held = self._book.of_steps(self._manifest.run_id, steps)
        return tuple([receipt for receipt in held if receipt.signer == self._transport.id][-LAST_RECEIPTS:])

    # --- signing ----------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if request.get("op") == "here":
            return {}, b""
        if request.get("op") == "vote":
            return {"signature": (await self._vote(peer, request, body)).hex()}, b""
        raise Invalid(f"unknown operation {str(request.get('op'))[:40]!r}")

    async def _vote(self, peer: PeerId, request: dict[str, Any], body: bytes) -> bytes:
        """Our signature, when the change is the next one and we agree with it."""
        roster, number = self._roster(), request.get("number")
        joiner, leaver = request.get("joiner"), request.get("leaver")
        if type(number) is not int or (joiner is None) == (leaver is None):
            raise Invalid("a change has a number, and a joiner or a leaver")
        if joiner is not None:
            proposal = Proposal(joiner=await self._check_joiner(roster, peer, joiner))
        else:
            proposal = Proposal(leaver=self._check_leaver(roster, peer, parse_account(leaver)))
        if not number == roster.changes == await self._run.change_count():
            raise Conflict(f"change {number} is not the next one, or we have not heard of the last: try again")
        if leaver is not None:
            self._book.add(await to_thread.run_sync(self._read_receipts, peer, body, roster))
        return self._key.sign_digest(proposal.digest(self._manifest, roster.run, number))

    def _check_leaver(self, roster: Roster, peer: PeerId, leaver: Account) -> Account:
        asking, going = roster.seat_of(peer), next((s for s in roster.seats if s.account == leaver), None)
        if asking is None:
            raise Refused("only this run's workers say who leaves it", rule="seated")
        if going is None:
            raise Missing(f"{leaver} has no seat in this run")
        if asking is going:
            if len(roster.of_stage(going.stage)) == 1:
                raise Refused(f"stage {going.stage} has no other worker", rule="last_of_stage")
            return leaver
        absent_s = self._attendance.absent_s(going.peer)
        if going.peer == self._transport.id or absent_s < _patience_s(roster, going):
            raise Refused(f"{going.peer[:16]}… was here {absent_s:.0f} s ago", rule="absent")
        return leaver

    async def _check_joiner(self, roster: Roster, peer: PeerId, value: object) -> Seat:
        """The seat that `peer` asks for. Raises `Refused` naming the rule, or `Misbehaviour` for a forged one."""
        seat = Seat.from_value(value)
        if seat.peer != peer:
            raise Refused("a joiner asks for himself", rule="own_seat")
        seat.check(self._manifest.run_id)
        if seat.stage >= roster.stages:
            raise Invalid(f"stage {seat.stage} of {roster.stages}")
        roster.admit(seat)
        member = await self._run.members(seat.account)
        if (member.status, member.stage, member.peer) != (Status.DRAWN, seat.stage, peer_bytes(peer)):
            raise Refused(
                f"the contract has not drawn stage {seat.stage} for {seat.account} and its peer", rule="drawn"
            )
        return seat

    def _read_receipts(self, leaver: PeerId, body: bytes, roster: Roster) -> list[Receipt]:
        """What the leaver signed, checked. Cost: 0.1 ms for each; runs in a thread."""
        rows = encoding.decode(body, VOTE_LIMIT)
        if not isinstance(rows, list) or len(rows) > LAST_RECEIPTS:
            raise Invalid(f"a leaver's receipts are a list of at most {LAST_RECEIPTS}")
        receipts = [Receipt.from_row(self._manifest.run_id, row) for row in rows]
        stage_of, microbatches = roster.stage_by_peer, self._manifest.schedule.microbatches
        for receipt in receipts:
            if receipt.signer != leaver or why_not(receipt, stage_of, microbatches):
                raise Misbehaviour("a receipt that the leaver has not signed, or not in this run", evidence=leaver)
            receipt.check()
        return receipts


def _patience_s(roster: Roster, seat: Seat) -> float:
    """How long a worker may give no answer and keep his seat."""
    return LAST_ABSENT_S if len(roster.of_stage(seat.stage)) == 1 else ABSENT_S
