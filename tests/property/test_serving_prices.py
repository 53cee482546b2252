"""Prices of tokens: what is charged never exceeds what was authorised, and nothing is served for nothing."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.core.errors import Invalid
from tessera.serving.paying.charging import PaidRequest, Usage
from tessera.serving.paying.prices import TokenPrice

UNITS = st.integers(0, 10**12)
TOKENS = st.integers(0, 2**31)
PRICES = st.builds(TokenPrice, UNITS, UNITS, st.integers(1, 2**31))


@settings(max_examples=40)
@given(PRICES, TOKENS, TOKENS, st.data())
def test_a_charge_is_at_most_what_was_authorised_and_within_one_unit(
    price: TokenPrice, prompt: int, most: int, data: st.DataObject
) -> None:
    made = data.draw(st.integers(0, most))
    cost = price.cost_down(Usage(prompt, made))
    assert 1 <= cost <= price.most_up(PaidRequest("", b"", {}, "", prompt, most))
    exact = Fraction(prompt * price.prompt_units + made * price.completion_units, price.lot)
    assert cost == 1 or exact - 1 < cost <= exact


@settings(max_examples=40)
@given(st.integers(1, 10**12), st.integers(1, 2**20), st.data())
def test_by_the_context_a_part_is_never_dearer_than_the_whole(units: int, context: int, data: st.DataObject) -> None:
    price = TokenPrice.of_context(units, context)
    prompt = data.draw(st.integers(0, context))
    most = data.draw(st.integers(0, context - prompt))
    authorised = price.most_up(PaidRequest("", b"", {}, "", prompt, most))
    assert authorised <= units
    assert authorised * context >= (prompt + most) * units  # no token below the price of the whole
    assert price.cost_down(Usage(context, 0)) == units


@pytest.mark.parametrize(
    "fields", [(-1, 1), (1, -1), (10**12 + 1, 1), (1.0, 1), (1, 1, 0), (1, 1, 2**31 + 1), (True, 1)]
)
def test_a_price_that_is_none_is_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(Invalid):
        TokenPrice(*fields)
