"""The roster: who holds which stage, and which account is paid for it.

A seat is bound by two signatures: the peer proves itself when it dials, and the account signs the peer's id. So neither
the host nor another peer can put somebody else's account in a worker's place without being seen by that worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, Missing
from tessera.core.hashing import keccak
from tessera.core.ids import Account, PeerId, RunId, parse_account, parse_run_id
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.transport import PeerRecord
from tessera.training.home import write_atomic
from tessera.training.manifest import MANIFEST_LIMIT, Manifest, load_manifest

__all__ = ["Roster", "Seat", "recall_run", "remember_run", "seat_binding"]


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
class Roster:
    """All seats of a run, in order of stage, and where its shares and its coin are."""

    run_id: RunId
    seats: tuple[Seat, ...]
    share: Account
    coin: Account

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

    def same_run(self, other: Roster) -> bool:
        """Whether both name the same workers, contract and coin; addresses may differ."""
        mine, his = (
            (roster.run_id, roster.peers, roster.accounts, roster.share, roster.coin) for roster in (self, other)
        )
        return mine == his

    def to_value(self) -> dict[str, Any]:
        return {"seats": [seat.to_value() for seat in self.seats], "share": self.share, "coin": self.coin}

    @classmethod
    def from_value(cls, run_id: RunId, stages: int, value: object) -> Roster:
        """From the host. Raises `Invalid` or `Misbehaviour` unless it is complete and every seat is signed."""
        if not isinstance(value, dict):
            raise Invalid(f"a roster is an object, not a {type(value).__name__}")
        rows = value.get("seats")
        if not isinstance(rows, list) or len(rows) != stages:
            raise Invalid(f"a roster of {stages} stages has {stages} seats")
        seats = tuple(Seat.from_value(row) for row in rows)
        if [seat.stage for seat in seats] != list(range(stages)) or len({seat.peer for seat in seats}) != stages:
            raise Misbehaviour("the roster does not seat one peer at each stage")
        if len({seat.account for seat in seats}) != stages:
            raise Misbehaviour("the roster names an account twice: one account, one stage")
        for seat in seats:
            seat.check(run_id)
        return cls(run_id, seats, parse_account(value.get("share")), parse_account(value.get("coin")))


def remember_run(folder: Path, manifest: Manifest, roster: Roster) -> None:
    """Keep what outlives the run's host: its manifest, and where its shares are."""
    write_atomic(folder / "manifest.json", manifest.canonical)
    write_atomic(folder / "roster.json", encoding.encode(roster.to_value()))


def recall_run(folder: Path) -> tuple[Manifest, Roster]:
    """What `remember_run` kept. Raises `Missing` when this run was never seated here, `Invalid` when it is damaged."""
    try:
        manifest = load_manifest((folder / "manifest.json").read_bytes(), parse_run_id(folder.name))
        value = encoding.decode((folder / "roster.json").read_bytes(), MANIFEST_LIMIT * 16)
        return manifest, Roster.from_value(manifest.run_id, manifest.model.stages, value)
    except FileNotFoundError as error:
        raise Missing(f"run {folder.name[:16]}… was never seated in this state directory") from error


def _binding_digest(run_id: RunId, peer: PeerId) -> bytes:
    return keccak(b"tessera/seat\0" + encoding.encode({"run_id": run_id, "peer": peer}))
