"""A run's microbatches by name: (data set, run, step, index) fixes the tokens, so none ever crosses the wire."""

from __future__ import annotations

from typing import Any

from tessera.models.corpus import Dataset, batch, validation_batch
from tessera.training.manifest import Manifest

__all__ = ["NamedBatches"]


class NamedBatches:
    """What a session reads; every worker of a run computes the same."""

    def __init__(self, manifest: Manifest, dataset: Dataset) -> None:
        self._dataset = dataset
        self._seed = int(manifest.run_id[:16], 16)
        self._sequences = manifest.schedule.sequences
        self._length = manifest.model.model.context
        self._validation_count = manifest.schedule.evaluate_batches

    def train(self, step: int, index: int) -> Any:
        """Token ids [sequences, context + 1]."""
        return batch(self._dataset, self._seed, step, index, self._sequences, self._length)

    def validation(self, index: int) -> Any:
        """The fixed validation windows number `index`, same shape."""
        return validation_batch(self._dataset, index, self._sequences, self._length)

    @property
    def validation_count(self) -> int:
        return self._validation_count
