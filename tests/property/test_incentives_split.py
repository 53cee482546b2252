"""Laws of `split`, for all totals and scores."""

from __future__ import annotations

import doctest
import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import Invalid
from tessera.incentives import split as module
from tessera.incentives.split import split

totals = st.integers(0, 10**30)
scores = st.lists(st.integers(0, 10**20), min_size=1, max_size=40).filter(any)


@given(totals, scores)
def test_the_parts_add_up_to_the_whole(total: int, weights: list[int]) -> None:
    assert sum(split(total, weights)) == total


@given(totals, scores)
def test_each_part_is_within_one_unit_of_its_exact_share(total: int, weights: list[int]) -> None:
    exact = [Fraction(total * weight, sum(weights)) for weight in weights]
    assert all(abs(part - share) < 1 for part, share in zip(split(total, weights), exact, strict=True))


@given(totals, scores)
def test_zero_score_earns_nothing(total: int, weights: list[int]) -> None:
    assert all(part == 0 for part, weight in zip(split(total, weights), weights, strict=True) if weight == 0)


@given(totals, scores)
def test_a_higher_score_never_earns_less(total: int, weights: list[int]) -> None:
    pairs = sorted(zip(weights, split(total, weights), strict=True), key=lambda pair: (pair[0], pair[1]))
    groups: dict[int, list[int]] = {}
    for weight, part in pairs:
        groups.setdefault(weight, []).append(part)
    ordered = [groups[weight] for weight in sorted(groups)]
    assert all(max(low) <= min(high) for low, high in itertools.pairwise(ordered))


@given(totals, scores, st.integers(1, 10**6))
def test_the_scale_of_the_scores_does_not_matter(total: int, weights: list[int], factor: int) -> None:
    assert split(total, [weight * factor for weight in weights]) == split(total, weights)


@pytest.mark.parametrize(
    ("total", "weights"),
    [(1, []), (1, [0, 0]), (1, [1, -1]), (-1, [1]), (1.0, [1]), (1, [0.5]), (True, [1]), (1, [True])],
)
def test_what_cannot_be_split_is_refused(total: int, weights: list[int]) -> None:
    with pytest.raises(Invalid):
        split(total, weights)


def test_the_examples_in_the_docstring_are_true() -> None:
    assert doctest.testmod(module) == (0, 2)
