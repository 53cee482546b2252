"""The host opens a run: it seats workers, publishes the roster, passes their JSON-RPC on, and listens to their reports.

It has no say in who earned what: shares come from receipts and the workers' votes. Before anybody comes it deploys the
run's contract, and passes on to it what joiners bond; the contract draws their stages, one of the least served each
time. When every stage has as many as the manifest wants to begin with, the host deploys the share contract and begins
with exactly these. From then on workers come and go by the others' signatures, which the run's contract counts; the
host keeps a joiner's seat, and follows what the contract says.

Invariant: what a joiner has bonded stands on the chain, which is asked each time; so a host that stops anywhere, or a
joiner who does, bonds nobody twice and changes nobody's stage.

A seat stays with its peer, who gets it again when it comes back, until it has left; then it is gone for good. Seats are
given for invitations, which end, and can be taken back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import anyio
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.chain.authorization import Authorization
from tessera.chain.client import RpcChain
from tessera.chain.consent import NOBODY
from tessera.chain.faces import ModelShare, Run
from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Refused, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import Account, PeerId, parse_account
from tessera.core.signing import AccountKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.transport import Transport
from tessera.training.bond import Status, peer_bytes
from tessera.training.book import SavedSeat, SeatBook
from tessera.training.joining import Member, Pace, parse_pace
from tessera.training.manifest import MAX_WORKERS, Manifest
from tessera.training.payee import begin_split
from tessera.training.protocols import JOIN, RUN, SMALL
from tessera.training.roster import Roster, Seat
from tessera.training.terms import terms_of

__all__ = ["Phase", "RunHost", "WorkerReport"]

log = structlog.get_logger()

Phase = Literal["seating", "training", "paused", "serving", "closed"]
LONG_POLL_S = 5.0
SHARE_SYMBOL = "TSRA"
GAS_GRANT_WEI = 10**16  # sent once to each joiner's account where gas costs money
CANDIDATE_S = 3600  # as in contracts/run.vy: then a joiner whom the workers have not taken in may be given up
DRAW_TRIES, DRAW_S = 60, 1.0  # a draw waits for the next block
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
        operator: deploys the contracts and passes on who bonds; owns nothing by it.
        on_report: told of every report, with the seat that it came from.
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
        on_report: Callable[[Seat, WorkerReport], None],
        pace: Callable[[], tuple[int, float]],
        clock: Clock,
    ) -> None:
        self.manifest = manifest
        self.phase: Phase = "seating"
        self._transport, self._chain, self._coin, self._operator = transport, chain, coin, operator
        self._book, self._on_report, self._pace, self._clock = book, on_report, pace, clock
        self._seats: list[Seat] = []  # in the order of admission
        self._past: list[Seat] = []
        self._candidates: dict[PeerId, Seat] = {}  # whom the workers are to let in
        self._saved: dict[PeerId, SavedSeat] = {}
        self._changes = 0  # of the contract, that we have followed
        self._paces: dict[PeerId, Pace] = {}
        self._run_contract: Account | None = None
        self._share: Account | None = None
        self._full = anyio.Event()
        self._ready = anyio.Event()
        self._taking, self._following = anyio.Lock(), anyio.Lock()
        self._told_closed: set[PeerId] = set()
        try:
            self._load()
        except (TesseraError, ValueError, TypeError, KeyError) as error:
            raise Invalid(f"{book.shown} is damaged ({error}): restore it from your backup, or move it away") from error

    async def open(self) -> None:
        """Deploy the run's contract, unless an earlier start did, and answer joiners and workers.

        Raises: Conflict when an earlier start's contract has vanished with its chain; Invalid for a manifest of terms
        that the contract cannot take.
        """
        if self._run_contract is None:
            run_id = bytes.fromhex(self.manifest.run_id)
            face = await Run.deploy(self._chain, self._operator, self._coin, run_id, terms_of(self.manifest))
            self._book.save_fact("run", face.address)
            self._run_contract = face.address
        elif not await self._chain.code(self._run_contract):
            raise Conflict(
                f"the run contract {self._run_contract} is not on this chain: was the network reset? "
                "Start again with another --state-dir"
            )
        serve_calls(self._transport, JOIN, self._join, request_limit=SMALL)
        serve_calls(self._transport, RUN, self._run, request_limit=SMALL)

    async def seat_everyone(self) -> Roster:
        """Wait until every stage has its first workers and the run has begun on the chain; the complete roster."""
        await self._full.wait()
        if self._share is None:
            share = await self._begin()
            await begin_split(self._chain, self.manifest, self._contract.address, self._operator)
            self._book.save_seats((), {"share": share})
            self._share = share
        await self._follow_chain()
        self.phase = "training"
        self._ready.set()
        return self.roster()

    def roster(self) -> Roster:
        if self._share is None:
            raise Conflict(f"{len(self._seats)} of {self._founders} seats are taken")
        stages, seats, past = self.manifest.model.stages, tuple(self.seats), tuple(self._past)
        run = self._contract.address
        return Roster(self.manifest.run_id, stages, seats, run, self._share, self._coin, past, self._changes)

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
    def _contract(self) -> Run:
        if self._run_contract is None:
            raise Conflict("the host is not open yet")
        return Run(self._chain, self._run_contract)

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
            if any(seat.peer == peer for seat in self._past):
                raise Conflict("this peer has left the run: join again from another --state-dir, as somebody new")
            if known is None:
                self._check_invitation(invitation, peer)
            if op == "look":
                stages = [known.stage] if known is not None else await self._likely(peer)
                return self._offer(stages, known is not None), self.manifest.canonical
            if op == "bond":
                return {"stage": await self._bond(peer, request)}, self.manifest.canonical
            if op != "take":
                raise Invalid(f"unknown operation {str(op)[:40]!r}")
            seat, pace = await self._seat(peer, known, request), parse_pace(request.get("pace"))
            if pace is not None:
                self._paces[peer] = pace
            admitted = self._take(seat)
        if len(self._seats) >= self._founders:
            self._full.set()
        log.info("seat_taken", stage=seat.stage, peer_id=peer, account=seat.account, admitted=admitted)
        return {"admitted": admitted}, self.manifest.canonical

    async def _likely(self, peer: PeerId) -> list[int]:
        """The stage that is drawn for `peer`, or those of which a draw gives one now.

        Raises: Conflict when there is no room.
        """
        account = self._book.fact(f"account {peer}")
        if account and (member := await self._member(parse_account(account))).status >= Status.DRAWN:
            return [member.stage]
        served = await self._served()
        if self._is_full(served):
            await self._give_up_the_late()
            served = await self._served()
        if self._is_full(served):
            raise Conflict(f"all {sum(served)} seats of this run are taken: ask its host to tell you when one is free")
        return [stage for stage, count in enumerate(served) if count == min(served)]

    def _is_full(self, served: list[int]) -> bool:
        if self._share is None:
            return sum(served) >= self._founders
        return min(served) >= self.manifest.most_replicas or len(self._seats) >= MAX_WORKERS

    async def _served(self) -> list[int]:
        """By stage: who is there, or bonded on his way there, and stays."""
        return [await self._contract.served(stage) for stage in range(self.manifest.model.stages)]

    async def _bond(self, peer: PeerId, request: dict[str, Any]) -> int | None:
        """Pass on what the joiner signed, and have his stage drawn; None while his stake is still to come.

        Whoever has bonded before is told his stage again.
        """
        account, value = parse_account(request.get("account")), request.get("authorization")
        member = await self._member(account)
        if member.status == Status.NOBODY:
            await self._give_up_the_late()
            await self._likely(peer)  # before he pays for nothing
            self._book.use_invitation(str(request.get("invitation")), peer, int(self._clock.time()))
            await self._remember(peer, account)
            paid = Authorization(0, bytes(65)) if value is None else Authorization.from_value(value)
            if value is None and self.manifest.settlement.stake_units > 0:
                return None
            await self._contract.bond(self._operator, account, peer_bytes(peer), 0, paid.valid_before, *paid.vrs)
            log.info("bonded", peer_id=peer, account=account, units=self.manifest.settlement.stake_units)
            member = await self._member(account)
        if member.peer != peer_bytes(peer):
            raise Conflict(f"{account} is bonded for another peer: one account, one seat, ever")
        if member.status == Status.BONDED:
            member = await self._draw(account)
        return member.stage

    async def _draw(self, account: Account) -> Run.Member:
        """Raises: Late when no block comes."""
        for _ in range(DRAW_TRIES):
            try:
                await self._contract.draw(self._operator, account)
            except Refused as error:
                if error.rule != "run: too early to draw":
                    raise
            if (member := await self._member(account)).status == Status.DRAWN:
                return member
            await anyio.sleep(DRAW_S)
        raise Late(f"no stage was drawn for {account} within {DRAW_TRIES * DRAW_S:.0f} s: ask again")

    async def _member(self, account: Account) -> Run.Member:
        """What the contract says of him. Raises: Conflict for who has left, or was given up."""
        member = await self._contract.members(account)
        if member.status > Status.LEAVING:
            raise Conflict(f"{account} has left the run: join again from another --state-dir, as somebody new")
        return member

    async def _give_up_the_late(self) -> None:
        """Free the stages of joiners whom the workers have not taken in for an hour; founders wait for the start."""
        waiting = {seat.account for seat in (*self._seats, *self._past)}
        for account in map(parse_account, self._book.facts("account ").values()):
            if account in waiting:
                continue
            member = await self._contract.members(account)
            if member.status in (Status.BONDED, Status.DRAWN) and member.since + CANDIDATE_S < self._clock.time():
                await self._contract.expire(self._operator, account)
                log.info("joiner_given_up", account=account, stage=member.stage)

    async def _remember(self, peer: PeerId, account: Account) -> None:
        """Whose peer this is, and once, where gas costs money, some for what he sends himself: his admission, say."""
        if self._book.fact(f"account {peer}") is None and await self._chain.gas_price() > 0:
            await self._chain.fund(self._operator, account, GAS_GRANT_WEI)
        self._book.save_fact(f"account {peer}", account)

    def _take(self, seat: Seat) -> bool:
        """Note who sits where. Whether he is a worker with that: a founder, or one who returns."""
        peer, place = seat.peer, next((i for i, old in enumerate(self._seats) if old.peer == seat.peer), None)
        here = sum(old.stage == seat.stage for old in self._seats)
        founds = place is None and self._share is None and here < self.manifest.replicas
        before = self._saved.get(peer)
        saved = (
            SavedSeat(len(self._saved), seat.to_value()) if before is None else replace(before, seat=seat.to_value())
        )
        self._save(peer, replace(saved, admitted=FROM_THE_START) if founds else saved)
        if founds:
            self._seats.append(seat)
            self._candidates.pop(peer, None)
        elif place is not None:
            self._seats[place] = seat
        else:
            self._candidates[peer] = seat
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

    def _offer(self, stages: list[int], returning: bool) -> dict[str, Any]:
        step, tokens_per_s = self._pace()
        members = (Member(stage=seat.stage, pace=self._paces.get(seat.peer)) for seat in self.seats)
        return {
            "stages": stages,
            "run": self._contract.address,
            "coin": self._coin,
            "returning": returning,
            "phase": self.phase,
            "step": step,
            "tokens_per_s": tokens_per_s if math.isfinite(tokens_per_s) else 0.0,
            "now": int(self._clock.time()),
            "members": [member.model_dump() for member in members],
        }

    async def _seat(self, peer: PeerId, known: Seat | None, request: dict[str, Any]) -> Seat:
        """The seat that `peer` asks for, checked."""
        seat = Seat.from_value(request.get("seat"))
        if seat.peer != peer:
            raise Misbehaviour(f"the record names {seat.peer[:16]}…, the link is {peer[:16]}…'s")
        seat.check(self.manifest.run_id)
        others = (other for other in (*self._seats, *self._past, *self._candidates.values()) if other.peer != peer)
        if seat.account in {other.account for other in others} or (known and seat.account != known.account):
            raise Conflict(f"{seat.account} is bound to another seat: one account, one seat, ever")
        member = await self._member(seat.account)
        if member.status < Status.DRAWN or (member.stage, member.peer) != (seat.stage, peer_bytes(peer)):
            raise Conflict(f"the contract has not drawn stage {seat.stage} for {seat.account} and its peer: bond first")
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
                await self._follow_chain()
            ready = self._ready.is_set()
            waiting = {"ready": False, "taken": len(self._seats)}
            return ({"ready": True, **self.roster().to_value()} if ready else waiting), b""
        if op == "report" and seat is not None:
            report = _parse_report(request.get("report"))
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
        face = self._contract
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
            self._past.append(went)
            log.info("worker_went", number=number, stage=went.stage, peer_id=went.peer)

    async def _begin(self) -> Account:
        """The share contract that our founders work for. One that an earlier start began with is found again."""
        run = self._contract
        if (begun := await run.share()) != NOBODY:
            return begun
        run_id, name = bytes.fromhex(self.manifest.run_id), self.manifest.name
        share = await ModelShare.deploy(
            self._chain, self._operator, name, SHARE_SYMBOL, self._coin, run_id, run.address
        )
        await run.begin(self._operator, share.address, [seat.account for seat in self._seats])
        return share.address

    def _load(self) -> None:
        run, share = self._book.fact("run"), self._book.fact("share")
        self._run_contract = parse_account(run) if run else None
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
