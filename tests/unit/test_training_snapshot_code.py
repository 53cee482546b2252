"""A snapshot's code: sealed and opened, what is wrong with it named, and headers that say nothing absurd."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from tessera.core.errors import Invalid, Misbehaviour, Missing, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import RunId
from tessera.training import erasure, snapshot_code
from tessera.training.snapshot_code import Sealed, open_snapshot, seal_snapshot
from tessera.training.snapshot_header import SEGMENT, Moment, SnapshotHeader, is_overtaken
from training_world import peer_keys

MAKER, *HOLDERS = peer_keys(6)
RUN = RunId("ab" * 32)
STATE = bytes(range(256)) * 40


def sealed(state: bytes = STATE, count: int = 5, needed: int = 3, **changed: Any) -> Sealed:
    given: dict[str, Any] = {"run_id": RUN, "stage": 1, "moment": Moment(7, 100), "key": MAKER, "secret": b"s" * 32}
    holders = [key.id for key in HOLDERS[:count]]
    return seal_snapshot(state, holders=holders, needed=needed, **{**given, **changed})


def opened(snapshot: Sealed, *numbers: int) -> bytes:
    fragments = {n: snapshot.fragments[n] for n in numbers}
    return open_snapshot(snapshot.header, fragments, {n: snapshot.shares[n] for n in numbers}).state


def test_a_state_of_several_segments_comes_back_from_parity_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("snapshot_code", "snapshot_header"):
        monkeypatch.setattr(f"tessera.training.{module}.SEGMENT", 1000)
    snapshot = sealed(STATE[:-7], count=5, needed=2)
    assert snapshot.header.segments == 11
    assert {len(fragment) for fragment in snapshot.fragments} == {snapshot.header.fragment_bytes}
    assert opened(snapshot, 2, 4) == STATE[:-7]


@pytest.mark.parametrize("size", [1, 2, SEGMENT, SEGMENT + 1])
def test_every_size_has_fragments_of_the_length_that_its_header_says(size: int) -> None:
    snapshot = sealed(bytes(size), count=3, needed=2)
    assert {len(fragment) for fragment in snapshot.fragments} == {snapshot.header.fragment_bytes}
    assert opened(snapshot, 1, 2) == bytes(size)


def test_all_of_all_needs_no_parity() -> None:
    snapshot = sealed(count=2, needed=2)
    assert opened(snapshot, 0, 1) == STATE
    with pytest.raises(Missing):
        opened(snapshot, 1)


def test_nothing_of_the_state_is_in_a_fragment() -> None:
    """The code is systematic: without encryption, the first k fragments would be the state itself."""
    snapshot = sealed()
    for fragment in snapshot.fragments:
        assert not any(STATE[i : i + 16] in fragment for i in range(256))
    assert sealed(STATE, secret=b"t" * 32).fragments[0] != snapshot.fragments[0]
    assert sealed(STATE, moment=Moment(7, 110)).fragments[0] != snapshot.fragments[0]


def test_too_few_pieces_are_missing_with_their_number() -> None:
    with pytest.raises(Missing) as caught:
        opened(sealed(), 0, 4)
    assert (caught.value.fields["have"], caught.value.fields["needed"]) == (2, 3)


def test_pieces_that_are_wrong_are_dropped_and_their_holders_named() -> None:
    snapshot = sealed()
    fragments, shares = dict(enumerate(snapshot.fragments)), dict(enumerate(snapshot.shares))
    fragments[1] = fragments[1][:-1] + bytes([fragments[1][-1] ^ 1])
    shares[3] = snapshot.shares[2]
    found = open_snapshot(snapshot.header, fragments, shares)
    assert found.state == STATE
    assert found.wrong == (HOLDERS[1].id, HOLDERS[3].id)
    del fragments[0], fragments[2]
    with pytest.raises(Misbehaviour) as caught:
        open_snapshot(snapshot.header, fragments, shares)
    assert caught.value.evidence["peers"] == [HOLDERS[1].id, HOLDERS[3].id]
    assert caught.value.fields["have"] == 2


def test_numbers_that_no_header_has_are_dropped() -> None:
    snapshot = sealed(count=3, needed=2)
    fragments, shares = dict(enumerate(snapshot.fragments)), dict(enumerate(snapshot.shares))
    found = open_snapshot(snapshot.header, {**fragments, 9: b"x", -1: fragments[2]}, {**shares, 7: "x"})
    assert (found.state, found.wrong) == (STATE, ())


def test_a_maker_whose_pieces_hold_another_state_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = sealed()
    other = sealed(STATE[::-1])
    for header in (
        replace(snapshot.header, state=sha256(b"another").hex()).signed_by(MAKER),  # the key is another then
        replace(snapshot.header, pieces=other.header.pieces).signed_by(MAKER),
        replace(snapshot.header, size=len(STATE) + 100).signed_by(MAKER),
    ):
        source = other if header.pieces == other.header.pieces else snapshot
        with pytest.raises(Misbehaviour, match="signed a snapshot") as caught:
            open_snapshot(header, dict(enumerate(source.fragments)), dict(enumerate(source.shares)))
        assert caught.value.evidence["peers"] == [MAKER.id]
    monkeypatch.setattr(snapshot_code, "_key", lambda secret, header: b"k" * 32)  # one who encrypts as he likes
    lying = sealed()
    header = replace(lying.header, state="00" * 32).signed_by(MAKER)
    with pytest.raises(Misbehaviour, match="another state"):
        open_snapshot(header, dict(enumerate(lying.fragments)), dict(enumerate(lying.shares)))


@pytest.mark.parametrize(
    "changed",
    [
        {"needed": 1},
        {"needed": 6},
        {"holders": [key.id for key in HOLDERS[:3]] + [HOLDERS[0].id]},
        {"holders": [MAKER.id, HOLDERS[0].id, HOLDERS[1].id]},
        {"holders": [bytes([i]).hex() * 32 for i in range(17)]},
        {"secret": b"short"},
        {"stage": -1},
        {"moment": Moment(0, 0)},
    ],
)
def test_a_snapshot_that_cannot_be_is_refused_by_its_maker(changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"run_id": RUN, "stage": 1, "moment": Moment(7, 100), "key": MAKER, "secret": b"s" * 32}
    holders = {"holders": [key.id for key in HOLDERS], "needed": 3}
    with pytest.raises(Invalid):
        seal_snapshot(STATE, **{**given, **holders, **changed})


def test_an_empty_state_is_refused() -> None:
    with pytest.raises(Invalid):
        sealed(b"")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("run_id", ["", 5, "AB" * 32]),
        ("stage", [-1, 1024, True, "1", None]),
        ("session", [-1, 2**53, 1.0]),
        ("step", [0, -5, 2**53, False]),
        ("size", [0, 2**41, "1"]),
        ("state", ["", "xy" * 32, None]),
        ("needed", [0, 1, 6, 2.0]),
        ("pieces", [None, [], {}, [["x"]], [None] * 5, [["ab" * 32, "cd" * 32, "ef" * 32]] * 5]),
        ("maker", [None, HOLDERS[0].id]),
        ("signature", ["", "00" * 64, None, 3]),
        ("other", [1]),
    ],
)
def test_a_header_with_an_absurd_field_is_refused(field: str, values: list[object]) -> None:
    header = sealed().header
    assert SnapshotHeader.from_value(header.to_value()) == header
    for value in values:
        with pytest.raises(Invalid):
            SnapshotHeader.from_value({**header.to_value(), field: value})


def test_a_header_is_signed_by_its_maker_alone() -> None:
    with pytest.raises(Invalid, match="maker"):
        sealed().header.signed_by(HOLDERS[0])
    with pytest.raises(Invalid):
        SnapshotHeader.from_value([])


def test_a_later_session_at_an_earlier_step_has_overtaken() -> None:
    assert is_overtaken(Moment(5, 150), [Moment(5, 100), Moment(6, 150)])
    assert not is_overtaken(Moment(5, 150), [Moment(4, 10), Moment(5, 10), Moment(6, 151)])
    assert max(Moment(5, 150), Moment(6, 110)) == Moment(6, 110)


# --- the code and the scheme ------------------------------------------------------------------------------------------


def test_a_code_takes_only_what_can_be_its_pieces() -> None:
    pieces = dict(enumerate(erasure.encode(STATE, 2, 4)))
    assert erasure.decode({1: pieces[1], 3: pieces[3]}, len(STATE), 2, 4) == STATE
    for wrong in ({**pieces, 4: pieces[0]}, {**pieces, 1: pieces[1][:-1]}):
        with pytest.raises(Invalid):
            erasure.decode(wrong, len(STATE), 2, 4)
    with pytest.raises(Missing):
        erasure.decode({3: pieces[3]}, len(STATE), 2, 4)
    with pytest.raises(Invalid):
        erasure.encode(b"", 2, 4)


def test_shares_of_another_form_are_refused() -> None:
    from shamir_mnemonic import generate_mnemonics

    secret = bytes(range(32))
    good = erasure.split_secret(secret, 2, 3)
    assert erasure.join_secret(good[1:], 2) == secret
    slow = generate_mnemonics(1, [(2, 3)], secret, iteration_exponent=2)[0]
    grouped = generate_mnemonics(2, [(2, 3), (2, 3)], secret, iteration_exponent=0)[0]
    short = generate_mnemonics(1, [(2, 3)], secret[:16], iteration_exponent=0)[0]
    other = erasure.split_secret(secret, 2, 3)
    bad = [slow, grouped, short, [good[0], other[1]], [good[0], good[0]], ["x " * 400] * 2, ["", ""], ["\ud800"] * 2]
    for shares in [*bad, erasure.split_secret(secret, 3, 3)]:
        with pytest.raises(Invalid):
            erasure.join_secret(shares, 2)
    with pytest.raises(Missing):
        erasure.join_secret(good[:1], 2)


@pytest.mark.parametrize("package", ["pyeclib.ec_iface", "shamir_mnemonic"])
def test_a_machine_without_the_code_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = sealed()
    monkeypatch.setitem(sys.modules, package, None)
    erasure._driver.cache_clear()
    actions = (lambda: sealed(), lambda: opened(snapshot, 0, 1, 2))
    for action in actions:
        with pytest.raises(Unavailable, match=r"tessera-network\[train\]"):
            action()
    assert SnapshotHeader.from_value(snapshot.header.to_value()) == snapshot.header  # holders need neither


def test_every_refusal_is_one_of_ours() -> None:
    """Whatever stands in shares and fragments, nothing but our own errors comes out."""
    snapshot = sealed(count=3, needed=2)
    for junk in ("", "a", "academic acid " * 20, "\x00", "é" * 300):
        pieces = tuple(replace(piece, share=snapshot_code.share_hash(junk)) for piece in snapshot.header.pieces)
        header = replace(snapshot.header, pieces=pieces).signed_by(MAKER)
        with pytest.raises(TesseraError):
            open_snapshot(header, dict(enumerate(snapshot.fragments)), dict.fromkeys(range(3), junk))
