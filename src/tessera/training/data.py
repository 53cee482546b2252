"""A run's microbatches by name: (data set, run, step, index) fixes the tokens, so none ever crosses the wire."""

from __future__ import annotations

from typing import Any

from tessera.core.errors import Invalid
from tessera.models.dataset import Dataset, batch, validation_windows
from tessera.training.manifest import Manifest

__all__ = ["NamedBatches"]


class NamedBatches:
    """What a session reads; every worker of a run computes the same.

    Raises: Invalid when the data set does not fit the manifest's model, or holds too little text to validate on.
    """

    def __init__(self, manifest: Manifest, dataset: Dataset) -> None:
        schedule = manifest.schedule
        if dataset.vocab_size != manifest.model.model.vocab_size:
            raise Invalid(
                f"the data set has {dataset.vocab_size} tokens, the model expects {manifest.model.model.vocab_size}"
            )
        self._dataset = dataset
        self._seed = int(manifest.run_id[:15], 16)
        self._sequences, self._length = schedule.sequences, schedule.length
        windows = validation_windows(dataset, schedule.evaluate_batches * schedule.sequences, schedule.length)
        self._validation = windows[: len(windows) // schedule.sequences * schedule.sequences]
        if len(self._validation) == 0:
            raise Invalid(f"the validation text holds {len(windows)} windows, at least {schedule.sequences} needed")

    def train(self, step: int, index: int) -> Any:
        """Token ids [sequences, length + 1]."""
        return batch(self._dataset, self._seed, step, index, self._sequences, self._length)

    def validation(self, index: int) -> Any:
        """Fixed validation windows, same shape."""
        return self._validation[index * self._sequences : (index + 1) * self._sequences]

    @property
    def validation_count(self) -> int:
        return len(self._validation) // self._sequences
