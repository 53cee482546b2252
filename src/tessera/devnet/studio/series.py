"""Thirty days of four invented prices. They are generated from a seed and are no market's; every output says so."""

from __future__ import annotations

import math
import random
from datetime import date, timedelta
from typing import Any

from tessera.core.errors import Invalid

__all__ = ["LABEL", "NAMES", "make_series", "read_series"]

LABEL = "Generated data: these prices are no market's"
NAMES = ("Lapis", "Malachite", "Ochre", "Porphyry")
DAYS = 30
_START_CENTS = (12_040, 4_815, 2_360, 8_725)
_DRIFT = (0.0035, -0.0022, 0.0010, 0.0016)  # a day
_NOISE = (0.014, 0.011, 0.024, 0.009)
_SHOCK = (0.0, -0.055, 0.07, 0.0)  # on one day in the middle, so that there is something to tell


def make_series(seed: int, *, last_day: str = "2026-11-27") -> dict[str, Any]:
    """Closing prices in cents, by name. The same seed gives the same series."""
    rng, last = random.Random(seed), date.fromisoformat(last_day)
    days = [(last - timedelta(days=DAYS - 1 - day)).isoformat() for day in range(DAYS)]
    prices = {}
    for name, start, drift, noise, shock in zip(NAMES, _START_CENTS, _DRIFT, _NOISE, _SHOCK, strict=True):
        value, row, when = float(start), [], rng.randint(12, 20)
        for day in range(DAYS):
            row.append(round(value))
            step = drift + rng.gauss(0.0, noise) + (shock if day == when else 0.0)
            value *= math.exp(step)
        prices[name] = row
    return {"label": LABEL, "seed": seed, "days": days, "cents": prices}


def read_series(value: object) -> tuple[list[str], dict[str, list[int]]]:
    """Days and cents of a series that came from outside. Raises: Invalid."""
    if not isinstance(value, dict):
        raise Invalid("a series has days and cents")
    days, cents = value.get("days"), value.get("cents")
    if (
        not isinstance(days, list)
        or not isinstance(cents, dict)
        or not 2 <= len(days) <= 400
        or not 0 < len(cents) <= 8
    ):
        raise Invalid("a series has 2 to 400 days and 1 to 8 names")
    for name, row in cents.items():
        if not isinstance(row, list) or len(row) != len(days) or not all(type(c) is int and 0 < c < 10**9 for c in row):
            raise Invalid(f"{name[:40]!r} has no price in cents for each day")
        if len(name) > 24 or not name.isprintable():
            raise Invalid("a name is a short line")
    for day in days:
        try:
            date.fromisoformat(day)
        except (TypeError, ValueError) as error:
            raise Invalid(f"a day is written 2026-11-27, not {str(day)[:20]!r}") from error
    return days, cents
