"""The host opens a run: it seats workers, publishes the roster, passes their JSON-RPC on, and listens to their reports.

It has no say in who earned what: shares come from receipts and the workers' votes. A seat, once taken, stays with its
peer until he hands it over; a peer that comes back gets its seat again. When the last seat is taken, the host deploys
the share contract for exactly these workers. Seats are given for invitations, which end, and can be taken back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import anyio
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import Account, PeerId, parse_account
from tessera.core.signing import AccountKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.book import SeatBook
from tessera.training.joining import Member, Pace, parse_pace
from tessera.training.manifest import Manifest
from tessera.training.protocols import JOIN, RUN, SMALL
from tessera.training.roster import PastSeat, Roster, Seat

__all__ = ["Phase", "RunHost", "WorkerReport"]

log = structlog.get_logger()

Phase = Literal["seating", "training", "paused", "serving", "closed"]
LONG_POLL_S = 5.0
SHARE_SYMBOL = "TSRA"
GAS_GRANT_WEI = 10**16  # sent to each worker's account where gas costs money
SUCCESSOR_S = 120.0  # a successor who says nothing for so long has gone away: the stage waits for another


class WorkerReport(BaseModel):
    """What a worker says of itself. It is shown, never paid for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: Annotated[int, Field(ge=0)]
    losses: Annotated[list[tuple[int, float]], Field(max_length=1000)] = []
    validations: Annotated[list[tuple[int, float]], Field(max_length=1000)] = []
    wire_bytes: Annotated[int, Field(ge=0)] = 0
    wire_tokens: Annotated[int, Field(ge=0)] = 0
    sessions: Annotated[int, Field(ge=0)] = 0
    trained: bool = False
    settled: bool = False
    rtt_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # of the report before this one
    leaving: bool = False
    pauses: Annotated[str, Field(max_length=100)] = ""  # why it does not work now


