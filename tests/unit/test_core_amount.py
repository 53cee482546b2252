"""Amounts: what they refuse, and how they print."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.core.amount import Amount
from tessera.core.errors import Invalid, UnitMismatch


@pytest.mark.parametrize("units", [1.0, True, "1", None, -1])
def test_units_must_be_a_whole_number_of_at_least_zero(units: Any) -> None:
    with pytest.raises(Invalid, match="units must be"):
        Amount(units, "tUSD")


@pytest.mark.parametrize("asset", ["", None, 7])
def test_an_asset_must_have_a_name(asset: Any) -> None:
    with pytest.raises(Invalid, match="asset must be"):
        Amount(1, asset)


def test_a_debt_is_not_an_amount() -> None:
    with pytest.raises(Invalid, match="not -1"):
        Amount(1, "tUSD") - Amount(2, "tUSD")


@pytest.mark.parametrize("operator", ["__add__", "__sub__", "__lt__", "__le__", "__gt__", "__ge__"])
def test_two_assets_never_meet(operator: str) -> None:
    with pytest.raises(UnitMismatch, match="tUSD meets wETH"):
        getattr(Amount(2, "tUSD"), operator)(Amount(1, "wETH"))
    with pytest.raises(UnitMismatch, match="not an Amount"):
        getattr(Amount(2, "tUSD"), operator)(1)


def test_amounts_of_different_assets_are_not_equal() -> None:
    assert Amount(1, "tUSD") != Amount(1, "wETH")
    assert Amount(1, "tUSD") == Amount(1, "tUSD")


@pytest.mark.parametrize("fraction", [(1, 0), (-1, 2), (1, -2), (0.5, 1), (1, True)])
def test_a_part_needs_a_real_fraction(fraction: tuple[Any, Any]) -> None:
    for part in (Amount(10, "tUSD").part_down, Amount(10, "tUSD").part_up):
        with pytest.raises(Invalid, match="a fraction of money"):
            part(*fraction)


@pytest.mark.parametrize(
    ("units", "decimals", "text"),
    [(0, 6, "0 tUSD"), (1, 6, "0.000001 tUSD"), (1_500_000, 6, "1.5 tUSD"), (12, 0, "12 tUSD"), (100, 2, "1 tUSD")],
)
def test_an_amount_prints_for_people(units: int, decimals: int, text: str) -> None:
    assert Amount(units, "tUSD").format(decimals) == text


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1e3", "1.", ".5", "1,5", "1_000", "0x10", "١٢", "1.5 tUSD", "1" * 81, "9" * 5_000]
)
def test_only_plain_decimals_are_read_as_amounts(text: str) -> None:
    with pytest.raises(Invalid, match="an amount looks like"):
        Amount.parse(text, "tUSD", 6)


def test_an_amount_finer_than_its_asset_is_refused_rather_than_rounded() -> None:
    with pytest.raises(Invalid, match="tUSD has 6 decimals"):
        Amount.parse("0.0000001", "tUSD", 6)
