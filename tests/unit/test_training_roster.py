"""Who works at which stage: rosters through admissions and departures, and what of them is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import Invalid, Misbehaviour, Missing, Refused
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.transport import PeerRecord
from tessera.training.roster import Roster, Seat
from training_run import make_seat
from training_world import account_keys, peer_keys, small_manifest

MANIFEST = small_manifest()
RUN = MANIFEST.run_id
CONTRACT = AccountKey(b"\x50" * 32).account
SHARE = AccountKey(b"\x51" * 32).account
COIN = AccountKey(b"\x52" * 32).account
STRANGER = PeerKey(b"\x54" * 32)


def seat(stage: int, peer: PeerKey, account: AccountKey, expires: float = 2_000_000_000) -> Seat:
    return make_seat(MANIFEST, stage, PeerRecord.sign(peer, (f"memory:{stage}",), expires), account)


def roster(count: int = 4) -> Roster:
    seats = tuple(seat(i, key, account_keys()[i]) for i, key in enumerate(peer_keys(count)))
    return Roster(RUN, count, seats, CONTRACT, SHARE, COIN)


def newcomer(number: int, stage: int) -> Seat:
    return seat(stage, PeerKey(bytes([100 + number]) * 32), AccountKey(bytes([100 + number]) * 32))


def admitted(before: Roster, *joiners: Seat) -> Roster:
    for joiner in joiners:
        before = replace(before.admit(joiner), changes=before.changes + 1)
    return before


def dismissed(before: Roster, *leavers: Seat) -> Roster:
    for leaver in leavers:
        before = replace(before.without(leaver.account), changes=before.changes + 1)
    return before


def test_a_joiner_is_the_last_of_his_stage() -> None:
    first, second, other = newcomer(0, 1), newcomer(1, 1), newcomer(2, 3)
    run = admitted(roster(), first, other, second)
    assert [s.stage for s in run.seats] == [0, 1, 1, 1, 2, 3, 3]
    assert run.of_stage(1) == (roster().seats[1], first, second)
    assert run.holders(3) == [roster().seats[3].record, other.record]
    assert run.seat_of(second.peer) == second
    assert (run.stage_of(first.peer), run.stage_of(STRANGER.id)) == (1, None)


def test_who_has_left_is_known_and_holds_no_seat() -> None:
    joiner = newcomer(0, 1)
    old = roster().seats[1]
    run = dismissed(admitted(roster(), joiner), old)
    assert run.of_stage(1) == (joiner,)
    assert run.past == (old,)
    assert run.seat_of(old.peer) is None
    assert run.stage_by_peer == {**{s.peer: s.stage for s in roster().seats}, joiner.peer: 1}


def test_one_account_and_one_peer_have_one_seat_ever() -> None:
    joiner, old = newcomer(0, 1), roster().seats[1]
    run = dismissed(admitted(roster(), joiner), old)
    other = newcomer(1, 2)
    for again in (
        old,
        joiner,
        replace(other, account=old.account),
        replace(other, record=old.record),
        replace(other, account=roster().accounts[0]),
    ):
        with pytest.raises(Refused, match="one account, one seat"):
            run.admit(again)


def test_a_stage_that_was_left_empty_takes_the_next_who_comes() -> None:
    lost = dismissed(roster(), roster().seats[2])
    assert (lost.of_stage(2), lost.holders(2)) == ((), [])
    assert Roster.from_value(RUN, 4, lost.to_value()) == lost
    joiner = newcomer(0, 2)
    again = admitted(lost, joiner)
    assert again.of_stage(2) == (joiner,)
    assert again.follows(roster())
    with pytest.raises(Missing):
        roster().without(SHARE)
    with pytest.raises(Misbehaviour, match="does not seat somebody at each of 4 stages"):
        Roster.from_value(RUN, 4, {**lost.to_value(), "past": [], "changes": 0})


def test_a_roster_follows_what_it_became_of_and_nothing_else() -> None:
    before, joiner = roster(), newcomer(0, 1)
    moved = before.with_records([PeerRecord.sign(peer_keys()[0], ("memory:elsewhere",), 2_000_000_001)])
    after = admitted(before, joiner)
    later = dismissed(admitted(after, newcomer(1, 1), newcomer(2, 3)), before.seats[1], before.seats[3])
    for now, then in ((before, before), (moved, before), (after, before), (later, before), (later, after)):
        assert now.follows(then)
    assert moved != before
    assert not before.follows(after)
    assert not later.follows(admitted(before, newcomer(5, 2)))  # who has come stays known
    assert not replace(before, share=COIN).follows(before)
    assert not replace(before, run=COIN).follows(before)
    assert not replace(before, seats=after.seats).follows(before)  # somebody took a seat without a change
    assert not replace(later, past=later.past[::-1]).follows(dismissed(admitted(after), before.seats[1]))
    moved_on = replace(later, seats=tuple(replace(s, stage=3) if s == joiner else s for s in later.seats))
    assert not moved_on.follows(after)
    turned = replace(after, changes=2, seats=(after.seats[0], after.seats[2], after.seats[1], *after.seats[3:]))
    assert not turned.follows(after)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=12))
def test_whatever_comes_and_goes_the_roster_reads_back_and_follows(moves: list[tuple[bool, int]]) -> None:
    rosters = [roster()]
    for number, (joins, stage) in enumerate(moves):
        run = rosters[-1]
        if joins:
            rosters.append(admitted(run, newcomer(number, stage)))
        elif len(run.of_stage(stage)) > 1:
            rosters.append(dismissed(run, run.of_stage(stage)[0]))
    last = rosters[-1]
    assert Roster.from_value(RUN, 4, last.to_value()) == last
    assert {s.stage for s in last.seats} == set(range(4))
    assert len(last.stage_by_peer) == len(last.everyone)
    for then in rosters:
        assert last.follows(then)
        assert then is last or not then.follows(last) or then.changes == last.changes


Bend = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "bend",
    [
        lambda value: value.pop("past"),
        lambda value: value.update(past={}),
        lambda value: value.pop("changes"),
        lambda value: value.update(changes=0),  # fewer than have left
        lambda value: value.update(changes=99),  # more than ever came and went
        lambda value: value.update(changes="2"),
        lambda value: value["past"].append(7),
        lambda value: value["past"][0].update(binding="00" * 65),
        lambda value: value["past"][0].update(stage=9),
        lambda value: value["past"].append(value["past"][0]),
        lambda value: value["past"].append(value["seats"][0]),
        lambda value: value["seats"].append(value["past"][0]),
        lambda value: value["seats"].reverse(),
        lambda value: value.update(seats=[]),
        lambda value: value.pop("run"),
        lambda value: value["seats"][1].update(stage=2),  # bound for another stage
        lambda value: value.update(seats=value["seats"] * 50),
        lambda value: value.update(past=value["past"] * 5000),
    ],
)
def test_a_roster_that_does_not_add_up_is_refused(bend: Bend) -> None:
    value = dismissed(admitted(roster(), newcomer(0, 1)), roster().seats[1]).to_value()
    assert Roster.from_value(RUN, 4, value).changes == 2
    bend(value)
    with pytest.raises((Invalid, Misbehaviour)):
        Roster.from_value(RUN, 4, value)


def test_a_past_seat_must_have_been_signed_for_too() -> None:
    after = dismissed(admitted(roster(), newcomer(0, 1)), roster().seats[1])
    value = replace(after, past=(replace(after.past[0], account=SHARE),)).to_value()
    with pytest.raises(Misbehaviour, match="signed by"):
        Roster.from_value(RUN, 4, value)
