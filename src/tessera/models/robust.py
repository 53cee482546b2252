r"""Averages that a minority cannot drag away: CenteredClip, and what is left of it between two.

    v ← v + Σ_i w_i (x_i − v) min(1, τ / |x_i − v|)        Σ w_i = 1

(Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333, §3; Gorbunov et al. 2022, https://arxiv.org/abs/2106.11257.)
v starts at the median of each coordinate; τ is twice the median of the distances from there, so that among honest
replicas, which lie at about one distance, nothing is clipped and the result is their mean. Moving all x_i moves v with
them: clipping the replicas' values, or their moves from a value that they last agreed on, is the same.

A row that points the other way is as long as the others, and no limit on lengths touches it. So the rows that oppose
the rest are left out first, where that is no chance: among random directions in D dimensions a cosine is 0 ± 1/√D.

Between two there is no majority. A limit on the distance keeps one step of a liar small, and nothing more.

Invariants: only sums, sorts and norms in a given order, so equal input on machines of one kind gives equal bits.

Legend: N replicas, D numbers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from tessera.core.errors import Invalid

__all__ = ["DistanceHistory", "agreeing", "centered_clip", "clipped_pair"]

FACTOR = 2.0  # τ over the median distance
ITERATIONS = 5
OPPOSED = 2.0  # standard deviations of a sum of chance cosines
REMEMBERED = 16  # distances
NEEDED = 4  # distances before a limit says anything


@torch.no_grad()
def centered_clip(x_ND: Float[Tensor, "N D"], weights: list[float] | None = None) -> Float[Tensor, " D"]:
    """The robust mean of the rows of `x_ND`, finite numbers in float32.

    With at least four rows, one of which is arbitrary, the result stays within 2 × the honest rows' largest distance
    from each other of their mean (`tests/property/test_models_robust_laws.py`). Two rows give their mean.

    Args:
        weights: one for each row, ≥ 0, not all zero; None: equal ones.

    Raises: Invalid: no rows, or weights that are none.

    Cost: about 20 passes over `x_ND`.
    """
    if len(x_ND) < 1:
        raise Invalid("an average needs at least one row")
    share = _shares(len(x_ND), weights)
    v = _coordinate_median(x_ND)
    limit = FACTOR * _middle(_norms(x_ND - v))
    for _ in range(ITERATIONS):
        away = x_ND - v
        v = v + sum(weight * row for weight, row in zip(share, _clip(away, limit), strict=True))
    return v


@torch.no_grad()
def agreeing(tensors: Sequence[Float[Tensor, "N D"]]) -> list[int]:
    """The rows that do not point against the rest, in their order: always more than half of them.

    The worst goes first, and the others are judged anew: beside a liar, honest rows have less agreement too.

    Args:
        tensors: the same rows' parts in several tensors, which all count: much weak evidence is strong evidence.
    """
    evidence = torch.stack([_cosines(x_ND) * math.sqrt(x_ND.size(1)) for x_ND in tensors])
    chance_NN = evidence.sum(0) / math.sqrt(len(tensors))  # among chance directions, each is 0 ± 1
    count = len(tensors[0])
    left = list(range(count))
    while len(left) > 2 and 2 * (len(left) - 1) > count:
        agreement = {i: sum(float(chance_NN[i, j]) for j in left if j != i) for i in left}
        worst = min(left, key=lambda i: agreement[i])
        if agreement[worst] >= -OPPOSED * math.sqrt(len(left) - 1):
            break
        left.remove(worst)
    return left


def _cosines(x_ND: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True, dtype=torch.float64)
    unit_ND = torch.where(lengths > 0, x_ND / lengths, 0.0)
    return unit_ND @ unit_ND.mT


@torch.no_grad()
def clipped_pair(x_2D: Float[Tensor, "2 D"]) -> Float[Tensor, " D"]:
    """The mean of two moves after the longer one is cut to twice the length of the shorter.

    Bounds what ten times too much does; against a move in the wrong direction, two replicas have no remedy.
    """
    lengths = _norms(x_2D)
    rows = _clip(x_2D, FACTOR * min(lengths))
    return 0.5 * rows[0] + 0.5 * rows[1]


class DistanceHistory:
    """How far apart two replicas usually are; from that, how far apart one believes they can be."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {}

    @torch.no_grad()
    def mean(self, name: str, own: Float[Tensor, " D"], other: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
        """The mean of both, where `other` counts as no further away than twice the median distance so far.

        Args:
            name: of what these numbers belong to; each name has its own history.
        """
        seen = self._seen.setdefault(name, deque(maxlen=REMEMBERED))
        limit = FACTOR * median(seen) if len(seen) >= NEEDED else math.inf
        away = (other - own)[None]
        distance = min(_norms(away)[0], FACTOR * limit)  # one outlier must not teach us to expect more of them
        if distance > 0:  # before the first step everything is equal, which says nothing of later
            seen.append(distance)
        return own + 0.5 * _clip(away, limit)[0]


def _clip(away_ND: Tensor, limit: float) -> list[Tensor]:
    """The rows, none longer than `limit`. A row too long for float32 counts as nothing: its direction is lost."""
    factors = [1.0 if length <= limit else limit / length for length in _norms(away_ND)]
    return [
        row * f if math.isfinite(f) and f > 0 else torch.zeros_like(row)
        for row, f in zip(away_ND, factors, strict=True)
    ]


def _norms(x_ND: Tensor) -> list[float]:
    """Summed in float64: the squares of large float32 numbers overflow."""
    return [float(norm) for norm in torch.linalg.vector_norm(x_ND, dim=1, dtype=torch.float64)]


def _coordinate_median(x_ND: Tensor) -> Tensor:
    ordered = x_ND.sort(0).values
    low, high = ordered[(len(x_ND) - 1) // 2], ordered[len(x_ND) // 2]
    return 0.5 * low + 0.5 * high


def _middle(values: list[float]) -> float:
    """The lower median: of two distances the smaller one, which a single liar cannot raise."""
    return sorted(values)[(len(values) - 1) // 2]


def _shares(count: int, weights: list[float] | None) -> list[float]:
    given = [1.0] * count if weights is None else weights
    if len(given) != count or not all(0 <= w < math.inf for w in given) or not sum(given) > 0:
        raise Invalid(f"{count} rows need as many weights, at least one over zero, not {given}")
    return [w / sum(given) for w in given]
