"""The roster: who works at which stage, who did before, and which account is paid for whom.

Any number of workers share a stage. A seat is bound by two signatures: the peer proves itself when it dials, and the
account signs the peer's id and the stage. So neither the host nor another peer can put somebody else's account in a
worker's place, or a worker at another stage, without being seen. An account has one seat, a peer has one seat, ever;
who has left stays known, because what was signed for him or by him still counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, Missing, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account, PeerId, RunId, parse_account, parse_run_id
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.transport import PeerRecord
from tessera.training.home import write_atomic
from tessera.training.manifest import MAX_WORKERS, Manifest, load_manifest

__all__ = ["Roster", "Seat", "recall_run", "remember_run", "seat_binding"]

MAX_PAST = 4096  # workers who have left, in the life of a run
ROSTER_LIMIT = 8 << 20  # bytes: a seat has about 1 kB


def seat_binding(run_id: RunId, peer: PeerId, stage: int, key: AccountKey) -> bytes:
    """The account's signature that says: in this run, `peer` works for me at `stage`. 65 bytes."""
    return key.sign_digest(_binding_digest(run_id, peer, stage))


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker's place at a stage."""

    stage: int
    record: PeerRecord
    account: Account
    binding: bytes

    @property
    def peer(self) -> PeerId:
        return self.record.id

    def check(self, run_id: RunId) -> None:
        """Raises `Misbehaviour` unless the account signed for this peer and stage in this run."""
        try:
            signer = recover_account(_binding_digest(run_id, self.peer, self.stage), self.binding)
        except Invalid as error:
            raise Misbehaviour(f"a seat at stage {self.stage} has no valid binding: {error}") from error
        if signer != self.account:
            raise Misbehaviour(f"a seat at stage {self.stage} names {self.account}, signed by {signer}")

    def to_value(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "record": self.record.to_text(),
            "account": self.account,
            "binding": self.binding.hex(),
        }

    @classmethod
    def from_value(cls, value: object) -> Seat:
        """Raises `Invalid` for what is no seat. The binding is not checked here."""
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
class Roster:
    """A run's workers as they are now, by stage and then in the order in which they were admitted; those who have left,
    in the order in which they went; and where its contracts and its coin are.

    Attributes:
        stages: of the run's model; each has one worker at first. One that was left empty waits for the next who comes.
        changes: how many of the run contract's changes led here.
    """

    run_id: RunId
    stages: int
    seats: tuple[Seat, ...]
    run: Account
    share: Account
    coin: Account
    past: tuple[Seat, ...] = ()
    changes: int = 0

    @property
    def everyone(self) -> tuple[Seat, ...]:
        """Present and past."""
        return (*self.seats, *self.past)

    @property
    def peers(self) -> list[PeerId]:
        return [seat.peer for seat in self.seats]

    @property
    def accounts(self) -> list[Account]:
        return [seat.account for seat in self.seats]

    @property
    def records(self) -> list[PeerRecord]:
        return [seat.record for seat in self.seats]

    @property
    def stage_by_peer(self) -> dict[PeerId, int]:
        """Of present and past workers: for whom and by whom receipts count."""
        return {seat.peer: seat.stage for seat in self.everyone}

    def of_stage(self, stage: int) -> tuple[Seat, ...]:
        """Who works there now; who was admitted first comes first."""
        return tuple(seat for seat in self.seats if seat.stage == stage)

    def holders(self, stage: int) -> list[PeerRecord]:
        """Whom to dial for `stage`: any of them will do."""
        return [seat.record for seat in self.of_stage(stage)]

    def seat_of(self, peer: PeerId) -> Seat | None:
        """A present worker's."""
        return next((seat for seat in self.seats if seat.peer == peer), None)

    def stage_of(self, peer: PeerId) -> int | None:
        """A present worker's."""
        seat = self.seat_of(peer)
        return None if seat is None else seat.stage

    def admit(self, joiner: Seat) -> Roster:
        """The roster with `joiner`, the last of his stage. Raises `Refused` for who has, or had, a seat."""
        if any(joiner.peer == seat.peer or joiner.account == seat.account for seat in self.everyone):
            raise Refused(
                f"{joiner.account} or its peer has or had a seat: one account, one seat, ever", rule="one_seat"
            )
        return replace(self, seats=tuple(sorted((*self.seats, joiner), key=lambda seat: seat.stage)))

    def without(self, leaver: Account) -> Roster:
        """The roster once `leaver` has gone. Raises `Missing` for who has no seat."""
        gone = next((seat for seat in self.seats if seat.account == leaver), None)
        if gone is None:
            raise Missing(f"{leaver} has no seat in this run")
        seats = tuple(seat for seat in self.seats if seat is not gone)
        return replace(self, seats=seats, past=(*self.past, gone))

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

    def same_members(self, other: Roster) -> bool:
        """Whether the same workers have, and had, the same seats in the same order. Addresses may differ."""
        return [_names(self.seats), _names(self.past)] == [_names(other.seats), _names(other.past)]

    def follows(self, other: Roster) -> bool:
        """Whether this is `other`, or what became of it by admissions and departures alone. Addresses may differ.

        That these stand on the chain is checked by `contract.check_changes`.
        """
        if any(getattr(self, name) != getattr(other, name) for name in ("run_id", "stages", "run", "share", "coin")):
            return False
        if self.changes < other.changes:
            return False
        gone = set(_names(self.past))
        stayed = [name for name in _names(other.seats) if name not in gone]
        return (
            _names(self.past)[: len(other.past)] == _names(other.past)
            and [name for name in _names(self.seats) if name in set(stayed)] == stayed
            and (self.changes > other.changes or self.same_members(other))
        )

    def to_value(self) -> dict[str, Any]:
        return {
            "seats": [seat.to_value() for seat in self.seats],
            "past": [seat.to_value() for seat in self.past],
            "changes": self.changes,
            "run": self.run,
            "share": self.share,
            "coin": self.coin,
        }

    @classmethod
    def from_value(cls, run_id: RunId, stages: int, value: object) -> Roster:
        """From the host. Raises `Invalid` or `Misbehaviour` unless it is complete and every seat is signed."""
        if not isinstance(value, dict):
            raise Invalid(f"a roster is an object, not a {type(value).__name__}")
        rows, gone, changes = value.get("seats"), value.get("past"), value.get("changes")
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_WORKERS:
            raise Invalid(f"a roster has 1 to {MAX_WORKERS} seats")
        if not isinstance(gone, list) or len(gone) > MAX_PAST:
            raise Invalid(f"a roster has a list of at most {MAX_PAST} past seats")
        seats, past = (tuple(Seat.from_value(row) for row in part) for part in (rows, gone))
        if type(changes) is not int or not len(past) <= changes <= len(seats) + 2 * len(past):
            raise Invalid(f"{str(changes)[:40]} changes do not lead to {len(seats)} seats and {len(past)} past ones")
        _check_seats(run_id, stages, seats, past, begins=changes == 0)
        run, share, coin = (parse_account(value.get(name)) for name in ("run", "share", "coin"))
        return cls(run_id, stages, seats, run, share, coin, past, changes)


def _check_seats(run_id: RunId, stages: int, seats: tuple[Seat, ...], past: tuple[Seat, ...], *, begins: bool) -> None:
    at, everyone = [seat.stage for seat in seats], (*seats, *past)
    if at != sorted(at) or (begins and set(at) != set(range(stages))):
        raise Misbehaviour(f"the roster does not seat somebody at each of {stages} stages, in order")
    if len({seat.peer for seat in everyone}) != len(everyone):
        raise Misbehaviour("the roster names a peer twice: one peer, one seat, ever")
    if len({seat.account for seat in everyone}) != len(everyone):
        raise Misbehaviour("the roster names an account twice: one account, one seat, ever")
    for seat in everyone:
        if seat.stage >= stages:
            raise Misbehaviour(f"the roster names stage {seat.stage} of {stages}")
        seat.check(run_id)


def _names(seats: Iterable[Seat]) -> list[tuple[int, PeerId, Account]]:
    return [(seat.stage, seat.peer, seat.account) for seat in seats]


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


def _binding_digest(run_id: RunId, peer: PeerId, stage: int) -> bytes:
    return keccak(b"tessera/seat\0" + encoding.encode({"run_id": run_id, "peer": peer, "stage": stage}))
