"""The host opens a run: it seats workers, publishes the roster, passes their JSON-RPC on, and listens to their reports.

It has no say in who earned what: shares come from receipts and the workers' votes. Each joiner is offered the stage
with the fewest workers, one of them at random. When every stage has as many as the manifest wants to begin with, the
host deploys the share contract for exactly these. From then on workers come and go by the others' signatures, which the
contract counts; the host gives a joiner a seat to ask for, and follows what the contract says.

A seat stays with its peer, who gets it again when it comes back, until it has left; then it is gone for good. Seats are
given for invitations, which end, and can be taken back.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import anyio
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.chain.settle import NOBODY
from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import Account, PeerId, parse_account
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.transport import Transport
from tessera.training.book import SavedSeat, SeatBook
from tessera.training.joining import Member, Pace, parse_pace
from tessera.training.manifest import MAX_WORKERS, Manifest
from tessera.training.protocols import JOIN, RUN, SMALL
from tessera.training.roster import Roster, Seat, vouch

__all__ = ["Phase", "RunHost", "WorkerReport"]

log = structlog.get_logger()

Phase = Literal["seating", "training", "paused", "serving", "closed"]
LONG_POLL_S = 5.0
SHARE_SYMBOL = "TSRA"
GAS_GRANT_WEI = 10**16  # sent to each worker's account where gas costs money
SILENT_S = 60.0  # a worker who has not reported for so long is not counted on
CANDIDATE_S = 120.0  # a joiner who says nothing for so long has gone away: his place is offered to others
OFFERS = 1024  # that are remembered; whoever looks again in vain is offered another
FROM_THE_START = -1


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
        key: of `transport`'s peer; what it signs tells the workers that a joiner's seat was given here.
        operator: pays for the deployment; owns nothing by it.
        on_report: told of every report, with the seat that it came from.
        pace: the step that all have finished, and tokens per second now, for joiners to see.
        rng: draws the stage of a joiner among those that have the fewest workers.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        transport: Transport,
        key: PeerKey,
        chain: RpcChain,
        coin: Account,
        operator: AccountKey,
        book: SeatBook,
        on_report: Callable[[Seat, WorkerReport], None],
        pace: Callable[[], tuple[int, float]],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.manifest = manifest
        self.phase: Phase = "seating"
        self._transport, self._key, self._chain, self._coin, self._operator = transport, key, chain, coin, operator
        self._book, self._on_report, self._pace, self._clock, self._rng = book, on_report, pace, clock, rng
        self._seats: list[Seat] = []  # in the order of admission
        self._past: list[Seat] = []
        self._candidates: dict[PeerId, Seat] = {}  # whom the workers are to let in
        self._heard: dict[PeerId, float] = {}  # when a candidate last asked
        self._reported: dict[PeerId, float] = {}  # when a worker last reported
        self._began = 0.0
        self._saved: dict[PeerId, SavedSeat] = {}
        self._changes = 0  # of the contract, that we have followed
        self._leaving: set[PeerId] = set()  # who says that he wants to
        self._offered: dict[PeerId, int] = {}  # stages
        self._paces: dict[PeerId, Pace] = {}
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
        self._began = anyio.current_time()
        serve_calls(self._transport, JOIN, self._join, request_limit=SMALL)
        serve_calls(self._transport, RUN, self._run, request_limit=SMALL)

    async def seat_everyone(self) -> Roster:
        """Wait until every stage has its first workers and the share contract stands; the complete roster.

        Raises: Conflict when an earlier start's contract has vanished with its chain.
        """
        await self._full.wait()
        if self._share is None:
            share = await self._deploy()
            self._book.save_seats((), {"share": share})
            self._share = share
        elif not await self._chain.code(self._share):
            raise Conflict(
                f"the share contract {self._share} is not on this chain: was the network reset? "
                "Start again with another --state-dir"
            )
        await self._follow_chain()
        self.phase = "training"
        self._ready.set()
        return self.roster()

    def roster(self) -> Roster:
        if self._share is None:
            raise Conflict(f"{len(self._seats)} of {self._founders} seats are taken")
        stages, seats, past = self.manifest.model.stages, tuple(self.seats), tuple(self._past)
        return Roster(self.manifest.run_id, stages, seats, self._share, self._coin, past, self._changes)

    @property
    def seats(self) -> list[Seat]:
        """Who works, by stage and then by order of admission."""
        return sorted(self._seats, key=lambda seat: seat.stage)

    @property
    def past(self) -> list[Seat]:
        """Who has left."""
        return list(self._past)

    @property
    def edition(self) -> str:
        """Changes when somebody comes, goes, or comes back elsewhere: then the workers ask again."""
        seats = [seat.to_value() for seat in self.seats]
        return sha256(encoding.encode([*seats, self._changes])).hex()[:16]

    async def close(self, patience_s: float = 3.0) -> None:
        """Tell the workers that the host leaves, and wait a little until each has heard it."""
        self.phase = "closed"
        with anyio.move_on_after(patience_s):
            while not {seat.peer for seat in self._seats} <= self._told_closed:
                await anyio.sleep(0.05)

    @property
    def _founders(self) -> int:
        return self.manifest.model.stages * self.manifest.replicas

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
            known = next((seat for seat in (*self._seats, *self._candidates.values()) if seat.peer == peer), None)
            if known is None:
                self._check_invitation(invitation, peer)
            stage = self._offer_stage(peer, known)
            if op == "look":
                return self._offer(stage, known is not None), self.manifest.canonical
            if op != "take":
                raise Invalid(f"unknown operation {str(op)[:40]!r}")
            seat, pace = self._seat(peer, stage, known, request), parse_pace(request.get("pace"))
            if known is None:
                self._book.use_invitation(str(invitation), peer, int(self._clock.time()))
            if pace is not None:
                self._paces[peer] = pace
            admitted = self._take(seat)
            if known is None and not admitted and await self._chain.gas_price() > 0:  # he posts his admission himself
                await self._chain.fund(self._operator, seat.account, GAS_GRANT_WEI)
        if len(self._seats) >= self._founders:
            self._full.set()
        log.info("seat_taken", stage=stage, peer_id=peer, account=seat.account, admitted=admitted)
        voucher = vouch(self._key, self.manifest.run_id, seat)
        return {"admitted": admitted, "voucher": voucher.hex()}, self.manifest.canonical

    def _offer_stage(self, peer: PeerId, known: Seat | None) -> int:
        """The stage that `peer` has, or is offered: one with the fewest workers, the same until others fill it.

        Who wants to leave, or is silent, is not counted: he may be the only one of his stage.

        Raises: Conflict when there is no room, or `peer` has left before.
        """
        if any(seat.peer == peer for seat in self._past):
            raise Conflict("this peer has left the run: join again from another --state-dir, as somebody new")
        fresh = [seat for seat in self._candidates.values() if seat.peer != peer and self._is_fresh(seat)]
        taken = Counter(seat.stage for seat in (*self._seats, *fresh))
        room = self.manifest.replicas if self._share is None else self.manifest.most_replicas
        if known is not None and (peer not in self._candidates or taken[known.stage] < room):
            return known.stage
        free = [stage for stage in range(self.manifest.model.stages) if taken[stage] < room]
        if not free or taken.total() >= MAX_WORKERS:
            raise Conflict(
                f"all {taken.total()} seats of this run are taken: ask its host to tell you when one is free"
            )
        going = [seat.stage for seat in self._seats if seat.peer in self._leaving or self._is_silent(seat.peer)]
        staying = taken - Counter(going)
        least = min(staying[stage] for stage in free)
        fewest = [stage for stage in free if staying[stage] == least]
        stage = self._offered.pop(peer, None)
        stage = stage if stage in fewest else self._rng.choice(fewest)
        self._offered[peer] = stage
        if len(self._offered) > OFFERS:
            self._offered.pop(next(iter(self._offered)))
        return stage

    def _is_silent(self, peer: PeerId) -> bool:
        """Whether a worker has not reported for a while: his stage needs somebody."""
        return self._share is not None and anyio.current_time() - self._reported.get(peer, self._began) > SILENT_S

    def _is_fresh(self, candidate: Seat) -> bool:
        return anyio.current_time() - self._heard.get(candidate.peer, -math.inf) < CANDIDATE_S

    def _take(self, seat: Seat) -> bool:
        """Note who sits where. Whether he is a worker with that: a founder, or one who returns."""
        peer, place = seat.peer, next((i for i, old in enumerate(self._seats) if old.peer == seat.peer), None)
        founds = place is None and self._share is None
        before = self._saved.get(peer)
        saved = (
            SavedSeat(len(self._saved), seat.to_value()) if before is None else replace(before, seat=seat.to_value())
        )
        self._save(peer, replace(saved, admitted=FROM_THE_START) if founds else saved)
        if founds:
            self._seats.append(seat)
        elif place is not None:
            self._seats[place] = seat
        else:
            self._candidates[peer], self._heard[peer] = seat, anyio.current_time()
        return founds or place is not None

    def _save(self, peer: PeerId, saved: SavedSeat) -> None:
        self._book.save_seats([saved])
        self._saved[peer] = saved

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

    def _offer(self, stage: int, returning: bool) -> dict[str, Any]:
        step, tokens_per_s = self._pace()
        members = (Member(stage=seat.stage, pace=self._paces.get(seat.peer)) for seat in self.seats)
        return {
            "stage": stage,
            "returning": returning,
            "phase": self.phase,
            "step": step,
            "tokens_per_s": tokens_per_s if math.isfinite(tokens_per_s) else 0.0,
            "now": int(self._clock.time()),
            "members": [member.model_dump() for member in members],
        }

    def _seat(self, peer: PeerId, stage: int, known: Seat | None, request: dict[str, Any]) -> Seat:
        """The seat that `peer` asks for, checked."""
        seat = Seat.from_value(request.get("seat"))
        if seat.peer != peer:
            raise Misbehaviour(f"the record names {seat.peer[:16]}…, the link is {peer[:16]}…'s")
        if seat.stage != stage:
            raise Conflict(f"stage {stage} is offered, not {seat.stage}: look again")
        seat.check(self.manifest.run_id)
        others = (other for other in (*self._seats, *self._past, *self._candidates.values()) if other.peer != peer)
        if seat.account in {other.account for other in others} or (known and seat.account != known.account):
            raise Conflict(f"{seat.account} is bound to another seat: one account, one seat, ever")
        return seat

    # --- the run ----------------------------------------------------------------------------------------------------

    async def _run(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        op, seat = request.get("op"), next((seat for seat in self._seats if seat.peer == peer), None)
        if seat is None and peer not in self._candidates:
            if any(past.peer == peer for past in self._past):
                return {"phase": "left"}, b""
            raise Refused("only seated workers may ask for the roster", rule="seated")
        if op == "changed":
            await self._follow_chain()
            return {}, b""
        if op == "roster":
            with anyio.move_on_after(LONG_POLL_S):
                await self._ready.wait()
            if peer in self._candidates:
                self._heard[peer] = anyio.current_time()
                await self._follow_chain()
            ready = self._ready.is_set()
            waiting = {"ready": False, "taken": len(self._seats)}
            return ({"ready": True, **self.roster().to_value()} if ready else waiting), b""
        if op == "report" and seat is not None:
            report = _parse_report(request.get("report"))
            self._reported[peer] = anyio.current_time()
            (self._leaving.add if report.leaving else self._leaving.discard)(peer)
            self._on_report(seat, report)
            if self.phase == "closed":
                self._told_closed.add(peer)
            return {"phase": self.phase, "roster": self.edition}, b""
        raise Invalid(f"unknown operation {str(op)[:40]!r}")

    async def _follow_chain(self) -> None:
        """Note who came and went, as the contract says. A chain that is away is asked again later."""
        async with self._following:
            try:
                await self._follow()
            except TesseraError as error:
                log.warning("chain_not_followed", code=error.code, reason=error.message)

    async def _follow(self) -> None:
        if self._share is None:
            return
        face = ModelShare(self._chain, self._share)
        for number in range(self._changes, await face.change_count()):
            joiner, leaver = await face.changes(number)
            came = next((seat for seat in self._candidates.values() if seat.account == joiner), None)
            went = next((seat for seat in self._seats if seat.account == leaver), None)
            if (came is None) != (joiner == NOBODY) or (went is None) != (leaver == NOBODY):
                log.warning("change_not_followed", number=number, joiner=joiner, leaver=leaver)
                return
            self._change(number, came, went)

    def _change(self, number: int, came: Seat | None, went: Seat | None) -> None:
        """On disk first, then in memory."""
        changed: dict[PeerId, SavedSeat] = {}
        if came is not None:
            changed[came.peer] = replace(self._saved[came.peer], admitted=number)
        if went is not None:
            changed[went.peer] = replace(self._saved[went.peer], left=number)
        self._book.save_seats(changed.values(), {"changes": str(number + 1)})
        self._saved |= changed
        self._changes = number + 1
        if came is not None:
            self._seats.append(self._candidates.pop(came.peer))
            log.info("worker_came", number=number, stage=came.stage, peer_id=came.peer)
        if went is not None:
            self._seats.remove(went)
            self._leaving.discard(went.peer)
            self._past.append(went)
            log.info("worker_went", number=number, stage=went.stage, peer_id=went.peer)

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
        share = self._book.fact("share")
        self._share = parse_account(share) if share else None
        self._changes = int(self._book.fact("changes") or 0)
        saved = self._book.seats()
        seats = {row.number: Seat.from_value(row.seat) for row in saved}
        self._saved = {seats[row.number].peer: row for row in saved}
        admitted = sorted((row.admitted, row.number) for row in saved if row.admitted is not None and row.left is None)
        left = sorted((row.left, row.number) for row in saved if row.left is not None)
        self._seats = [seats[number] for _, number in admitted]
        self._past = [seats[number] for _, number in left]
        self._candidates = {seats[row.number].peer: seats[row.number] for row in saved if row.admitted is None}
        if self._share is not None or len(self._seats) >= self._founders:
            self._full.set()


def _parse_report(value: object) -> WorkerReport:
    try:
        return WorkerReport.model_validate_json(json.dumps(value))
    except (ValidationError, TypeError) as error:
        raise Invalid(f"a report cannot be read: {error}") from error
