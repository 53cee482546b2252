"""A worker leaves and another takes his stage: the state goes from the one to the other, and to nobody else.

    successor   begin ─▶ leaver stops training, and says which steps he holds and from which one the pay is the other's
    successor   chunk ─▶ … of his newest checkpoints, over their own encrypted link
    successor   done  ─▶ leaver asks the other workers for their signatures, and puts the handover on the chain

Until it stands on the chain nothing has changed: a successor who goes away leaves the leaver in his seat, and training
goes on. The leaver is paid for every step that his neighbours have signed; later ones are trained again. What he signed
for them travels with the question for their signatures: his last receipts may have been under way when he stopped, and
once he is gone nobody else could show them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import structlog
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.chain.settle import handover_digest
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import Account, PeerId
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.manifest import Manifest
from tessera.training.protocols import CALL_S, HANDOVER, SMALL, WORK_S
from tessera.training.receipts import Receipt, expected_receipts
from tessera.training.roster import Roster, Seat

__all__ = ["Handover", "take_over"]

log = structlog.get_logger()

CHUNK_BYTES = 4 << 20
CHUNK_S = 120.0  # 4 MiB at 0.28 Mb/s
STATE_LIMIT = 1 << 40  # bytes of one checkpoint
NEWEST = 2  # checkpoints: the newest that all workers hold is one of them
PATIENCE_S = 600.0  # how long a leaver stands still for a successor who has begun
UNSIGNED = 64  # steps that may lie between the last one done and the last one that all neighbours signed
VOTE_LIMIT = SMALL + UNSIGNED * 2 * 512  # bytes of the question: the successor's seat, two receipts for each step


class Training(Protocol):
    """What a leaver stops; `tessera.training.pipeline.Pipeline`."""

    @property
    def steps_done(self) -> int: ...
    async def freeze(self) -> None: ...
    def thaw(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _State:
    """What the leaver offers."""

    from_step: int
    sizes: dict[int, int]  # step -> bytes of its checkpoint
    digests: dict[int, str]

    def to_value(self) -> dict[str, Any]:
        rows = [[step, self.sizes[step], self.digests[step]] for step in sorted(self.sizes)]
        return {"from_step": self.from_step, "checkpoints": rows}


class Handover:
    """One worker's part in handovers: he votes on the others', and gives up his own stage when he wants to leave.

    Args:
        successor: who takes our stage, as the host says; None while nobody does or we do not leave.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        transport: Transport,
        chain: RpcChain,
        account_key: AccountKey,
        book: ReceiptBook,
        checkpoints: Checkpoints,
        training: Training,
        roster: Callable[[], Roster],
        successor: Callable[[], Seat | None],
    ) -> None:
        self._manifest, self._transport, self._chain, self._key = manifest, transport, chain, account_key
        self._book, self._checkpoints, self._training = book, checkpoints, training
        self._roster, self._successor = roster, successor
        self._state: _State | None = None
        self._touched = 0.0
        self.complete = anyio.Event()  # our stage is the successor's

    def serve(self) -> None:
        serve_calls(self._transport, HANDOVER, self._answer, request_limit=VOTE_LIMIT, max_streams=8)

    async def watch(self) -> None:
        """Go on training when a successor who has begun does not end; until cancelled."""
        while True:
            await anyio.sleep(CALL_S)
            if self._state is not None and anyio.current_time() - self._touched > PATIENCE_S:
                log.warning("successor_gone", patience_s=PATIENCE_S)
                self._state = None
                self._training.thaw()

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        op = request.get("op")
        if op == "vote":
            return {"signature": (await self._vote(peer, request, body)).hex()}, b""
        successor = self._successor()
        if successor is None or successor.peer != peer:
            raise Unavailable("this worker does not hand its stage to you now: try again", retry_after_s=1.0)
        self._touched = anyio.current_time()
        if op == "begin":
            return (await self._begin()).to_value(), b""
        if op == "chunk":
            return {}, await self._chunk(request.get("step"), request.get("offset"))
        if op == "done":
            await self._pass_on(successor)
            return {}, b""
        raise Invalid(f"unknown operation {str(op)[:40]!r}")

    # --- the leaver -------------------------------------------------------------------------------------------------

    async def _begin(self) -> _State:
        if self._state is None:
            await self._training.freeze()
            steps = [step for step in self._checkpoints.steps() if step > 0][-NEWEST:]
            data = {step: await to_thread.run_sync(self._checkpoints.load, step) for step in steps}
            sizes, digests = {s: len(d) for s, d in data.items()}, {s: sha256(d).hex() for s, d in data.items()}
            self._state = _State(self._signed_until(), sizes, digests)
            log.info("handing_over", from_step=self._state.from_step, checkpoints=steps)
        return self._state

    def _signed_until(self) -> int:
        """The first step that not every neighbour of ours has signed: from there on the pay is the successor's."""
        done, roster = self._training.steps_done, self._roster()
        for step in range(done, max(0, done - UNSIGNED), -1):
            peers = [seat.peer for seat in roster.at(step - 1)]
            held = self._book.of_steps(self._manifest.run_id, range(step - 1, step))
            mine = {(r.direction, r.signer) for r in held if r.worker == self._transport.id}
            if mine >= set(expected_receipts(peers, self._my_seat().stage)):
                return step
        return max(0, done - UNSIGNED)

    async def _chunk(self, step: object, offset: object) -> bytes:
        if self._state is None or type(step) is not int or step not in self._state.sizes:
            raise Conflict(f"no checkpoint of step {str(step)[:20]} is offered: begin again")
        if type(offset) is not int or not 0 <= offset < self._state.sizes[step]:
            raise Invalid(f"a chunk starts inside the checkpoint, not at {str(offset)[:20]}")
        return await to_thread.run_sync(self._checkpoints.read, step, offset, CHUNK_BYTES)

    async def _pass_on(self, successor: Seat) -> None:
        """Collect the signatures and post. Raises when too few sign; then the stage stays ours."""
        if self.complete.is_set():
            return
        if self._state is None:
            raise Conflict("nothing was begun: begin again")
        roster, stage = self._roster(), self._my_seat().stage
        share = ModelShare(self._chain, roster.share)
        number, from_step = await share.handover_count(), self._state.from_step
        signatures = {self._key.account: self._sign(number, successor, from_step)}
        request = {"op": "vote", "number": number, "successor": successor.to_value(), "from_step": from_step}
        last_signed = encoding.encode([receipt.to_row() for receipt in self._last_signed()])
        async with anyio.create_task_group() as tasks:
            for seat in roster.seats:
                if seat.stage != stage:
                    tasks.start_soon(self._collect, seat, request, last_signed, signatures)
        if 3 * len(signatures) <= 2 * roster.stages:
            raise Unavailable(
                f"{len(signatures)} of {roster.stages} workers signed the handover, more than 2/3 needed: "
                "wait until the others are here"
            )
        ordered = [signatures[account] for account in sorted(signatures, key=lambda a: int(a, 16))]
        await share.hand_over(self._key, number, stage, successor.account, from_step, ordered)
        log.info("handed_over", stage=stage, successor=successor.peer, from_step=from_step)
        self.complete.set()

    async def _collect(
        self, seat: Seat, request: dict[str, Any], body: bytes, signatures: dict[Account, bytes]
    ) -> None:
        """Ask one worker for his signature; a refusal is logged, not fatal."""
        try:
            reply, _ = await call(
                self._transport, seat.record, HANDOVER, request, body, timeout_s=CALL_S, reply_limit=SMALL
            )
            signature = bytes.fromhex(str(reply.get("signature", "")))
            successor = Seat.from_value(request["successor"])
            if recover_account(self._digest(request["number"], successor, request["from_step"]), signature) != (
                seat.account
            ):
                raise Misbehaviour(f"stage {seat.stage} signed something else")
            signatures[seat.account] = signature
        except (TesseraError, ValueError) as error:
            log.warning("handover_vote_missing", stage=seat.stage, reason=str(error))

    def _last_signed(self) -> list[Receipt]:
        """What we signed for our neighbours in the last steps."""
        done = self._training.steps_done
        held = self._book.of_steps(self._manifest.run_id, range(max(0, done - UNSIGNED), done))
        return [receipt for receipt in held if receipt.signer == self._transport.id]

    # --- the others -------------------------------------------------------------------------------------------------

    async def _vote(self, peer: PeerId, request: dict[str, Any], body: bytes) -> bytes:
        """Our signature, if the holder of a stage asks for it and his successor is new to the run."""
        roster = self._roster()
        stage = roster.stage_of(peer)
        if stage is None:
            raise Refused("only this run's workers hand their stages over", rule="seated")
        successor = Seat.from_value(request.get("successor"))
        successor.check(self._manifest.run_id)
        if successor.stage != stage:
            raise Refused(f"stage {stage} cannot hand over stage {successor.stage}", rule="own_stage")
        if successor.account in roster.accounts or successor.peer in roster.peers:
            raise Refused("the successor works in this run already: one account, one stage", rule="one_stage")
        number, from_step = request.get("number"), request.get("from_step")
        steps = self._manifest.schedule.steps
        if type(number) is not int or type(from_step) is not int or not 0 <= from_step <= steps:
            raise Invalid(f"a handover has a number, and a step from 0 to {steps}")
        if number != await ModelShare(self._chain, roster.share).handover_count():
            raise Conflict(f"handover {number} is not the next one")
        if any(past.seat.stage == stage and from_step < past.until_step for past in roster.past):
            raise Misbehaviour(f"stage {stage} was handed over at a later step than {from_step} before")
        self._book.add(await to_thread.run_sync(self._read_receipts, peer, body))
        return self._sign(number, successor, from_step)

    def _read_receipts(self, leaver: PeerId, body: bytes) -> list[Receipt]:
        """What the leaver signed, checked. Cost: 0.1 ms for each; runs in a thread."""
        rows = encoding.decode(body, VOTE_LIMIT)
        if not isinstance(rows, list) or len(rows) > 2 * UNSIGNED:
            raise Invalid(f"a leaver's receipts are a list of at most {2 * UNSIGNED}")
        receipts = [Receipt.from_row(self._manifest.run_id, row) for row in rows]
        for receipt in receipts:
            if receipt.signer != leaver or receipt.tokens != self._manifest.tokens_per_step:
                raise Misbehaviour("a receipt that the leaver has not signed, or not of one step", evidence=leaver)
            receipt.check()
        return receipts

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _my_seat(self) -> Seat:
        roster = self._roster()
        return roster.seats[roster.accounts.index(self._key.account)]

    def _digest(self, number: int, successor: Seat, from_step: int) -> bytes:
        manifest, share = self._manifest, self._roster().share
        return handover_digest(
            manifest.chain_id, share, manifest.run_id, number, successor.stage, successor.account, from_step
        )

    def _sign(self, number: int, successor: Seat, from_step: int) -> bytes:
        return self._key.sign_digest(self._digest(number, successor, from_step))


