"""The analyst's craft: a series as facts, and the facts as scenes of a recap. Pure; integers and strings come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from typing import Any

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.devnet.studio.series import LABEL, read_series

__all__ = ["SCENES", "analyse", "check", "read_analysis"]

SCENES = ("opening", "lines", "bars", "falls", "closing")
ANALYSIS_LIMIT = 65_536  # bytes


def analyse(series: object) -> bytes:
    """Canonical facts: changes and falls in basis points, and what to say in each scene."""
    days, cents = read_series(series)
    facts = {name: _facts(row, days) for name, row in cents.items()}
    return encoding.encode({"label": LABEL, "days": days, "cents": cents, "facts": facts, "say": _say(facts, days)})


def read_analysis(data: bytes | str) -> dict[str, Any]:
    """Raises: Invalid for what `analyse` does not make."""
    value = encoding.decode(data.encode() if isinstance(data, str) else data, ANALYSIS_LIMIT)
    try:
        again = analyse({"days": value["days"], "cents": value["cents"]})
    except (TypeError, KeyError) as error:
        raise Invalid("this is no analysis") from error
    if encoding.decode(again, ANALYSIS_LIMIT) != value:
        raise Invalid("the analysis does not follow from its prices")
    return dict(value)


def check(series: object, sentences: object) -> bytes:
    """A canonical verdict: which of the sentences, by scene, do not follow from the prices."""
    days, cents = read_series(series)
    said = _say({name: _facts(row, days) for name, row in cents.items()}, days)
    if not isinstance(sentences, dict) or len(encoding.encode(sentences)) > ANALYSIS_LIMIT:
        raise Invalid("what is checked are sentences by scene")
    wrong = [name for name in sorted(sentences) if sentences[name] != said.get(name)]
    return encoding.encode({"checked": len(sentences), "wrong": wrong})


def _facts(row: Sequence[int], days: Sequence[str]) -> dict[str, Any]:
    steps = [_bps(before, after) for before, after in pairwise(row)]
    week = row[-8] if len(row) > 7 else row[0]
    biggest = max(range(len(steps)), key=lambda day: abs(steps[day]))
    mean = sum(steps) / len(steps)
    noise = math.isqrt(round(sum((step - mean) ** 2 for step in steps) / len(steps)))
    return {
        "last_cents": row[-1], "month_bps": _bps(row[0], row[-1]), "week_bps": _bps(week, row[-1]),
        "noise_bps": noise, "fall_bps": _deepest_fall(row), "biggest_bps": steps[biggest],
        "biggest_day": days[biggest + 1],
    }  # fmt: skip


def _deepest_fall(row: Sequence[int]) -> int:
    """From a high to a later low, in basis points, as a negative number."""
    high, deepest = row[0], 0
    for price in row:
        high = max(high, price)
        deepest = min(deepest, _bps(high, price))
    return deepest


def _bps(before: int, after: int) -> int:
    return round((after - before) * 10_000 / before)


def _say(facts: dict[str, Any], days: Sequence[str]) -> dict[str, str]:
    """One short paragraph for each scene, in words that a speech synthesiser reads well."""
    ranked = sorted(facts, key=lambda name: -facts[name]["month_bps"])
    best, worst = ranked[0], ranked[-1]
    wild = max(facts, key=lambda name: abs(facts[name]["biggest_bps"]))
    calm = min(facts, key=lambda name: facts[name]["noise_bps"])
    weekly = max(facts, key=lambda name: facts[name]["week_bps"])
    deep = min(facts, key=lambda name: facts[name]["fall_bps"])
    first, last = date.fromisoformat(days[0]), date.fromisoformat(days[-1])
    return {
        "opening": f"Welcome to the market recap, from {_day(first)} to {_day(last)}. "
        "All prices in this programme are generated; they belong to no real market.",
        "lines": f"{best} led the month, and {_moved(facts[best]['month_bps'])}. "
        f"{worst} came last, and {_moved(facts[worst]['month_bps'])}.",
        "bars": f"In the last seven days the strongest was {weekly}, which {_moved(facts[weekly]['week_bps'])}. "
        f"The calmest was {calm}, with daily moves of about {_percent(facts[calm]['noise_bps'])}.",
        "falls": f"The largest move of a single day was on {_day(date.fromisoformat(facts[wild]['biggest_day']))}, "
        f"when {wild} {_moved(facts[wild]['biggest_bps'])}. The deepest fall from a high was {deep}'s, "
        f"at {_percent(-facts[deep]['fall_bps'])}.",
        "closing": "This recap was made by four agents, who hired each other and were paid through an escrow. "
        "Thank you for watching.",
    }


def _moved(bps: int) -> str:
    return f"rose by {_percent(bps)}" if bps > 0 else f"fell by {_percent(-bps)}" if bps < 0 else "stood still"


def _percent(bps: int) -> str:
    return f"{bps / 100:.1f} percent"


def _day(day: date) -> str:
    return f"{day:%B} {day.day}"