class RunHost:
    """Serves one run on `transport`. State lies in `book`, so a restart keeps seats, invitations and contract.

    Args:
        operator: pays for the deployment; owns nothing by it.
        on_report: told of every report, with the stage that it came from.
        pace: the step that all have finished, and tokens per second now, for joiners to see.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        transport: Transport,
        chain: RpcChain,
        coin: Account,
        operator: AccountKey,
        book: SeatBook,
        on_report: Callable[[int, WorkerReport], None],
        pace: Callable[[], tuple[int, float]],
        clock: Clock,
    ) -> None:
        self.manifest = manifest
        self.phase: Phase = "seating"
        self._transport, self._chain, self._coin, self._operator = transport, chain, coin, operator
        self._book, self._on_report, self._pace, self._clock = book, on_report, pace, clock
        self._seats: dict[int, Seat] = {}
        self._past: list[PastSeat] = []
        self._paces: dict[PeerId, Pace] = {}
        self._leaving: set[int] = set()
        self._successors: dict[int, Seat] = {}
        self._successor_heard: dict[int, float] = {}
        self._share: Account | None = None
        self._full = anyio.Event()
        self._ready = anyio.Event()
        self._taking, self._following = anyio.Lock(), anyio.Lock()
        self._told_closed: set[PeerId] = set()
        try:
            self._load()
        except (TesseraError, ValueError, TypeError, KeyError) as error:
            raise Invalid(f"{book.shown} is damaged ({error}): restore it from your backup, or move it away") from error

    def serve(self) -> None:
        serve_calls(self._transport, JOIN, self._join, request_limit=SMALL)
        serve_calls(self._transport, RUN, self._run, request_limit=SMALL)

    async def seat_everyone(self) -> Roster:
        """Wait until all seats are taken and the share contract stands; the complete roster.

        Raises: Conflict when an earlier start's contract has vanished with its chain.
        """
        await self._full.wait()
        if self._share is None:
            self._share = await self._deploy()
            self._book.save_fact("share", self._share)
        elif not await self._chain.code(self._share):
            raise Conflict(
                f"the share contract {self._share} is not on this chain: was the network reset? "
                "Start again with another --state-dir"
            )
        self.phase = "training"
        self._ready.set()
        return self.roster()

    def roster(self) -> Roster:
        if self._share is None:
            raise Conflict(f"{len(self._seats)} of {self.manifest.model.stages} seats are taken")
        return Roster(self.manifest.run_id, tuple(self.seats), self._share, self._coin, tuple(self._past))

    @property
    def seats(self) -> list[Seat]:
        return [self._seats[stage] for stage in sorted(self._seats)]

    @property
    def past(self) -> list[PastSeat]:
        """Who has left, and when."""
        return list(self._past)

    @property
    def edition(self) -> str:
        """Changes when a seat is taken or handed over, or a peer comes back elsewhere: then the workers ask again."""
        seats = [seat.to_value() for seat in self.seats]
        return sha256(encoding.encode([*seats, len(self._past)])).hex()[:16]

    async def close(self, patience_s: float = 3.0) -> None:
        """Tell the workers that the host leaves, and wait a little until each has heard it."""
        self.phase = "closed"
        peers = {seat.peer for seat in self._seats.values()}
        with anyio.move_on_after(patience_s):
            while not peers <= self._told_closed:
                await anyio.sleep(0.05)

    # --- joining ----------------------------------------------------------------------------------------------------

    async def _join(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if request.get("run_id") != self.manifest.run_id:
            raise Conflict(
                f"this host runs {self.manifest.run_id[:16]}…: the invitation is for another run, ask for a new one"
            )
        if self.phase == "closed":
            raise Conflict(f"the run {self.manifest.name!r} is closed: its host is leaving")
        op, invitation = request.get("op"), request.get("invitation")
        async with self._taking:  # two joiners must not be promised one seat
            stage, how = await self._place(peer, request)
            if how != "returning":
                self._check_invitation(invitation, peer)
            if op == "look":
                return self._offer(stage, how), self.manifest.canonical
            if op != "take":
                raise Invalid(f"unknown operation {str(op)[:40]!r}")
            seat, pace = self._seat(peer, stage, request), parse_pace(request.get("pace"))
            if how != "returning":
                self._book.use_invitation(str(invitation), peer, int(self._clock.time()))
            if pace is not None:
                self._paces[peer] = pace
            if how == "successor":
                self._successors[stage], self._successor_heard[stage] = seat, anyio.current_time()
            else:
                self._book.save_seat(stage, seat.to_value())
                self._seats[stage] = seat
        if len(self._seats) == self.manifest.model.stages:
            self._full.set()
        log.info("seat_taken", stage=stage, how=how, peer_id=peer, account=seat.account)
        return {"stage": stage, "successor": how == "successor"}, self.manifest.canonical

    async def _place(
        self, peer: PeerId, request: dict[str, Any]
    ) -> tuple[int, Literal["returning", "free", "successor"]]:
        """Which stage is `peer`'s. Raises `Conflict` when there is none."""
        for stage, heard in list(self._successor_heard.items()):
            if anyio.current_time() - heard > SUCCESSOR_S:
                del self._successor_heard[stage]
                self._successors.pop(stage, None)
        for seats, how in ((self._seats, "returning"), (self._successors, "successor")):
            for seat in seats.values():
                if seat.peer == peer:
                    return seat.stage, how  # type: ignore[return-value]
        stages = range(self.manifest.model.stages)
        for stage in stages:
            if stage not in self._seats:
                return stage, "free"
        for stage in sorted(self._leaving - self._successors.keys()):
            return stage, "successor"
        account = request.get("account")
        if self._share is not None and account is not None:  # handed over while we were away
            face = ModelShare(self._chain, self._share)
            for stage in stages:
                if await face.workers(stage) == account != self._seats[stage].account:
                    return stage, "successor"
        raise Conflict(f"all {len(stages)} seats of this run are taken: ask its host to tell you when one is free")

    def _check_invitation(self, name: object, peer: PeerId) -> None:
        """Raises `Refused` unless the invitation is ours, stands, and is not used up."""
        known = self._book.invitation(name) if isinstance(name, str) else None
        if known is None:
            raise Refused("this host gave no such invitation: ask for a new one", rule="invited")
        if known.revoked:
            raise Refused("this invitation was taken back: ask for a new one", rule="invitation_revoked")
        if known.expires < self._clock.time():
            raise Refused("this invitation has expired: ask for a new one", rule="invitation_expired")
        if peer not in known.users and len(known.users) >= known.seats:
            raise Refused(
                f"this invitation was for {known.seats} seat{'s' if known.seats > 1 else ''}, and was used: "
                "if that was not you, somebody copied it; ask for a new one",
                rule="invitation_used",
            )

    def _offer(self, stage: int, how: str) -> dict[str, Any]:
        step, tokens_per_s = self._pace()
        members = (Member(stage=seat.stage, pace=self._paces.get(seat.peer)) for seat in self.seats)
        return {
            "stage": stage,
            "successor": how == "successor",
            "returning": how == "returning",
            "phase": self.phase,
            "step": step,
            "tokens_per_s": tokens_per_s if math.isfinite(tokens_per_s) else 0.0,
            "now": int(self._clock.time()),
            "members": [member.model_dump() for member in members],
        }

    def _seat(self, peer: PeerId, stage: int, request: dict[str, Any]) -> Seat:
        """The seat that `peer` asks for, checked."""
        record = PeerRecord.from_text(request.get("record"))
        if record.id != peer:
            raise Misbehaviour(f"the record names {record.id[:16]}…, the link is {peer[:16]}…'s")
        account, binding = parse_account(request.get("account")), request.get("binding")
        seat = Seat.from_value({"stage": stage, "record": record.to_text(), "account": account, "binding": binding})
        seat.check(self.manifest.run_id)
        mine = next((other for other in self._seats.values() if other.peer == peer), None)
        others = (*self._seats.values(), *self._successors.values())
        if account in {other.account for other in others if other.peer != peer} or (mine and account != mine.account):
            raise Conflict(f"{account} is bound to another seat: one account, one stage")
        return seat

    # --- the run ----------------------------------------------------------------------------------------------------

    async def _run(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        op, stage = request.get("op"), self._stage_of(peer)
        if op == "handed_over":
            await self._follow_chain()
            return {}, b""
        if stage is None:
            raise Refused("only seated workers may ask for the roster", rule="seated")
        if op == "roster":
            with anyio.move_on_after(LONG_POLL_S):
                await self._ready.wait()
            if self._successors:
                self._hear_successor(peer)
                await self._follow_chain()
            ready = self._ready.is_set()
            waiting = {"ready": False, "taken": len(self._seats)}
            return ({"ready": True, **self.roster().to_value()} if ready else waiting), b""
        if op == "report":
            self._hear(peer, stage, _parse_report(request.get("report")))
            successor = self._successors.get(stage)
            follows = None if successor is None else successor.to_value()
            return {"phase": self.phase, "roster": self.edition, "successor": follows}, b""
        raise Invalid(f"unknown operation {str(op)[:40]!r}")

    def _stage_of(self, peer: PeerId) -> int | None:
        """The stage that `peer` holds, or is about to take over."""
        seats = (*self._seats.values(), *self._successors.values())
        return next((seat.stage for seat in seats if seat.peer == peer), None)

    def _hear(self, peer: PeerId, stage: int, report: WorkerReport) -> None:
        if self._seats[stage].peer != peer:
            raise Refused("only who holds a stage reports for it", rule="seated")
        if report.leaving:
            self._leaving.add(stage)
        elif stage in self._leaving:  # he stays after all
            self._leaving.discard(stage)
            self._successors.pop(stage, None)
        self._on_report(stage, report)
        if self.phase == "closed":
            self._told_closed.add(peer)

    def _hear_successor(self, peer: PeerId) -> None:
        for stage, seat in self._successors.items():
            if seat.peer == peer:
                self._successor_heard[stage] = anyio.current_time()

    async def _follow_chain(self) -> None:
        """Seat the successors whose handover stands on the chain. A chain that is away is asked again later."""
        async with self._following:
            try:
                await self._follow()
            except TesseraError as error:
                log.warning("chain_not_followed", code=error.code, reason=error.message)

    async def _follow(self) -> None:
        if self._share is None:
            return
        face = ModelShare(self._chain, self._share)
        for number in range(len(self._past), await face.handover_count()):
            stage, leaver, from_step = await face.handovers(number)
            seat = self._successors.get(stage)
            if seat is None or self._seats[stage].account != leaver or await face.workers(stage) != seat.account:
                log.warning("handover_not_followed", number=number, stage=stage)
                return
            gone = PastSeat(self._seats[stage], from_step)
            self._book.save_handover(number, gone.to_value(), stage, seat.to_value())
            self._past.append(gone)
            self._seats[stage] = self._successors.pop(stage)
            self._successor_heard.pop(stage, None)
            self._leaving.discard(stage)
            if await self._chain.gas_price() > 0:
                await self._chain.fund(self._operator, seat.account, GAS_GRANT_WEI)
            log.info("stage_handed_over", stage=stage, leaver=gone.seat.peer, successor=seat.peer, from_step=from_step)

    async def _deploy(self) -> Account:
        accounts = [seat.account for seat in self.seats]
        if await self._chain.gas_price() > 0:
            for account in accounts:
                await self._chain.fund(self._operator, account, GAS_GRANT_WEI)
        run_id = bytes.fromhex(self.manifest.run_id)
        return await self._chain.deploy(
            self._operator, "model_share", self.manifest.name, SHARE_SYMBOL, self._coin, run_id, accounts
        )

    def _load(self) -> None:
        self._seats = {stage: Seat.from_value(value) for stage, value in self._book.seats().items()}
        self._past = [PastSeat.from_value(value) for value in self._book.handovers()]
        share = self._book.fact("share")
        self._share = parse_account(share) if share else None
        if len(self._seats) == self.manifest.model.stages:
            self._full.set()


def _parse_report(value: object) -> WorkerReport:
    try:
        return WorkerReport.model_validate_json(json.dumps(value))
    except (ValidationError, TypeError) as error:
        raise Invalid(f"a report cannot be read: {error}") from error