async def take_over(
    transport: Transport, leaver: Callable[[], Awaitable[PeerRecord]], checkpoints: Checkpoints, *, patience_s: float
) -> int:
    """Fetch a stage's state from its holder, and have him hand it over; the step from which the pay is ours.

    Args:
        leaver: his newest record.
        patience_s: how long he may be away, or busy, before this gives up.

    Raises: Late when he does not hand over in time; Misbehaviour for a checkpoint that is not what he announced.
    """
    deadline = anyio.current_time() + patience_s
    while True:
        try:
            return await _take_over(transport, await leaver(), checkpoints)
        except (Unavailable, Conflict, Late) as error:
            log.info("handover_waits", code=error.code, reason=error.message)
            if anyio.current_time() > deadline:
                raise Late(f"the stage's holder did not hand it over within {patience_s:.0f} s: {error}") from error
            await anyio.sleep(1.0)


async def _take_over(transport: Transport, leaver: PeerRecord, checkpoints: Checkpoints) -> int:
    reply, _ = await call(transport, leaver, HANDOVER, {"op": "begin"}, timeout_s=WORK_S, reply_limit=SMALL)
    from_step, rows = reply.get("from_step"), reply.get("checkpoints")
    if type(from_step) is not int or from_step < 0 or not isinstance(rows, list) or len(rows) > NEWEST:
        raise Misbehaviour(f"the leaver offers {str(reply)[:100]}")
    for row in rows:
        await _fetch_checkpoint(transport, leaver, checkpoints, *_parse_offer(row))
    await call(transport, leaver, HANDOVER, {"op": "done"}, timeout_s=WORK_S, reply_limit=SMALL)
    return from_step


