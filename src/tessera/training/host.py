"""The host opens a run: it seats workers, publishes the roster, passes their JSON-RPC on, and listens to their reports.

It has no say in who earned what: shares come from receipts and the workers' votes. A seat, once taken, stays with its
peer; a peer that comes back gets its seat again. When the last seat is taken, the host deploys the share contract for
exactly these workers.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.chain.client import RpcChain
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import Account, PeerId, parse_account
from tessera.core.signing import AccountKey
from tessera.p2p.calls import serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.manifest import Manifest
from tessera.training.protocols import JOIN, RUN, SMALL
from tessera.training.roster import Roster, Seat

__all__ = ["Phase", "RunHost", "WorkerReport"]

log = structlog.get_logger()

Phase = Literal["seating", "training", "serving", "closed"]
LONG_POLL_S = 5.0
SHARE_SYMBOL = "TSRA"
GAS_GRANT_WEI = 10**16  # sent to each worker's account where gas costs money


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


class RunHost:
    """Serves one run on `transport`. State lies in `file` (SQLite), so a restart keeps seats and contract.

    Args:
        operator: pays for the deployment; owns nothing by it.
        on_report: told of every report, with the stage that it came from.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        transport: Transport,
        chain: RpcChain,
        coin: Account,
        operator: AccountKey,
        file: Path,
        on_report: Callable[[int, WorkerReport], None],
    ) -> None:
        self.manifest = manifest
        self.phase: Phase = "seating"
        self._transport, self._chain, self._coin, self._operator = transport, chain, coin, operator
        self._on_report = on_report
        self._seats: dict[int, Seat] = {}
        self._share: Account | None = None
        self._full = anyio.Event()
        self._ready = anyio.Event()
        self._told_closed: set[PeerId] = set()
        self._db = _open(file)
        try:
            self._load()
        except (TesseraError, ValueError, sqlite3.DatabaseError) as error:
            self._db.close()
            raise Invalid(f"{file} is damaged ({error}): restore it from your backup, or move it away") from error

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
            self._db.execute("insert or replace into facts values('share', ?)", (self._share,))
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
        seats = tuple(self._seats[stage] for stage in sorted(self._seats))
        return Roster(self.manifest.run_id, seats, self._share, self._coin)

    @property
    def seats(self) -> list[Seat]:
        return [self._seats[stage] for stage in sorted(self._seats)]

    @property
    def edition(self) -> str:
        """Changes when a seat is taken or a peer comes back at another address: then the workers ask again."""
        return sha256(encoding.encode([seat.to_value() for seat in self.seats])).hex()[:16]

    async def close(self, patience_s: float = 3.0) -> None:
        """Tell the workers that the host leaves, and wait a little until each has heard it."""
        self.phase = "closed"
        peers = {seat.peer for seat in self._seats.values()}
        try:
            with anyio.move_on_after(patience_s):
                while not peers <= self._told_closed:
                    await anyio.sleep(0.05)
        finally:
            self._db.close()

    # --- answers ----------------------------------------------------------------------------------------------------

    async def _join(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if request.get("run_id") != self.manifest.run_id:
            raise Conflict(
                f"this host runs {self.manifest.run_id[:16]}…: the ticket is for another run, ask for a new one"
            )
        if self.phase == "closed":
            raise Conflict(f"the run {self.manifest.name!r} is closed: its host is leaving")
        seat = self._take_seat(peer, request)
        self._db.execute("insert or replace into seats values(?, ?)", (seat.stage, json.dumps(seat.to_value())))
        self._seats[seat.stage] = seat
        if len(self._seats) == self.manifest.model.stages:
            self._full.set()
        log.info("seat_taken", stage=seat.stage, peer_id=peer, account=seat.account)
        return {"stage": seat.stage}, self.manifest.canonical

    def _take_seat(self, peer: PeerId, request: dict[str, Any]) -> Seat:
        record = PeerRecord.from_text(request.get("record"))
        if record.id != peer:
            raise Misbehaviour(f"the record names {record.id[:16]}…, the link is {peer[:16]}…'s")
        mine = [seat.stage for seat in self._seats.values() if seat.peer == peer]
        free = [stage for stage in range(self.manifest.model.stages) if stage not in self._seats]
        if not mine and not free:
            raise Conflict(f"all {self.manifest.model.stages} seats of this run are taken")
        account, binding = parse_account(request.get("account")), request.get("binding")
        stage = (mine or free)[0]
        seat = Seat.from_value({"stage": stage, "record": record.to_text(), "account": account, "binding": binding})
        seat.check(self.manifest.run_id)
        taken = {other.account for other in self._seats.values() if other.stage != stage}
        if account in taken or (mine and account != self._seats[stage].account):
            raise Conflict(f"{account} is bound to another seat: one account, one stage")
        return seat

    async def _run(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        stage = next((seat.stage for seat in self._seats.values() if seat.peer == peer), None)
        if stage is None:
            raise Refused("only seated workers may ask for the roster", rule="seated")
        if request.get("op") == "roster":
            with anyio.move_on_after(LONG_POLL_S):
                await self._ready.wait()
            ready = self._ready.is_set()
            waiting = {"ready": False, "taken": len(self._seats)}
            return ({"ready": True, **self.roster().to_value()} if ready else waiting), b""
        if request.get("op") == "report":
            self._on_report(stage, _parse_report(request.get("report")))
            if self.phase == "closed":
                self._told_closed.add(peer)
            return {"phase": self.phase, "roster": self.edition}, b""
        raise Invalid(f"unknown operation {str(request.get('op'))[:40]!r}")

    async def _deploy(self) -> Account:
        accounts = [self._seats[stage].account for stage in sorted(self._seats)]
        if await self._chain.gas_price() > 0:
            for account in accounts:
                await self._chain.fund(self._operator, account, GAS_GRANT_WEI)
        run_id = bytes.fromhex(self.manifest.run_id)
        return await self._chain.deploy(
            self._operator, "model_share", self.manifest.name, SHARE_SYMBOL, self._coin, run_id, accounts
        )

    def _load(self) -> None:
        for stage, text in self._db.execute("select stage, seat from seats"):
            self._seats[stage] = Seat.from_value(json.loads(text))
        row = self._db.execute("select value from facts where name = 'share'").fetchone()
        self._share = parse_account(row[0]) if row else None
        if len(self._seats) == self.manifest.model.stages:
            self._full.set()


def _parse_report(value: object) -> WorkerReport:
    try:
        return WorkerReport.model_validate_json(json.dumps(value))
    except (ValidationError, TypeError) as error:
        raise Invalid(f"a report cannot be read: {error}") from error


def _open(file: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(file, isolation_level=None)
        db.execute("pragma journal_mode=wal")
        db.executescript(
            """create table if not exists seats(stage integer primary key, seat text not null);
               create table if not exists facts(name text primary key, value text not null);"""
        )
    except sqlite3.DatabaseError as error:
        raise Invalid(f"{file} is damaged ({error}): restore it from your backup, or move it away") from error
    return db
