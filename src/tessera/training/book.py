"""What a run's members keep on disk: a worker's receipts, verdicts and epochs; the host's seats, facts and invitations.

Both books are called from the event loop: a commit takes well under a millisecond on SQLite (a killed process loses
nothing; a power cut at most the last steps, which are replayed from the checkpoint and signed again).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    ForeignKey,
    MetaData,
    String,
    Table,
    insert,
    select,
    text,
    update,
)

from tessera.core.errors import Conflict, Missing, Unavailable
from tessera.core.ids import PeerId, RunId
from tessera.storage.database import Database, Transaction, open_database
from tessera.storage.layout import Layout
from tessera.training.audit import Verdict
from tessera.training.receipts import Receipt

__all__ = ["ReceiptBook", "SavedInvitation", "SavedSeat", "SeatBook"]

_RECEIPT_TABLES = MetaData()
_RECEIPTS = Table(
    "receipts",
    _RECEIPT_TABLES,
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("worker", String, primary_key=True),
    Column("signer", String, primary_key=True),
    Column("direction", String, primary_key=True),
    Column("microbatches", String, primary_key=True),  # a bitmap, in hex
    Column("digest", String, nullable=False),
    Column("version", String, nullable=False),
    Column("signature", String, nullable=False),
    sqlite_with_rowid=False,
)
_VERDICTS = Table(
    "verdicts",
    _RECEIPT_TABLES,
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("worker", String, primary_key=True),
    Column("place", BigInteger, primary_key=True, autoincrement=False),  # the microbatch; -1 = the whole step
    Column("auditor", String, primary_key=True),
    Column("row", String, nullable=False),  # JSON, as it travels
    sqlite_with_rowid=False,
)
_EPOCHS = Table(
    "epochs",
    _RECEIPT_TABLES,
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("leaves", String, nullable=False),
)


def _forget_receipts_for_tokens(connection: Connection) -> None:
    """Receipts of layout 1 were signed over a number of tokens, in runs that no program of this layout goes on with."""
    connection.execute(text("DROP TABLE receipts"))
    _RECEIPTS.create(connection)


def _add_verdicts(connection: Connection) -> None:
    """Layout 2 knew no audits."""
    _VERDICTS.create(connection)


_RECEIPT_LAYOUT = Layout("receipts", _RECEIPT_TABLES, (_forget_receipts_for_tokens, _add_verdicts))
_FIELDS = [column.name for column in _RECEIPTS.columns]

_SEAT_TABLES = MetaData()
_SEATS = Table(
    "seats",
    _SEAT_TABLES,
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # in the order in which they were given
    Column("seat", String, nullable=False),  # JSON
    Column("admitted", BigInteger),  # by which change of the contract; -1 = from the start, none = not yet
    Column("left", BigInteger),  # by which change of the contract; none = not yet
)
_FACTS = Table("facts", _SEAT_TABLES, Column("name", String, primary_key=True), Column("value", String, nullable=False))
_INVITATIONS = Table(
    "invitations",
    _SEAT_TABLES,
    Column("id", String, primary_key=True),
    Column("seats", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),  # seconds since 1970
    Column("revoked", Boolean, nullable=False),
    Column("label", String, nullable=False),
)
_USES = Table(
    "invitation_uses",
    _SEAT_TABLES,
    Column("invitation", String, ForeignKey("invitations.id"), primary_key=True),
    Column("peer", String, primary_key=True),
    Column("at", BigInteger, nullable=False),  # seconds since 1970
)


def _forget_seats_by_stage(connection: Connection) -> None:
    """Layout 1 kept one seat for each stage, bound without the stage, of runs whose contract knew handovers only."""
    connection.execute(text("DROP TABLE handovers"))
    connection.execute(text("DROP TABLE seats"))
    _SEATS.create(connection)


_SEAT_LAYOUT = Layout("seats", _SEAT_TABLES, (_forget_seats_by_stage,))


class ReceiptBook:
    """The receipts that this worker holds, on disk: for his own work, and those that he signed for his neighbours; and
    verdicts: all of his own, and what others found against somebody.

    A signer's first receipt for a (step, worker, direction, microbatches) stays. A step that is done again, with other
    microbatches perhaps, adds receipts; `credited` pays nothing twice. An auditor's first verdict on a (step, worker,
    microbatch) stays.

    Args:
        where: a file or a database's URL; `schema` is the name-space in it, one for each run and worker.

    Raises: Invalid for a damaged file, named; after `close`, every call raises Unavailable.
    """

    def __init__(self, where: str | Path, *, schema: str = "") -> None:
        self._database: Database | None = open_database(where, _RECEIPT_LAYOUT, schema=schema)

    def add(self, receipts: Iterable[Receipt]) -> None:
        """All of them or, when the disk fails, none."""
        rows = [dict(zip(_FIELDS, receipt.to_row(), strict=True)) for receipt in receipts]
        if rows:
            self._db.apply(lambda db: db.add(_RECEIPTS, rows))

    def of_steps(self, run_id: RunId, steps: range) -> list[Receipt]:
        """In order of step, worker and direction."""
        step = _RECEIPTS.c.step
        query = select(_RECEIPTS).where(step >= steps.start, step < steps.stop)
        with self._db.read() as db:
            rows = db.execute(query.order_by(*_RECEIPTS.primary_key)).all()
        return [Receipt.from_row(run_id, list(row)) for row in rows]

    def add_verdicts(self, verdicts: Iterable[Verdict]) -> None:
        """All of them or, when the disk fails, none."""
        rows: list[dict[str, str | int]] = []
        for verdict in verdicts:
            lot, row = verdict.draw, json.dumps(verdict.to_row())
            place = -1 if lot.index is None else lot.index
            rows.append({"step": lot.step, "worker": lot.worker, "place": place, "auditor": lot.auditor, "row": row})
        if rows:
            self._db.apply(lambda db: db.add(_VERDICTS, rows))

    def verdicts(self, run_id: RunId, steps: range) -> list[Verdict]:
        """In order of step, worker, microbatch and auditor."""
        step = _VERDICTS.c.step
        query = select(_VERDICTS.c.row).where(step >= steps.start, step < steps.stop)
        with self._db.read() as db:
            rows = db.execute(query.order_by(*_VERDICTS.primary_key)).scalars().all()
        return [Verdict.from_row(run_id, json.loads(row)) for row in rows]

    def save_epoch(self, epoch: int, leaves: str) -> None:
        self._db.apply(lambda db: db.put(_EPOCHS, [{"epoch": epoch, "leaves": leaves}]))

    def epoch(self, epoch: int) -> str | None:
        with self._db.read() as db:
            leaves = db.execute(select(_EPOCHS.c.leaves).where(_EPOCHS.c.epoch == epoch)).scalar()
        return None if leaves is None else str(leaves)

    def close(self) -> None:
        """Let go of the file. Whoever asks afterwards, a peer perhaps, hears `Unavailable`."""
        if self._database is not None:
            self._database.close()
            self._database = None

    @property
    def _db(self) -> Database:
        if self._database is None:
            raise Unavailable("the receipt book is closed: this worker is leaving")
        return self._database


@dataclass(frozen=True, slots=True)
class SavedSeat:
    """A seat as the host keeps it."""

    number: int  # in the order in which they were given
    seat: Any  # what JSON holds
    admitted: int | None = None  # by which change of the contract; -1 = from the start, None = not yet
    left: int | None = None  # by which change of the contract; None = not yet


@dataclass(frozen=True, slots=True)
class SavedInvitation:
    """An invitation as the host keeps it."""

    id: str
    seats: int  # how many peers may use it
    expires: int  # seconds since 1970
    revoked: bool
    label: str  # the host's own note
    users: tuple[PeerId, ...]  # in the order in which they came


class SeatBook:
    """The host's state: a restart keeps seats, facts (texts by name) and invitations.

    What seats hold is JSON, which the host reads and checks.

    Args:
        where: a file or a database's URL; `schema` is the name-space in it, one for each run.

    Raises: Invalid for a damaged file, named; after `close`, every call raises Unavailable.
    """

    def __init__(self, where: str | Path, *, schema: str = "") -> None:
        self._db = open_database(where, _SEAT_LAYOUT, schema=schema)

    @property
    def shown(self) -> str:
        """What to call it in messages."""
        return self._db.shown

    def seats(self) -> list[SavedSeat]:
        """In the order in which they were given. Raises: ValueError for what is no JSON."""
        with self._db.read() as db:
            rows = db.execute(select(_SEATS).order_by(_SEATS.c.number)).all()
        return [SavedSeat(row.number, json.loads(row.seat), row.admitted, row.left) for row in rows]

    def save_seats(self, seats: Iterable[SavedSeat], facts: Mapping[str, str] | None = None) -> None:
        """Seats and what belongs to them: all are kept, or nothing is. Saved again, nothing changes."""
        rows = [{**asdict(seat), "seat": json.dumps(seat.seat)} for seat in seats]
        named = [{"name": name, "value": value} for name, value in (facts or {}).items()]

        def work(db: Transaction) -> None:
            db.put(_SEATS, rows)
            db.put(_FACTS, named)

        self._db.apply(work)

    def fact(self, name: str) -> str | None:
        with self._db.read() as db:
            value = db.execute(select(_FACTS.c.value).where(_FACTS.c.name == name)).scalar()
        return None if value is None else str(value)

    def facts(self, prefix: str) -> dict[str, str]:
        """Those whose name begins so."""
        with self._db.read() as db:
            rows = db.execute(select(_FACTS).where(_FACTS.c.name.startswith(prefix, autoescape=True))).all()
        return {row.name: row.value for row in rows}

    def save_fact(self, name: str, value: str) -> None:
        self._db.apply(lambda db: db.put(_FACTS, [{"name": name, "value": value}]))

    def save_invitation(self, id: str, seats: int, expires: int, label: str = "") -> None:
        """Raises: Conflict when there is one of this id."""
        row = {"id": id, "seats": seats, "expires": expires, "revoked": False, "label": label}
        self._db.apply(lambda db: db.execute(insert(_INVITATIONS), row))

    def revoke_invitation(self, id: str) -> None:
        """Nobody new gets in with it. Raises: Missing when there is none of this id."""
        statement = update(_INVITATIONS).where(_INVITATIONS.c.id == id).values(revoked=True)
        revoked = statement.returning(_INVITATIONS.c.id)
        if self._db.apply(lambda db: db.execute(revoked).first()) is None:
            raise Missing(f"there is no invitation {id[:40]!r}")

    def use_invitation(self, id: str, peer: PeerId, at: int) -> None:
        """Count `peer` among its users; who is counted already may come again.

        Never more users than seats, also where two processes are asked at once.

        Args:
            at: now, in seconds since 1970.

        Raises: Missing when there is none of this id; Conflict when others use all its seats.
        """

        def work(db: Transaction) -> None:
            known = _invitation(db, id)
            if known is None:
                raise Missing(f"there is no invitation {id[:40]!r}")
            if peer in known.users:
                return
            if len(known.users) >= known.seats:
                raise Conflict(f"all {known.seats} seats of this invitation are used")
            db.execute(insert(_USES), {"invitation": id, "peer": peer, "at": at})

        self._db.apply(work)

    def invitation(self, id: str) -> SavedInvitation | None:
        with self._db.read() as db:
            return _invitation(db, id)

    def invitations(self) -> list[SavedInvitation]:
        """All; the first to expire comes first."""
        query = select(_INVITATIONS.c.id).order_by(_INVITATIONS.c.expires, _INVITATIONS.c.id)
        with self._db.read() as db:
            found = [_invitation(db, row.id) for row in db.execute(query).all()]
        return [invitation for invitation in found if invitation is not None]

    def close(self) -> None:
        self._db.close()


def _invitation(db: Transaction, id: str) -> SavedInvitation | None:
    row = db.execute(select(_INVITATIONS).where(_INVITATIONS.c.id == id)).one_or_none()
    if row is None:
        return None
    users = select(_USES.c.peer).where(_USES.c.invitation == id).order_by(_USES.c.at, _USES.c.peer)
    return SavedInvitation(**row._mapping, users=tuple(PeerId(use.peer) for use in db.execute(users)))
