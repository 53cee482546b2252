"""The roster: who holds which stage, who held it before, and which account is paid for it.

A seat is bound by two signatures: the peer proves itself when it dials, and the account signs the peer's id. So neither
the host nor another peer can put somebody else's account in a worker's place without being seen by that worker. Whoever
leaves hands his stage over at a step that the share contract keeps, so that each step has one holder for each stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, Missing
from tessera.core.hashing import keccak
from tessera.core.ids import Account, PeerId, RunId, parse_account, parse_run_id
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.transport import PeerRecord
from tessera.training.home import write_atomic
from tessera.training.manifest import Manifest, load_manifest

__all__ = ["PastSeat", "Roster", "Seat", "recall_run", "remember_run", "seat_binding"]

MAX_PAST = 4096  # handovers in the life of a run
ROSTER_LIMIT = 8 << 20  # bytes: a seat has about 1 kB


def seat_binding(run_id: RunId, peer: PeerId, key: AccountKey) -> bytes:
    """The account's signature that says: in this run, `peer` works for me. 65 bytes."""
    return key.sign_digest(_binding_digest(run_id, peer))


@dataclass(frozen=True, slots=True)
class Seat:
    """One stage's holder."""

    stage: int
    record: PeerRecord
    account: Account
    binding: bytes

    @property
    def peer(self) -> PeerId:
        return self.record.id

    def check(self, run_id: RunId) -> None:
        """Raises `Misbehaviour` unless the account signed for this peer in this run."""
        try:
            signer = recover_account(_binding_digest(run_id, self.peer), self.binding)
        except Invalid as error:
            raise Misbehaviour(f"the seat of stage {self.stage} has no valid binding: {error}") from error
        if signer != self.account:
            raise Misbehaviour(f"the seat of stage {self.stage} names {self.account}, signed by {signer}")

    def to_value(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "record": self.record.to_text(),
            "account": self.account,
            "binding": self.binding.hex(),
        }

    @classmethod
    def from_value(cls, value: object) -> Seat:
        if not isinstance(value, dict) or value.keys() != {"stage", "record", "account", "binding"}:
            raise Invalid("a seat has the fields stage, record, account, binding")
        stage, binding = value["stage"], value["binding"]
        if type(stage) is not int or not 0 <= stage < 1024 or not isinstance(binding, str) or len(binding) != 130:
            raise Invalid("a seat has a stage from 0 and a binding of 65 bytes")
        try:
            signature = bytes.fromhex(binding)
        except ValueError as error:
            raise Invalid("a seat's binding is hex") from error
        return cls(stage, PeerRecord.from_text(value["record"]), parse_account(value["account"]), signature)


@dataclass(frozen=True, slots=True)
class PastSeat:
    """A seat whose holder has left: he is paid for the steps before `until_step`."""

    seat: Seat
    until_step: int

    def to_value(self) -> dict[str, Any]:
        return {"seat": self.seat.to_value(), "until_step": self.until_step}

    @classmethod
    def from_value(cls, value: object) -> PastSeat:
        """Raises `Invalid` for what is no past seat."""
        if not isinstance(value, dict) or value.keys() != {"seat", "until_step"}:
            raise Invalid("a past seat has the fields seat and until_step")
        until = value["until_step"]
        if type(until) is not int or not 0 <= until < 2**53:
            raise Invalid(f"a past seat ends at a step from 0, not {str(until)[:40]}")
        return cls(Seat.from_value(value["seat"]), until)


