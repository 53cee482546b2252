"""Who held which stage when: rosters through handovers, and what of them is believed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.transport import PeerRecord
from tessera.training.roster import PastSeat, Roster, Seat, seat_binding
from training_world import account_keys, peer_keys, small_manifest

MANIFEST = small_manifest()
SHARE = AccountKey(b"\x51" * 32).account
COIN = AccountKey(b"\x52" * 32).account


def seat(stage: int, peer: PeerKey, account: AccountKey) -> Seat:
    record = PeerRecord.sign(peer, (f"memory:{stage}",), 2_000_000_000)
    return Seat(stage, record, account.account, seat_binding(MANIFEST.run_id, peer.id, account))


def roster(count: int = 4) -> Roster:
    seats = tuple(seat(i, key, account_keys()[i]) for i, key in enumerate(peer_keys(count)))
    return Roster(MANIFEST.run_id, seats, SHARE, COIN)


def newcomer(number: int, stage: int) -> Seat:
    return seat(stage, PeerKey(bytes([100 + number]) * 32), AccountKey(bytes([100 + number]) * 32))


def test_each_step_has_one_holder_of_each_stage() -> None:
    first = roster()
    second = first.with_successor(newcomer(0, 2), from_step=10)
    third = second.with_successor(newcomer(1, 2), from_step=25).with_successor(newcomer(2, 0), from_step=25)
    holders = [third.at(step)[2].peer for step in (0, 9, 10, 24, 25, 99)]
    assert holders == [
        first.peers[2], first.peers[2], newcomer(0, 2).peer, newcomer(0, 2).peer, newcomer(1, 2).peer,
        newcomer(1, 2).peer,
    ]  # fmt: skip
    assert third.at(24)[0].peer == first.peers[0]
    assert third.at(25)[0].peer == newcomer(2, 0).peer
    assert third.peers == [seat.peer for seat in third.at(10**9)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=8), st.integers(0, 30), st.integers(0, 40))
def test_spans_cover_their_steps_once_and_agree_with_each_step(
    handovers: list[tuple[int, int]], start: int, length: int
) -> None:
    run, ends = roster(), [0] * 4
    for number, (stage, more) in enumerate(handovers):
        ends[stage] += more
        run = run.with_successor(newcomer(number, stage), from_step=ends[stage])
    steps = range(start, start + length)
    spans = run.spans(steps)
    assert [step for span, _ in spans for step in span] == list(steps)
    for span, seats in spans:
        for step in span:
            assert run.at(step) == seats


def test_a_roster_follows_what_it_became_of_and_nothing_else() -> None:
    before = roster()
    moved = replace(before, seats=tuple(replace(s, record=s.record) for s in before.seats))
    after = before.with_successor(newcomer(0, 1), from_step=5)
    twice = after.with_successor(newcomer(1, 1), from_step=7).with_successor(newcomer(2, 3), from_step=8)
    for later, earlier in ((before, before), (moved, before), (after, before), (twice, before), (twice, after)):
        assert later.follows(earlier)
    assert not before.follows(after)
    assert not roster().with_successor(newcomer(5, 1), from_step=5).follows(after)
    assert not replace(before, share=COIN).follows(before)
    swapped = replace(before, seats=(before.seats[0], newcomer(9, 1), *before.seats[2:]))
    assert not swapped.follows(before)  # somebody took a seat without a handover


def test_a_roster_with_a_past_reads_back() -> None:
    whole = roster().with_successor(newcomer(0, 1), from_step=5).with_successor(newcomer(1, 1), from_step=5)
    assert Roster.from_value(MANIFEST.run_id, 4, whole.to_value()) == whole


@pytest.mark.parametrize(
    "bend",
    [
        lambda value: value.pop("past"),
        lambda value: value.update(past={}),
        lambda value: value["past"][0].update(until_step=-1),
        lambda value: value["past"][0].update(until_step="5"),
        lambda value: value["past"].append(7),
        lambda value: value["past"][0]["seat"].update(binding="00" * 65),
        lambda value: value["past"].reverse(),
        lambda value: value["past"][0]["seat"].update(stage=9),
        lambda value: value.update(past=value["past"] * 5000),
    ],
)
def test_a_past_that_does_not_add_up_is_refused(bend: Any) -> None:
    value = roster().with_successor(newcomer(0, 1), from_step=5).with_successor(newcomer(1, 1), from_step=9).to_value()
    bend(value)
    with pytest.raises((Invalid, Misbehaviour)):
        Roster.from_value(MANIFEST.run_id, 4, value)


def test_a_past_seat_must_have_been_signed_for_too() -> None:
    after = roster().with_successor(newcomer(0, 1), from_step=5)
    forged = replace(after.past[0].seat, account=SHARE)
    value = replace(after, past=(PastSeat(forged, 5),)).to_value()
    with pytest.raises(Misbehaviour, match="signed by"):
        Roster.from_value(MANIFEST.run_id, 4, value)


def test_who_is_at_a_step_does_not_depend_on_other_stages() -> None:
    rng = random.Random(1)
    run = roster()
    for number in range(12):
        run = run.with_successor(newcomer(number, number % 2), from_step=number * 3)
    for _ in range(50):
        step = rng.randrange(60)
        assert [s.stage for s in run.at(step)] == [0, 1, 2, 3]
        assert run.at(step)[2:] == run.seats[2:]
