"""The order of reading: every window equally likely, sets in proportion, few shards at a time, the same everywhere."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.core.errors import Invalid
from tessera.models import dataset_order
from tessera.models.dataset_order import Mix, WindowOrder, permutation

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=12)


def order(sizes: list[int], length: int = 8, active: int = 3, *name: object) -> WindowOrder:
    return WindowOrder(sizes, length=length, active=active, name=["test", *name])


@settings(max_examples=60)
@given(SIZES, st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_a_pass_reads_every_shard_without_overlap(sizes: list[int], length: int, active: int, turn: int) -> None:
    if max(sizes) <= length:
        with pytest.raises(Invalid, match="no shard"):
            order(sizes, length, active)
        return
    reading = order(sizes, length, active)
    found = [reading.locate(turn * reading.windows + number) for number in range(reading.windows)]
    targets: dict[int, list[int]] = {}
    for window in found:
        assert 0 <= window.start < sizes[window.shard] - length
        targets.setdefault(window.shard, []).extend(range(window.start + 1, window.start + 1 + length))
    for shard, size in enumerate(sizes):
        tokens = targets.get(shard, [])
        assert len(tokens) == len(set(tokens)), "two windows of a pass share a target"
        assert len(tokens) == (max(1, (size - length) // length) * length if size > length else 0)


@settings(max_examples=40)
@given(SIZES.filter(lambda sizes: max(sizes) > 8), st.integers(1, 4), st.integers(0, 1000))
def test_a_group_holds_what_its_windows_need(sizes: list[int], active: int, first: int) -> None:
    reading = order(sizes, 8, active)
    shards, end = reading.shards_of(first)
    assert 1 <= len(shards) <= active
    assert first < end <= (first // reading.windows + 1) * reading.windows
    assert {reading.locate(number).shard for number in range(first, end)} <= set(shards)
    if end % reading.windows:
        assert not set(reading.shards_of(end)[0]) & set(shards), "a pass reads a shard in one group only"


@settings(max_examples=40)
@given(SIZES.filter(lambda sizes: max(sizes) > 8), st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_any_window_is_found_alone_as_in_order(sizes: list[int], numbers: list[int]) -> None:
    first = order(sizes)
    assert [first.locate(n) for n in numbers] == [order(sizes).locate(n) for n in numbers]


@pytest.mark.parametrize("passes", [1000, pytest.param(6000, marks=pytest.mark.slow)])
def test_every_window_is_equally_likely(passes: int) -> None:
    """Each start of a shard comes with rate n/room; between shards the rates differ by less than length/room."""
    sizes, length = [60, 97, 75, 150], 8
    reading, counts = order(sizes, length, 2), Counter()
    for number in range(passes * reading.windows):
        window = reading.locate(number)
        counts[window.shard, window.start] += 1
    for shard, size in enumerate(sizes):
        room = size - length
        expected = passes * (room // length) / room
        got = np.array([counts[shard, start] for start in range(room)])
        assert got.sum() == passes * (room // length)
        assert (1 - length / room) / length <= expected / passes <= 1 / length
        # 4.5 standard deviations of a binomial: one test in a thousand would fail over all 350 starts
        assert np.abs(got - expected).max() < 4.5 * np.sqrt(expected)


def test_passes_differ_and_so_do_names() -> None:
    reading = order([500, 500, 500])
    per_pass = reading.windows
    first, second = ([reading.locate(t * per_pass + n) for n in range(per_pass)] for t in range(2))
    assert first != second
    assert sorted(w.shard for w in first) == sorted(w.shard for w in second)
    assert order([500, 500, 500], 8, 3, "other").locate(0) != reading.locate(0)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 500))
def test_sets_come_in_proportion_to_their_weights(weights: list[int], window: int) -> None:
    mix, total = Mix(weights, "test"), sum(weights)
    whole = [mix.locate(n)[0] for n in range(window * total, (window + 1) * total)]
    assert [whole.count(chosen) for chosen in range(len(weights))] == weights
    drawn = [mix.locate(n) for n in range(window, window + 2 * total)]
    for chosen, weight in enumerate(weights):
        numbers = [number for which, number in drawn if which == chosen]
        before = mix.count(chosen, window)
        assert numbers == list(range(before, before + len(numbers))), "a set's windows are numbered without gaps"
        assert abs(before - window * weight / total) <= weight


def test_permutations_are_permutations() -> None:
    for count in (1, 2, 7, 1000):
        assert sorted(permutation(count, "x")) == list(range(count))
    assert Counter(int(permutation(3, "x", n)[0]) for n in range(3000)).most_common()[-1][1] > 900


def test_a_mix_needs_weights_and_a_group_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in ([], [0], [1, -1]):
        with pytest.raises(Invalid, match="weight of at least 1"):
            Mix(weights)
    monkeypatch.setattr(dataset_order, "GROUP_LIMIT", 100)
    assert order([500, 300, 300], 8, 1).windows
    with pytest.raises(Invalid, match="2 shards at once hold 135 windows of 5"):
        order([505, 180], 5, 2)
