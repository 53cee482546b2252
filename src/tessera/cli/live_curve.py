"""A loss curve in braille dots: two columns and four rows of dots in each character.

Invariants: as many lines as asked for, none wider than asked; any finite input draws, an empty one says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.text import Text

from tessera.devnet.snapshot import Snapshot

__all__ = ["STYLES", "draw_curve"]

STYLES = {"unigram": "bright_black", "bigram": "yellow", "train": "blue", "val": "bold green"}  # later ones win a cell
_LABEL = 6  # characters of the vertical axis
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # [column][row], Unicode's order
_BLANK = 0x2800
_Dots = dict[tuple[int, int], tuple[int, str]]  # (column, line) of a character -> its bits and style


def draw_curve(snapshot: Snapshot, width: int, height: int) -> Text:
    """Train and validation loss over steps, and the unigram and bigram models' losses as lines across."""
    series = _series(snapshot)
    values = [value for points in series.values() for _, value in points]
    if not snapshot.losses or not values or width < 20 or height < 3:
        lines = [""] * height
        lines[height // 2 : height // 2 + 1] = ["the curve begins with the first step".center(max(width, 1))[:width]]
        return Text("\n".join(lines), style="bright_black")
    low, high = min(values), max(values)
    margin = max(0.02, (high - low) * 0.04)
    low, high = low - margin, high + margin
    columns, rows = (width - _LABEL) * 2, (height - 1) * 4
    last_step = max(snapshot.steps, snapshot.losses[-1].step, 1)

    def place(step: float, value: float) -> tuple[int, int]:
        x = round(step / last_step * (columns - 1))
        y = round((high - value) / (high - low) * (rows - 1))
        return min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)

    dots: _Dots = {}
    for name, points in series.items():
        dashed = name in ("unigram", "bigram")
        _plot(dots, (place(step, value) for step, value in points), STYLES[name], every=4 if dashed else 1)
    return _to_text(dots, columns // 2, height - 1, low, high, last_step)


def _series(snapshot: Snapshot) -> dict[str, list[tuple[int, float]]]:
    last_step = max(snapshot.steps, snapshot.losses[-1].step if snapshot.losses else 0)

    def across(value: float | None) -> list[tuple[int, float]]:
        return [] if value is None else [(0, value), (last_step, value)]

    return {
        "unigram": across(snapshot.unigram_loss),
        "bigram": across(snapshot.bigram_loss),
        "train": [(point.step, point.train) for point in snapshot.losses if point.train is not None],
        "val": [(point.step, point.val) for point in snapshot.losses if point.val is not None],
    }


def _plot(dots: _Dots, points: Iterable[tuple[int, int]], style: str, every: int) -> None:
    """Joins the points; of a dashed line, half of `every` dots."""
    previous: tuple[int, int] | None = None
    for point in points:
        for x, y in _between(previous or point, point):
            if every == 1 or x % every < every // 2:
                cell = (x // 2, y // 4)
                bits = dots.get(cell, (0, ""))[0] | _BITS[x % 2][y % 4]
                dots[cell] = (bits, style)
        previous = point


def _between(start: tuple[int, int], end: tuple[int, int]) -> Iterable[tuple[int, int]]:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for i in range(length + 1):
        yield (
            start[0] + round((end[0] - start[0]) * i / length),
            start[1] + round((end[1] - start[1]) * i / length),
        )


def _to_text(dots: _Dots, columns: int, rows: int, low: float, high: float, last_step: int) -> Text:
    text = Text()
    labelled = {0, rows // 2, rows - 1}
    for row in range(rows):
        value = high - (high - low) * row / max(rows - 1, 1)
        label = f"{value:.2f}".rjust(_LABEL - 1) if row in labelled else " " * (_LABEL - 1)
        text.append(label + "┤", style="bright_black")
        cells = (dots.get((column, row), (0, "")) for column in range(columns))
        for style, run in groupby(cells, key=lambda cell: cell[1]):  # a span for each run, not for each character
            text.append("".join(chr(_BLANK + bits) if bits else " " for bits, _ in run), style=style)
        text.append("\n")
    end = f"{last_step:,} steps"
    text.append(" " * _LABEL + "0" + end.rjust(columns - 1)[: columns - 1], style="bright_black")
    return text
