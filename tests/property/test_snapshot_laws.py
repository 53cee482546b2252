"""Laws of what page and terminal show."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from tessera.devnet.figures import money, money_column, percent_down, shares_down
from tessera.devnet.snapshot import Income, LossPoint, Owner, Peer, Snapshot, printable, thinned
from tessera.web.mosaic import STONES, income_bar, ownership_bar, tiles

UNITS = st.integers(0, 10**30)
CURVES = st.lists(st.booleans(), max_size=3_000).map(
    lambda vals: [LossPoint(i, i, 1.0, 2.0 if val else None) for i, val in enumerate(vals)]
)


@given(st.text(), st.integers(1, 50))
def test_printable_text_is_short_and_moves_nothing(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert all(char.isprintable() or char == "\u3000" or char.isspace() for char in shown)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)
    assert printable(shown, limit) == shown


@given(CURVES, st.integers(2, 200))
def test_a_thinned_curve_keeps_its_ends_its_order_and_its_bound(points: list[LossPoint], limit: int) -> None:
    kept = thinned(points, limit)
    assert len(kept) <= 2 * limit + 1
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
    if sum(point.val is not None for point in points) <= limit:
        assert [p for p in kept if p.val is not None] == [p for p in points if p.val is not None]


@given(UNITS, st.integers(0, 18))
def test_shares_are_never_shown_as_more_than_they_are(units: int, decimals: int) -> None:
    shown = Fraction(shares_down(units, decimals).replace(",", ""))
    assert 0 <= Fraction(units, 10**18) - shown < Fraction(1, 10**decimals)
    assert Fraction(shares_down(units).replace(",", "")) <= Fraction(units, 10**18)


@given(UNITS, st.integers(0, 18))
def test_money_is_shown_exactly(units: int, decimals: int) -> None:
    income = Income(decimals=decimals)
    for text in (money(units, income), money_column(units, income)):
        assert Fraction(text.removesuffix(" tUSD").replace(",", "")) == Fraction(units, 10**decimals)


@given(st.lists(UNITS, min_size=1, max_size=8))
def test_parts_of_all_never_exceed_all(parts: list[int]) -> None:
    shown = [Fraction(percent_down(part, sum(parts)).removesuffix(" %")) for part in parts]
    assert sum(shown) <= 100


@given(st.tuples(UNITS, UNITS, UNITS, UNITS), st.lists(UNITS, max_size=9), st.lists(UNITS, max_size=5))
def test_bars_have_no_gap_and_fill_the_whole(parts: tuple[int, ...], work: list[int], owned: list[int]) -> None:
    snapshot = Snapshot(
        income=Income(sum(parts), *parts),
        peers=[Peer(str(i), "a", i, shares=shares) for i, shares in enumerate(work)],
        owners=[Owner("a", "data", shares) for shares in owned],
    )
    for bar in (income_bar(snapshot), ownership_bar(snapshot)):
        edge = 0
        for part in bar:
            assert part.start == edge
            assert part.amount > 0
            edge += part.width
        assert edge == (10_000 if bar else 0)


@given(st.integers(0, 600), st.integers(0, 600), st.integers(0, 10**12))
def test_tiles_fill_with_work_and_never_beyond(step: int, steps: int, verified: int) -> None:
    snapshot = Snapshot(
        step=step, steps=steps, tokens=step * 4_096, peers=[Peer("p", "a", 0, verified_tokens=verified)]
    )
    for tile in tiles(snapshot):
        assert 0 <= tile.verified <= STONES
        assert 0 <= tile.trained <= STONES
        assert len(tile.stones) == STONES
