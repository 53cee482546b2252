"""The chart maker's craft: for each scene a picture before and after its animation, as PNG in a zip.

Everything is drawn at twice the size and scaled down, which smooths lines. The editor brings the second picture in over
the first, the way that the manifest names.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import date
from typing import TYPE_CHECKING, Any

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.devnet.studio.analysis import SCENES, read_analysis
from tessera.devnet.studio.archives import write_archive

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

__all__ = ["HEIGHT", "WIDTH", "Canvas", "draw_charts", "need_pillow"]

WIDTH, HEIGHT = 1_280, 720
SCALE = 2
GROUND, CARD, INK, QUIET, RULE = "#12151b", "#1b1f27", "#eef0f4", "#9aa2b1", "#2c323d"
STONES = ("#6f93f0", "#3fbd94", "#e2b04a", "#d96a88", "#9880d6", "#4fabc4", "#d88750", "#97a84c")
GOOD, BAD = "#3fbd94", "#e2667f"
LEFT, RIGHT, TOP, BOTTOM = 90, 1_040, 170, 560  # of the plot; below is room for captions
Picture = Callable[["Canvas", dict[str, Any]], None]


def need_pillow() -> None:
    """Raises: Invalid with what to install."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise Invalid("the studio draws with Pillow: pip install 'tessera-network[agents]'") from error