@dataclass(frozen=True, slots=True)
class Roster:
    """The seats of a run as they are now, in order of stage; those of the past, in the order in which they were handed
    over; and where its shares and its coin are."""

    run_id: RunId
    seats: tuple[Seat, ...]
    share: Account
    coin: Account
    past: tuple[PastSeat, ...] = ()

    @property
    def stages(self) -> int:
        return len(self.seats)

    def holder(self, stage: int) -> PeerRecord:
        """Whom to dial for `stage`."""
        return self.seats[stage].record

    @property
    def peers(self) -> list[PeerId]:
        return [seat.peer for seat in self.seats]

    @property
    def accounts(self) -> list[Account]:
        return [seat.account for seat in self.seats]

    @property
    def records(self) -> list[PeerRecord]:
        return [seat.record for seat in self.seats]

    def stage_of(self, peer: PeerId) -> int | None:
        return self.peers.index(peer) if peer in self.peers else None

    def at(self, step: int) -> tuple[Seat, ...]:
        """Who held each stage in `step`, for whom its receipts count."""
        held: dict[int, Seat] = {}
        for past in self.past:
            if step < past.until_step:
                held.setdefault(past.seat.stage, past.seat)
        return tuple(held.get(seat.stage, seat) for seat in self.seats)

    def spans(self, steps: range) -> list[tuple[range, tuple[Seat, ...]]]:
        """`steps` in pieces through which the holders stay the same."""
        cuts = {past.until_step for past in self.past if steps.start < past.until_step < steps.stop}
        bounds = [steps.start, *sorted(cuts), steps.stop]
        return [(range(a, b), self.at(a)) for a, b in itertools.pairwise(bounds)]

    def with_successor(self, successor: Seat, from_step: int) -> Roster:
        """The roster after `successor` has taken over his stage."""
        leaver = self.seats[successor.stage]
        seats = tuple(successor if seat.stage == successor.stage else seat for seat in self.seats)
        return replace(self, seats=seats, past=(*self.past, PastSeat(leaver, from_step)))

    def with_records(self, records: Iterable[PeerRecord]) -> Roster:
        """The roster with those of `records` that are newer than what it has of the same peer."""
        newer = {record.id: record for record in records}
        seats = [
            replace(seat, record=newer[seat.peer])
            if seat.peer in newer and newer[seat.peer].expires > seat.record.expires
            else seat
            for seat in self.seats
        ]
        return replace(self, seats=tuple(seats))

    def follows(self, other: Roster) -> bool:
        """Whether this is `other`, or what became of it by handovers alone. Addresses may differ."""
        if (self.run_id, self.share, self.coin) != (other.run_id, other.share, other.coin):
            return False
        handed = self.past[len(other.past) :]
        before = {seat.stage: seat for seat in self.seats}
        before |= {past.seat.stage: past.seat for past in reversed(handed)}  # the first leaver held it before
        mine = [_names(before[stage]) for stage in sorted(before)]
        return (
            [_names(past.seat) for past in self.past[: len(other.past)]] == [_names(past.seat) for past in other.past]
            and len(self.past) >= len(other.past)
            and mine == [_names(seat) for seat in other.seats]
        )

    def to_value(self) -> dict[str, Any]:
        value = {"seats": [seat.to_value() for seat in self.seats], "share": self.share, "coin": self.coin}
        return {**value, "past": [past.to_value() for past in self.past]}

    @classmethod
    def from_value(cls, run_id: RunId, stages: int, value: object) -> Roster:
        """From the host. Raises `Invalid` or `Misbehaviour` unless it is complete and every seat is signed."""
        if not isinstance(value, dict):
            raise Invalid(f"a roster is an object, not a {type(value).__name__}")
        rows, gone = value.get("seats"), value.get("past")
        if not isinstance(rows, list) or len(rows) != stages:
            raise Invalid(f"a roster of {stages} stages has {stages} seats")
        if not isinstance(gone, list) or len(gone) > MAX_PAST:
            raise Invalid(f"a roster has a list of at most {MAX_PAST} past seats")
        seats, past = tuple(Seat.from_value(row) for row in rows), tuple(PastSeat.from_value(row) for row in gone)
        if [seat.stage for seat in seats] != list(range(stages)) or len({seat.peer for seat in seats}) != stages:
            raise Misbehaviour("the roster does not seat one peer at each stage")
        if len({seat.account for seat in seats}) != stages:
            raise Misbehaviour("the roster names an account twice: one account, one stage")
        for seat in (*seats, *(past_seat.seat for past_seat in past)):
            seat.check(run_id)
        _check_past(past, stages)
        return cls(run_id, seats, parse_account(value.get("share")), parse_account(value.get("coin")), past)


def _check_past(past: tuple[PastSeat, ...], stages: int) -> None:
    ends = [0] * stages
    for gone in past:
        stage = gone.seat.stage
        if stage >= stages or gone.until_step < ends[stage]:
            raise Misbehaviour(f"the roster's past does not add up at stage {stage}, step {gone.until_step}")
        ends[stage] = gone.until_step


def _names(seat: Seat) -> tuple[int, PeerId, Account]:
    return seat.stage, seat.peer, seat.account


def remember_run(folder: Path, manifest: Manifest, roster: Roster) -> None:
    """Keep what outlives the run's host: its manifest, and where its shares are."""
    write_atomic(folder / "manifest.json", manifest.canonical)
    write_atomic(folder / "roster.json", encoding.encode(roster.to_value()))


def recall_run(folder: Path) -> tuple[Manifest, Roster]:
    """What `remember_run` kept. Raises `Missing` when this run was never seated here, `Invalid` when it is damaged."""
    try:
        manifest = load_manifest((folder / "manifest.json").read_bytes(), parse_run_id(folder.name))
        value = encoding.decode((folder / "roster.json").read_bytes(), ROSTER_LIMIT)
        return manifest, Roster.from_value(manifest.run_id, manifest.model.stages, value)
    except FileNotFoundError as error:
        raise Missing(f"run {folder.name[:16]}… was never seated in this state directory") from error


def _binding_digest(run_id: RunId, peer: PeerId) -> bytes:
    return keccak(b"tessera/seat\0" + encoding.encode({"run_id": run_id, "peer": peer}))
