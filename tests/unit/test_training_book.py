"""What a run's members keep on disk, on SQLite and PostgreSQL alike: receipts; seats, facts and invitations."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from tessera.core.errors import Conflict, Invalid, Missing, Unavailable
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.training.audit import Verdict, draw
from tessera.training.book import ReceiptBook, SavedInvitation, SavedSeat, SeatBook
from tessera.training.receipts import Receipt

RUN = RunId("7" * 64)
GUEST, OTHER, THIRD = (PeerId(digit * 64) for digit in "abc")
STEPS = range(3)
RECEIPTS = [
    Receipt(RUN, step, worker, signer, "forward", (0, 2), bytes([step]) * 32, bytes(32), bytes(64))
    for step in STEPS
    for worker, signer in ((GUEST, OTHER), (OTHER, THIRD), (THIRD, GUEST))
]


@pytest.fixture
def seats(database_url: str) -> Iterator[SeatBook]:
    book = SeatBook(database_url)
    yield book
    book.close()


def test_the_book_keeps_the_first_receipt_and_survives_reopening(database_url: str) -> None:
    book = ReceiptBook(database_url)
    book.add(RECEIPTS)
    book.add([replace(RECEIPTS[0], digest=b"\1" * 32)])
    again_done = replace(RECEIPTS[0], microbatches=(1, 2))
    book.add([again_done])
    book.add([])
    book.close()
    again = ReceiptBook(database_url)
    assert sorted(map(str, again.of_steps(RUN, STEPS))) == sorted(map(str, [*RECEIPTS, again_done]))
    assert {receipt.step for receipt in again.of_steps(RUN, range(1, 2))} == {1}
    assert not again.of_steps(RUN, range(9, 12))
    again.close()


def test_a_batch_with_one_receipt_that_cannot_be_kept_is_kept_not_at_all(database_url: str) -> None:
    book = ReceiptBook(database_url)
    with pytest.raises(Invalid):
        book.add([*RECEIPTS, replace(RECEIPTS[0], step=2**70)])
    assert book.of_steps(RUN, STEPS) == []
    book.close()


def test_an_auditors_first_verdict_on_a_place_stays(database_url: str) -> None:
    key, other = PeerKey(b"\1" * 32), PeerKey(b"\2" * 32)
    lots = [draw(key, RUN, 1, GUEST, 0), draw(key, RUN, 1, GUEST, None), draw(other, RUN, 2, GUEST, 0)]
    verdicts = [
        Verdict(lot, "failed", "code: off", bytes(32)).signed_by(k)
        for lot, k in zip(lots, (key, key, other), strict=True)
    ]
    book = ReceiptBook(database_url)
    book.add_verdicts(verdicts)
    book.add_verdicts([replace(verdicts[0], outcome="passed").signed_by(key)])
    book.close()
    again = ReceiptBook(database_url)
    assert again.verdicts(RUN, range(3)) == [verdicts[1], verdicts[0], verdicts[2]]
    assert again.verdicts(RUN, range(2, 3)) == [verdicts[2]]
    again.close()


def test_an_epochs_leaves_are_replaced(database_url: str) -> None:
    book = ReceiptBook(database_url)
    assert book.epoch(0) is None
    for leaves in ("[0,[]]", "[0,[1]]"):
        book.save_epoch(0, leaves)
    assert (book.epoch(0), book.epoch(1)) == ("[0,[1]]", None)
    book.close()


def test_two_runs_share_a_database_without_seeing_each_other(database_url: str) -> None:
    first, second = (ReceiptBook(database_url, schema=f"run_{name}") for name in "ab")
    first.add(RECEIPTS)
    assert second.of_steps(RUN, STEPS) == []
    first.close()
    second.close()


def test_whoever_asks_a_closed_book_hears_that_the_worker_leaves(tmp_path: Path) -> None:
    book = ReceiptBook(tmp_path / "book.sqlite")
    book.close()
    book.close()
    with pytest.raises(Unavailable, match="this worker is leaving"):
        book.epoch(0)


@pytest.mark.parametrize("make", [ReceiptBook, SeatBook])
def test_a_damaged_file_is_named(tmp_path: Path, make: type[ReceiptBook] | type[SeatBook]) -> None:
    (tmp_path / "book.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(Invalid, match=r"book\.sqlite is damaged"):
        make(tmp_path / "book.sqlite")


def test_a_steps_receipts_are_kept_within_a_millisecond(tmp_path: Path) -> None:
    book = ReceiptBook(tmp_path / "book.sqlite")
    took = []
    for step in range(100):
        batch = [replace(r, step=step, direction=d) for r in RECEIPTS[:3] for d in ("forward", "backward")]
        start = time.perf_counter()
        book.add(batch)
        took.append(time.perf_counter() - start)
    assert min(took) < 1e-3  # the least of many: the machine has other work
    book.close()


def test_seats_and_facts_survive_reopening(seats: SeatBook, database_url: str) -> None:
    first, second = SavedSeat(0, {"peer": GUEST}, admitted=-1), SavedSeat(1, {"peer": OTHER})
    seats.save_seats([second, first], {"share": "0x1"})
    admitted, gone = replace(second, admitted=0), replace(first, left=1)
    seats.save_seats([admitted, gone], {"share": "0x2", "changes": "2"})
    again = SeatBook(database_url)
    assert again.seats() == [gone, admitted]
    assert (again.fact("share"), again.fact("changes"), again.fact("coin")) == ("0x2", "2", None)
    again.close()


def test_a_change_is_kept_whole_or_not_at_all(seats: SeatBook) -> None:
    with pytest.raises(Invalid):
        seats.save_seats([SavedSeat(0, {"peer": GUEST}), SavedSeat(2**70, {"peer": OTHER})], {"changes": "1"})
    assert seats.seats() == []
    assert seats.fact("changes") is None


def test_a_seat_that_is_no_json_is_noticed(seats: SeatBook) -> None:
    seats.save_seats([SavedSeat(0, {})])
    with seats._db.transaction() as db:
        db.execute(text("update seats set seat = '{'"))
    with pytest.raises(json.JSONDecodeError):
        seats.seats()


def test_books_of_the_first_layout_are_brought_forward(database_url: str) -> None:
    """What they held of a run cannot be used any more; epochs, facts and invitations can."""
    book, host = ReceiptBook(database_url), SeatBook(database_url)
    book.save_epoch(0, "[0,[1]]")
    host.save_seats((), {"share": "0x1"})
    host.save_invitation("one", 2, 500)
    with host._db.transaction() as db:
        for table in ("receipts", "verdicts", "seats"):
            db.execute(text(f"drop table {table}"))
        db.execute(text("create table receipts (step bigint, tokens bigint)"))
        db.execute(text("create table seats (stage bigint, seat varchar)"))
        db.execute(text("create table handovers (number bigint, past varchar)"))
        db.execute(text("update layouts set version = 1"))
    book.close()
    host.close()
    book, host = ReceiptBook(database_url), SeatBook(database_url)
    assert book.epoch(0) == "[0,[1]]"
    book.add(RECEIPTS)
    assert len(book.of_steps(RUN, STEPS)) == len(RECEIPTS)
    assert (host.seats(), host.fact("share")) == ([], "0x1")
    assert [invitation.id for invitation in host.invitations()] == ["one"]
    book.close()
    host.close()


def test_an_invitation_counts_its_users_and_never_more_than_its_seats(seats: SeatBook) -> None:
    seats.save_invitation("one", 2, 500, "for the lab")
    seats.save_invitation("two", 1, 400)
    for at, peer in enumerate((OTHER, GUEST, OTHER)):  # who comes again is not counted again
        seats.use_invitation("one", peer, at)
    with pytest.raises(Conflict, match="all 2 seats"):
        seats.use_invitation("one", THIRD, 9)
    assert seats.invitation("one") == SavedInvitation("one", 2, 500, False, "for the lab", (OTHER, GUEST))
    assert [invitation.id for invitation in seats.invitations()] == ["two", "one"]


def test_an_invitation_is_revoked_for_good_and_an_unknown_one_is_missing(seats: SeatBook, database_url: str) -> None:
    seats.save_invitation("one", 2, 500)
    with pytest.raises(Conflict):
        seats.save_invitation("one", 9, 900)
    seats.revoke_invitation("one")
    again = SeatBook(database_url)
    known = again.invitation("one")
    assert known is not None
    assert (known.revoked, known.seats) == (True, 2)
    assert again.invitation("none") is None
    for act in (again.revoke_invitation, lambda id: again.use_invitation(id, GUEST, 1)):
        with pytest.raises(Missing):
            act("none")
    again.close()


def test_many_who_copied_one_invitation_get_its_seats_and_no_more(seats: SeatBook, database_url: str) -> None:
    seats.save_invitation("one", 2, 500)
    outcomes: list[bool] = []

    def join(peer: str) -> None:
        book = SeatBook(database_url)
        try:
            book.use_invitation("one", PeerId(peer * 64), 1)
            outcomes.append(True)
        except Conflict:
            outcomes.append(False)
        finally:
            book.close()

    threads = [threading.Thread(target=join, args=(peer,)) for peer in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = seats.invitation("one")
    assert known is not None
    assert (sorted(outcomes), len(known.users)) == ([False] * 4 + [True] * 2, 2)