async def _fetch_checkpoint(
    transport: Transport, leaver: PeerRecord, checkpoints: Checkpoints, step: int, size: int, digest: str
) -> None:
    data = bytearray()
    while len(data) < size:
        request = {"op": "chunk", "step": step, "offset": len(data)}
        _, chunk = await call(
            transport, leaver, HANDOVER, request, timeout_s=CHUNK_S, reply_limit=CHUNK_BYTES + SMALL, bulk=True
        )
        if not chunk:
            raise Misbehaviour(f"the leaver's checkpoint of step {step} ends at {len(data)} of {size} bytes")
        data += chunk
    state = bytes(data)
    if len(state) != size or sha256(state).hex() != digest:
        raise Misbehaviour(f"the leaver's checkpoint of step {step} is not what he announced")
    await to_thread.run_sync(checkpoints.save, step, state)


def _parse_offer(row: object) -> tuple[int, int, str]:
    if not isinstance(row, list) or len(row) != 3:
        raise Misbehaviour(f"a checkpoint is offered as step, size and digest, not {str(row)[:60]}")
    step, size, digest = row
    if type(step) is not int or type(size) is not int or not isinstance(digest, str):
        raise Misbehaviour(f"a checkpoint is offered as step, size and digest, not {str(row)[:60]}")
    if not 0 < step < 2**53 or not 0 < size <= STATE_LIMIT:
        raise Misbehaviour(f"a checkpoint of step {step} and {size} bytes cannot be")
    return step, size, digest
