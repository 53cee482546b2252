"""Dividing a whole among several, exactly: the parts are integers and add up to the whole."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.core.errors import Invalid

__all__ = ["split"]


def split(total: int, scores: Sequence[int]) -> list[int]:
    r"""Split `total` in proportion to `scores`, exactly.

        share_i = floor(total · s_i / Σs) + {0, 1}

    The remainder goes to the largest fractions, then to the lowest index.

    Args:
        total: smallest unit of the asset, ≥ 0.
        scores: one for each worker, any scale, ≥ 0, not all zero.

    Returns:
        Same length as `scores`; sums to `total`. A score of zero gets nothing.

    Raises:
        Invalid: a negative score, all zero, or anything that is not an int.

    Cost: O(n log n). Source: Hamilton's method.

    >>> split(100, [1, 1, 1])
    [34, 33, 33]
    >>> split(7, [0, 2, 1])
    [0, 5, 2]
    """
    if any(type(number) is not int for number in (total, *scores)):
        raise Invalid("a total and its scores are ints")
    if total < 0 or any(score < 0 for score in scores):
        raise Invalid(f"a total and its scores are ≥ 0, not {total} and {min(scores, default=0)}")
    whole = sum(scores)
    if whole == 0:
        raise Invalid("nothing to split by: there is no score above zero")
    parts = [total * score // whole for score in scores]
    by_fraction = sorted(range(len(scores)), key=lambda i: (-(total * scores[i] % whole), i))
    for i in by_fraction[: total - sum(parts)]:
        parts[i] += 1
    return parts