class Canvas:
    """A picture in the video's own coordinates."""

    def __init__(self) -> None:
        need_pillow()
        from PIL import Image, ImageDraw

        self.image: Image.Image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), GROUND)
        self._draw: ImageDraw.ImageDraw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int, fill: str = INK, anchor: str = "la") -> None:
        from PIL import ImageFont

        font = ImageFont.load_default(size * SCALE)
        self._draw.text((x * SCALE, y * SCALE), text, fill=fill, font=font, anchor=anchor)

    def line(self, points: list[tuple[float, float]], fill: str, width: float) -> None:
        spots = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(spots, fill=fill, width=round(width * SCALE), joint="curve")

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: str, radius: float = 0) -> None:
        corners = (min(x0, x1) * SCALE, min(y0, y1) * SCALE, max(x0, x1) * SCALE, max(y0, y1) * SCALE)
        self._draw.rounded_rectangle(corners, radius * SCALE, fill=fill)

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        spot = ((x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE)
        self._draw.ellipse(spot, fill=fill)

    def png(self) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        small = self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        small.save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()


def draw_charts(analysis: bytes | str) -> bytes:
    """A zip: NAME-0.png and NAME-1.png of each scene, and manifest.json, which says how the second comes in."""
    facts = read_analysis(analysis)
    scenes: dict[str, tuple[Picture, Picture, str]] = {
        "opening": (_empty, _opening, "fade"), "lines": (_axes, _lines, "wiperight"),
        "bars": (_bars_ground, _bars, "wipeup"), "falls": (_falls_ground, _falls, "wiperight"),
        "closing": (_empty, _closing, "fade"),
    }  # fmt: skip
    entries: dict[str, bytes] = {}
    for name in SCENES:
        before, after, _ = scenes[name]
        for number, picture in enumerate((before, after)):
            canvas = Canvas()
            picture(canvas, facts)
            entries[f"{name}-{number}.png"] = canvas.png()
    manifest = {"scenes": list(SCENES), "comes_in": {name: scenes[name][2] for name in SCENES}}
    return write_archive(entries | {"manifest.json": encoding.encode(manifest)})


# --- pictures ---------------------------------------------------------------------------------------------------------


def _frame(canvas: Canvas, facts: dict[str, Any], title: str, below: str) -> None:
    """What every chart has: a title, a line of stones, and what kind of data this is."""
    for position, stone in enumerate(STONES[:4]):
        canvas.box(90 + 30 * position, 48, 112 + 30 * position, 56, stone, 2)
    canvas.text(90, 70, title, 38)
    canvas.text(90, 122, below, 20, QUIET)
    canvas.text(WIDTH - 50, 52, facts["label"], 15, QUIET, "ra")


def _empty(canvas: Canvas, facts: dict[str, Any]) -> None:
    canvas.text(WIDTH - 50, 52, facts["label"], 15, QUIET, "ra")


def _opening(canvas: Canvas, facts: dict[str, Any]) -> None:
    _empty(canvas, facts)
    for position, stone in enumerate(STONES[:4]):
        row, column = divmod(position, 2)
        canvas.box(160 + 98 * column, 216 + 98 * row, 248 + 98 * column, 304 + 98 * row, stone, 14)
    canvas.text(420, 214, "Market recap", 76)
    first, last = (date.fromisoformat(facts["days"][at]) for at in (0, -1))
    canvas.text(424, 314, f"{first.day} {first:%B} to {last.day} {last:%B %Y}", 32, QUIET)
    canvas.text(424, 368, " · ".join(facts["cents"]), 26, QUIET)


def _indexed(facts: dict[str, Any]) -> dict[str, list[float]]:
    """Prices as a part of the first day's, 100 = where they began."""
    return {name: [100 * price / row[0] for price in row] for name, row in facts["cents"].items()}


def _scale(facts: dict[str, Any]) -> tuple[Callable[[int], float], Callable[[float], float], list[int]]:
    """Where a day and a value lie, and which values get a rule."""
    values = [value for row in _indexed(facts).values() for value in row]
    step = 5 if max(values) - min(values) < 45 else 10
    low, high = int(min(values) // step) * step, (int(max(values) // step) + 1) * step
    days = len(facts["days"]) - 1

    def x_of(day: int) -> float:
        return LEFT + (RIGHT - LEFT) * day / days

    def y_of(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    return x_of, y_of, list(range(low, high + 1, step))


def _axes(canvas: Canvas, facts: dict[str, Any]) -> None:
    _frame(canvas, facts, "A month of prices", "Each begins at 100")
    x_of, y_of, rules = _scale(facts)
    for value in rules:
        canvas.line([(LEFT, y_of(value)), (RIGHT, y_of(value))], QUIET if value == 100 else RULE, 1)
        canvas.text(LEFT - 14, y_of(value), str(value), 18, QUIET, "rm")
    for day in range(0, len(facts["days"]), 7):
        when = date.fromisoformat(facts["days"][day])
        canvas.text(x_of(day), BOTTOM + 12, f"{when.day} {when:%b}", 18, QUIET, "ma")


def _lines(canvas: Canvas, facts: dict[str, Any]) -> None:
    _axes(canvas, facts)
    x_of, y_of, _ = _scale(facts)
    ends = []
    for (name, row), stone in zip(_indexed(facts).items(), STONES, strict=False):
        canvas.line([(x_of(day), y_of(value)) for day, value in enumerate(row)], stone, 4)
        canvas.dot(x_of(len(row) - 1), y_of(row[-1]), 6, stone)
        ends.append((y_of(row[-1]), name, stone))
    for y, (_, name, stone) in zip(_apart(sorted(ends)), sorted(ends), strict=True):
        change = facts["facts"][name]["month_bps"]
        canvas.text(RIGHT + 22, y, f"{name}  {change / 100:+.1f} %", 20, stone, "lm")


def _apart(ends: list[tuple[float, str, str]], gap: float = 28) -> list[float]:
    """Labels near their lines, without touching each other."""
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    over = max(0.0, places[-1] - BOTTOM) if places else 0.0
    return [y - over for y in places]


def _bars_ground(canvas: Canvas, facts: dict[str, Any]) -> None:
    _frame(canvas, facts, "The last seven days", "Change of price, in percent")
    zero, _ = _bar_scale(facts)
    canvas.line([(LEFT, zero), (WIDTH - 90, zero)], QUIET, 1)


def _bar_scale(facts: dict[str, Any]) -> tuple[float, float]:
    """Where zero lies, and pixels for a basis point."""
    changes = [fact["week_bps"] for fact in facts["facts"].values()]
    high, low = max(0, *changes), min(0, *changes)
    room = BOTTOM - TOP - 110
    per_bps = room / max(high - low, 1)
    return TOP + 40 + high * per_bps, per_bps


def _bars(canvas: Canvas, facts: dict[str, Any]) -> None:
    _bars_ground(canvas, facts)
    zero, per_bps = _bar_scale(facts)
    width = (WIDTH - 90 - LEFT) / len(facts["facts"])
    for position, ((name, fact), stone) in enumerate(zip(facts["facts"].items(), STONES, strict=False)):
        change, middle = fact["week_bps"], LEFT + width * (position + 0.5)
        tip = zero - change * per_bps
        canvas.box(middle - width * 0.28, zero, middle + width * 0.28, tip, stone, 6)
        up = change >= 0
        canvas.text(middle, tip - 12 if up else tip + 12, f"{change / 100:+.1f} %", 26, INK, "mb" if up else "ma")
        canvas.text(middle, BOTTOM + 26, name, 24, INK, "ms")


def _falls_ground(canvas: Canvas, facts: dict[str, Any]) -> None:
    _frame(canvas, facts, "Falls and large days", "Deepest fall from a high, and the largest move of one day")
    for position, (name, stone) in enumerate(zip(facts["facts"], STONES, strict=False)):
        y = TOP + 20 + 98 * position
        canvas.box(LEFT, y, WIDTH - 90, y + 82, CARD, 10)
        canvas.box(LEFT, y, LEFT + 8, y + 82, stone, 4)
        canvas.text(LEFT + 32, y + 41, name, 26, INK, "lm")


def _falls(canvas: Canvas, facts: dict[str, Any]) -> None:
    _falls_ground(canvas, facts)
    deepest = max(-fact["fall_bps"] for fact in facts["facts"].values()) or 1
    for position, fact in enumerate(facts["facts"].values()):
        y = TOP + 20 + 98 * position
        canvas.box(310, y + 30, 310 + 330 * -fact["fall_bps"] / deepest + 2, y + 52, BAD, 4)
        canvas.text(666, y + 41, f"{fact['fall_bps'] / 100:.1f} %", 24, INK, "lm")
        when = date.fromisoformat(fact["biggest_day"])
        colour = GOOD if fact["biggest_bps"] >= 0 else BAD
        canvas.text(890, y + 41, f"{fact['biggest_bps'] / 100:+.1f} %", 24, colour, "lm")
        canvas.text(1_020, y + 41, f"on {when.day} {when:%B}", 20, QUIET, "lm")


def _closing(canvas: Canvas, facts: dict[str, Any]) -> None:
    _empty(canvas, facts)
    canvas.text(WIDTH / 2, 190, "Made by agents who hired each other", 46, INK, "ma")
    roles = ("analyst", "chart maker", "narrator", "editor")
    for position, (role, stone) in enumerate(zip(roles, STONES, strict=False)):
        x = 160 + 250 * position
        canvas.box(x, 300, x + 210, 380, CARD, 12)
        canvas.box(x, 300, x + 210, 308, stone, 4)
        canvas.text(x + 105, 346, role, 26, INK, "mm")
        if position < 3:
            canvas.line([(x + 220, 341), (x + 240, 341)], QUIET, 2)
            canvas.line([(x + 233, 335), (x + 240, 341), (x + 233, 347)], QUIET, 2)
    canvas.text(WIDTH / 2, 432, "Each was paid through an escrow, for work that a referee had checked", 24, QUIET, "ma")
