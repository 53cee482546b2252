"""What counting alone achieves: the losses that a trained model has to beat, in nats per token.

Counts come from the training split; losses are means over the same targets as the model's validation loss. The
bigram model is the best of several smoothings (modified Kneser-Ney, absolute discounting and additive, each over a
grid), chosen on the validation targets themselves, which favours it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tessera.models.dataset import Dataset

__all__ = ["bigram_loss", "unigram_loss"]

_DISCOUNTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_CONSTANTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def unigram_loss(dataset: Dataset, windows: NDArray[np.int64]) -> float:
    """Mean loss of token frequencies (one added to each count) over the targets windows[:, 1:]."""
    return float(-np.log(_unigram(dataset)[windows[:, 1:]]).mean())


def bigram_loss(dataset: Dataset, windows: NDArray[np.int64]) -> float:
    """Mean loss of the best smoothed bigram model over the targets windows[:, 1:]. Cost: O(n log n) in tokens."""
    counts = _Pairs(dataset, windows[:, :-1].ravel(), windows[:, 1:].ravel())
    return min(float(-np.log(p).mean()) for p in counts.probabilities())


def _unigram(dataset: Dataset) -> NDArray[np.float64]:
    counts = np.bincount(dataset.train, minlength=dataset.vocab_size) + 1.0
    return counts / counts.sum()


class _Pairs:
    """Counts of the pairs (before, target) at hand and of everything that smoothing needs."""

    def __init__(self, dataset: Dataset, before: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        v = dataset.vocab_size
        train = dataset.train.astype(np.int64)
        pairs, counts = np.unique(train[:-1] * v + train[1:], return_counts=True)
        left, right = pairs // v, pairs % v
        wanted = before * v + target
        at = np.minimum(np.searchsorted(pairs, wanted), pairs.size - 1)
        self.count = np.where(pairs[at] == wanted, counts[at], 0).astype(np.float64)
        self.total = np.bincount(left, counts, v)[before]  # tokens seen after `before`
        self.kinds = [np.bincount(left[m], minlength=v)[before] for m in (counts == 1, counts == 2, counts > 2)]
        self.of_counts = [int((counts == n).sum()) for n in (1, 2, 3, 4)]
        self.unigram = _unigram(dataset)[target]
        spread = np.bincount(right, minlength=v) + 0.5  # different tokens seen before: Kneser-Ney's unigram
        self.continuation = (spread / spread.sum())[target]

    def probabilities(self) -> Iterator[NDArray[np.float64]]:
        """p(target | before) under each smoothing."""
        for lower in (self.unigram, self.continuation):
            yield self._discounted(self._kneser_ney_discounts(), lower)
            for d in _DISCOUNTS:
                yield self._discounted((d, d, d), lower)
                yield self._discounted((d, min(1.0, d + 0.3), min(1.0, d + 0.5)), lower)
            for alpha in _CONSTANTS:
                strength = alpha * 1024
                yield (self.count + strength * lower) / (self.total + strength)

    def _kneser_ney_discounts(self) -> tuple[float, float, float]:
        """Chen and Goodman 1998, equation 26; the plain 0.75 where counts are too few for it."""
        n1, n2, n3, n4 = self.of_counts
        if not (n1 and n2 and n3):
            return (0.75, 0.75, 0.75)
        y = n1 / (n1 + 2 * n2)
        return tuple(
            min(max(d, 0.05), n - 0.05)
            for n, d in enumerate((1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3), start=1)
        )  # type: ignore[return-value]

    def _discounted(self, discounts: tuple[float, float, float], lower: NDArray[np.float64]) -> NDArray[np.float64]:
        taken = np.choose(np.clip(self.count, 0, 3).astype(int), (0.0, *discounts))
        saved = sum(d * kind for d, kind in zip(discounts, self.kinds, strict=True))
        total = np.maximum(self.total, 1.0)
        known = (self.count - taken + saved * lower) / total
        return np.where(self.total > 0, known, lower)
