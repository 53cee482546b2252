"""Rights that come with shares: by level, and in proportion."""

from __future__ import annotations

import pytest

from tessera.core.errors import Invalid
from tessera.serving.paying.holdings import Holding
from tessera.serving.paying.owners import Tier, capacity, tiers


@pytest.mark.parametrize(("shares", "tokens"), [(0, 0), (9, 0), (10, 100), (99, 100), (100, 5_000), (10**30, 5_000)])
def test_the_highest_level_that_is_reached_counts(shares: int, tokens: int) -> None:
    levels = tiers(Tier("silver", 10, 100), Tier("gold", 100, 5_000))
    assert levels(Holding(shares, 10**30, 1))[1] == tokens


@pytest.mark.parametrize(("shares", "supply", "tokens"), [(1, 3, 333), (3, 3, 1_000), (0, 3, 0), (0, 0, 0)])
def test_capacity_is_split_in_proportion_and_rounded_down(shares: int, supply: int, tokens: int) -> None:
    assert capacity(1_000)(Holding(shares, supply, 1)) == ("capacity", tokens)


@pytest.mark.parametrize(("least", "tokens"), [(0, 1), (1, 0), (-1, 1)])
def test_a_level_for_nothing_is_refused(least: int, tokens: int) -> None:
    with pytest.raises(Invalid):
        Tier("x", least, tokens)
