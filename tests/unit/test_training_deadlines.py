"""How long replicas wait for each other."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import Invalid
from tessera.training.deadlines import REMEMBERED, Deadline

times = st.floats(0, 1e6)


def learned(seconds: list[float], floor_s: float = 0.1, cap_s: float = 1e7) -> Deadline:
    deadline = Deadline(floor_s, cap_s)
    for value in seconds:
        deadline.observe(value)
    return deadline


def test_it_says_the_cap_as_long_as_it_knows_nothing() -> None:
    assert Deadline(1, 60).next_s() == 60


@given(st.lists(times), st.floats(0.1, 1e3), st.floats(1e3, 1e5))
def test_it_stays_between_floor_and_cap(seconds: list[float], floor_s: float, cap_s: float) -> None:
    assert floor_s <= learned(seconds, floor_s, cap_s).next_s() <= cap_s


@given(st.lists(st.floats(1, 2), min_size=5, max_size=REMEMBERED), st.lists(times, max_size=2))
def test_a_minority_cannot_stretch_it(usual: list[float], stalled: list[float]) -> None:
    assert learned(usual + stalled).next_s() <= 2 + 3 * 1


def test_a_stage_that_slows_down_as_a_whole_gets_its_time() -> None:
    """Nothing arrives in time any more, so nothing teaches the new pace but the silence."""
    deadline, waits = learned([1.0] * REMEMBERED), 0
    while deadline.next_s() < 50:
        deadline.missed()
        waits += 1
    assert waits < 4 * REMEMBERED
    for _ in range(100):
        deadline.missed()
    assert deadline.next_s() <= deadline.cap_s


def test_one_of_four_that_never_answers_stretches_nothing() -> None:
    deadline = learned([1.0, 1.2, 1.4] * 10)
    for _ in range(200):
        deadline.observe(1.0)
        deadline.observe(1.4)
        deadline.missed()
    assert deadline.next_s() < 3


@given(st.lists(times, min_size=1, max_size=100), st.floats(1, 100))
def test_it_follows_when_everybody_changes(before: list[float], now: float) -> None:
    assert learned(before + [now] * REMEMBERED).next_s() == pytest.approx(now)


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=REMEMBERED))
def test_half_of_what_came_would_have_come_in_time(seconds: list[float]) -> None:
    assert sum(value <= learned(seconds).next_s() for value in seconds) >= len(seconds) / 2


@pytest.mark.parametrize(("floor_s", "cap_s"), [(0, 1), (-1, 1), (2, 1), (1, math.inf), (math.nan, 1), (1, math.nan)])
def test_bounds_that_are_none_are_refused(floor_s: float, cap_s: float) -> None:
    with pytest.raises(Invalid, match="floor"):
        Deadline(floor_s, cap_s)


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_times_that_are_none_are_refused(seconds: float) -> None:
    with pytest.raises(Invalid, match="finite time"):
        Deadline(1, 2).observe(seconds)
