"""Money and shares: an integer of an asset's smallest unit, which refuses to mix with another asset.

Invariants: `units` is an `int` ≥ 0; arithmetic keeps the asset; nothing here ever makes a float.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tessera.core.errors import Invalid, UnitMismatch

__all__ = ["Amount"]

_DECIMAL = re.compile(r"([0-9]{1,80})(?:\.([0-9]{1,80}))?")  # 80 digits: more than a uint256 has


@dataclass(frozen=True, slots=True, order=False)
class Amount:
    """`units` of `asset`'s smallest unit.

    >>> Amount(2, "tUSD") + Amount(3, "tUSD")
    Amount(units=5, asset='tUSD')
    """

    units: int
    asset: str

    def __post_init__(self) -> None:
        if type(self.units) is not int:
            raise Invalid(f"units must be an int, not {type(self.units).__name__} {self.units!r}")
        if self.units < 0:
            raise Invalid(f"units must be ≥ 0, not {self.units}")
        if not self.asset or not isinstance(self.asset, str):
            raise Invalid(f"asset must be a name, not {self.asset!r}")

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.units + self._same(other), self.asset)

    def __sub__(self, other: Amount) -> Amount:
        """Raises `Invalid` when `other` is larger: a debt is not an amount."""
        return Amount(self.units - self._same(other), self.asset)

    def __lt__(self, other: Amount) -> bool:
        return self.units < self._same(other)

    def __le__(self, other: Amount) -> bool:
        return self.units <= self._same(other)

    def __gt__(self, other: Amount) -> bool:
        return self.units > self._same(other)

    def __ge__(self, other: Amount) -> bool:
        return self.units >= self._same(other)

    def part_down(self, numerator: int, denominator: int) -> Amount:
        """`numerator / denominator` of it, rounded down. Both ≥ 0; raises `Invalid` when the denominator is 0."""
        _check_fraction(numerator, denominator)
        return Amount(self.units * numerator // denominator, self.asset)

    def part_up(self, numerator: int, denominator: int) -> Amount:
        """`numerator / denominator` of it, rounded up."""
        _check_fraction(numerator, denominator)
        return Amount(-(-self.units * numerator // denominator), self.asset)

    def format(self, decimals: int) -> str:
        """For people.

        >>> Amount(1_500_000, "tUSD").format(6)
        '1.5 tUSD'
        """
        whole, rest = divmod(self.units, 10**decimals)
        fraction = f".{rest:0{decimals}d}".rstrip("0") if rest else ""
        return f"{whole}{fraction} {self.asset}"

    @classmethod
    def parse(cls, text: str, asset: str, decimals: int) -> Amount:
        """The inverse of `format`'s number. Refuses signs, exponents and more digits than the asset has.

        >>> Amount.parse("1.5", "tUSD", 6)
        Amount(units=1500000, asset='tUSD')
        """
        match = _DECIMAL.fullmatch(text.strip())
        if match is None:
            raise Invalid(f"an amount looks like 12 or 12.5, not {text[:100]!r}")
        fraction = match[2] or ""
        if len(fraction) > decimals:
            raise Invalid(f"{asset} has {decimals} decimals, {text!r} has {len(fraction)}")
        return cls(int(match[1]) * 10**decimals + int(fraction.ljust(decimals, "0") or "0"), asset)

    def _same(self, other: Amount) -> int:
        if not isinstance(other, Amount):
            raise UnitMismatch(f"{self.asset} meets {type(other).__name__} {other!r}, not an Amount")
        if other.asset != self.asset:
            raise UnitMismatch(f"{self.asset} meets {other.asset}")
        return other.units


def _check_fraction(numerator: int, denominator: int) -> None:
    if type(numerator) is not int or type(denominator) is not int:
        raise Invalid(f"a fraction of money needs two ints, not {numerator!r}/{denominator!r}")
    if numerator < 0 or denominator <= 0:
        raise Invalid(f"a fraction of money needs n ≥ 0 and d > 0, not {numerator}/{denominator}")
