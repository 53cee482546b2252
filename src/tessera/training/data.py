"""A run's microbatches by name: (recipe, run id, step, index) fixes the tokens, so none ever crosses the wire.

A worker keeps only the shards that its schedule needs soon. `ready(step)` brings those of one step and lets go of what
lies behind; `keep_ahead`, beside it, brings those of the steps to come. Of each set no more than two groups of `active`
shards are here at a time, or what one step touches, if that is more; besides, the index and the validation shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import structlog
from anyio import to_thread
from numpy.typing import NDArray

from tessera.core.errors import Conflict, Invalid, TesseraError
from tessera.core.ids import BlobId
from tessera.models.dataset import DatasetIndex, Shard, open_shard, read_index, rows, validation_windows
from tessera.models.dataset_order import Mix, WindowOrder
from tessera.training.data_shelf import Fetch, Release, Shelf
from tessera.training.manifest import Manifest

__all__ = ["AHEAD", "Fetch", "NamedBatches", "Release", "apportion", "open_batches"]

log = structlog.get_logger()

AHEAD = 32  # steps whose shards are fetched before they are due
RETRY_S = 5.0
HELD = "data.json"


async def open_batches(manifest: Manifest, fetch: Fetch, release: Release, folder: Path) -> NamedBatches:
    """What a worker of `manifest` reads: fetches the sets' indexes and validation shards, and checks them.

    Args:
        fetch: have this blob here and keep it until it is released; returns the file with its bytes. It is asked for
            the same blob again after a failure, after a restart, and when the blob was released before. Its deadline
            is its own.
        release: this blob is not needed soon: it may be evicted. Called in a thread; may block; must not raise.
        folder: of this worker and run. `data.json` there notes which blobs are held, so that another life of the
            process lets go of them.

    Raises: Invalid when a set does not fit the manifest, or holds too little text; whatever `fetch` raises.
    """
    vocab_size = manifest.model.model.vocab_size
    shelf = await to_thread.run_sync(Shelf, fetch, release, folder / HELD, vocab_size)
    sets = [await _open_set(manifest, number, shelf) for number in range(len(manifest.data.sets))]
    validation = await _open_validation(manifest, sets, shelf)
    return NamedBatches(manifest, sets, validation, shelf)


@dataclass(frozen=True, slots=True)
class _Set:
    """One set of the recipe."""

    blob: BlobId
    index: DatasetIndex
    order: WindowOrder


class NamedBatches:
    """What a session reads; every worker of a run computes the same. Made by `open_batches`."""

    def __init__(self, manifest: Manifest, sets: Sequence[_Set], validation: NDArray[np.int64], shelf: Shelf) -> None:
        self._schedule = manifest.schedule
        self._mix = Mix([part.weight for part in manifest.data.sets], "mix", manifest.run_id)
        self._sets, self._validation, self._shelf = sets, validation, shelf
        self._step: int | None = None
        self._moved = anyio.Event()

    def train(self, step: int, index: int) -> Any:
        """Token ids [sequences, length + 1]. May run in a thread.

        Raises: Conflict when a shard of it is not here: `ready(step)` comes first.
        """
        schedule = self._schedule
        first = (step * schedule.microbatches + index) * schedule.sequences
        return np.concatenate([self._row(first + place) for place in range(schedule.sequences)])

    def validation(self, index: int) -> Any:
        """Fixed validation windows, same shape."""
        sequences = self._schedule.sequences
        return self._validation[index * sequences : (index + 1) * sequences]

    @property
    def validation_count(self) -> int:
        return len(self._validation) // self._schedule.sequences

    async def ready(self, step: int) -> None:
        """Have everything here that `train(step, …)` reads. Quick when `keep_ahead` has been at work.

        Raises: whatever `fetch` raises; Invalid when a shard is not what its index says.
        """
        self._step = step
        self._moved.set()
        soon, needed = self._soon(step), self._needed(step)
        missing = [shard for shard in needed if shard not in self._shelf.here]
        if missing or not self._shelf.here.keys() <= set(soon):
            await self._shelf.keep_only(soon, self._fixed())
        for number, shard in enumerate(missing):
            log.info("waiting_for_data", step=step, shard=shard.blob, done=number, shards=len(missing))
            await self._shelf.bring(shard)

    async def keep_ahead(self) -> None:
        """Fetch what the coming steps need, until cancelled. Run it beside the sessions; they work without it, too."""
        while True:
            moved, step = self._moved, self._step
            if step is not None and not await self._look_ahead(step):
                await anyio.sleep(RETRY_S)
                continue
            await moved.wait()
            self._moved = anyio.Event()

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _look_ahead(self, step: int) -> bool:
        """Whether all went well."""
        for shard in self._soon(step):
            if (now := self._step) is not None and now != step and shard not in self._soon(now):
                return True  # a session began elsewhere meanwhile
            try:
                await self._shelf.bring(shard)
            except TesseraError as error:
                log.warning("data_not_fetched_ahead", step=step, code=error.code, reason=error.message)
                return False
        return True

    def _row(self, window: int) -> NDArray[np.int64]:
        chosen, number = self._mix.locate(window)
        source = self._sets[chosen]
        reading = source.order.locate(number)
        ids = self._shelf.here.get(source.index.train[reading.shard])
        if ids is None:
            raise Conflict(f"window {window} lies in a shard that is not here: `ready` comes first")
        return rows(ids, [reading.start], self._schedule.length)

    def _needed(self, step: int) -> list[Shard]:
        """What `step` reads, in order, without repeats."""
        groups = (group for chosen in range(len(self._sets)) for group in self._groups(chosen, step, step + 1))
        return list(dict.fromkeys(shard for group in groups for shard in group))

    def _soon(self, step: int) -> list[Shard]:
        """What `step` and the steps after it read: of each set two groups at most, or what `step` needs."""
        soon = dict.fromkeys(self._needed(step))
        end = min(step + 1 + AHEAD, self._schedule.steps)
        for chosen in range(len(self._sets)):
            for _, group in zip(range(2), self._groups(chosen, step, end), strict=False):
                soon.update(dict.fromkeys(group))
        return list(soon)

    def _groups(self, chosen: int, first_step: int, end_step: int) -> Iterator[tuple[Shard, ...]]:
        """The groups of shards that set `chosen` mixes in these steps, in order."""
        per_step, source = self._schedule.microbatches * self._schedule.sequences, self._sets[chosen]
        number, end = (self._mix.count(chosen, step * per_step) for step in (first_step, end_step))
        while number < end:
            shards, number = source.order.shards_of(number)
            yield tuple(source.index.train[shard] for shard in shards)

    def _fixed(self) -> Iterator[BlobId]:
        """What stays for the whole run: small, needed at every start, and worth having for peers that begin."""
        for source in self._sets:
            yield from (source.blob, source.index.validation.blob)


async def _open_set(manifest: Manifest, number: int, shelf: Shelf) -> _Set:
    blob = BlobId(manifest.data.sets[number].index)
    index = await to_thread.run_sync(read_index, await shelf.get(blob))
    model, tokenizer = manifest.model.model, manifest.data.tokenizer
    if index.vocab_size != model.vocab_size:
        raise Invalid(f"data set {blob[:16]}… has {index.vocab_size} tokens, the model expects {model.vocab_size}")
    if index.tokenizer != tokenizer:
        raise Invalid(
            f"data set {blob[:16]}… was cut by tokenizer {index.tokenizer[:16]}…, the run has {tokenizer[:16]}…: "
            f"prepare it again with `tessera data add --tokenizer {tokenizer}`"
        )
    order = WindowOrder(
        [shard.tokens for shard in index.train],
        length=manifest.schedule.length,
        active=manifest.data.active,
        name=("set", manifest.run_id, number),
    )
    return _Set(blob, index, order)


async def _open_validation(manifest: Manifest, sets: Sequence[_Set], shelf: Shelf) -> NDArray[np.int64]:
    """Windows of every set, in proportion to the weights, as far as their texts reach."""
    schedule = manifest.schedule
    counts = apportion(schedule.evaluate_batches * schedule.sequences, [part.weight for part in manifest.data.sets])
    parts = []
    for source, count in zip(sets, counts, strict=True):
        if count:
            shard = source.index.validation
            path = await shelf.get(shard.blob)
            ids = await to_thread.run_sync(open_shard, path, shard, source.index.vocab_size)
            parts.append(validation_windows(ids, count, schedule.length))
    windows = np.concatenate(parts)
    whole = len(windows) // schedule.sequences * schedule.sequences
    if whole == 0:
        raise Invalid(f"the validation text holds {len(windows)} windows, at least {schedule.sequences} needed")
    return windows[:whole]


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in proportion to `weights`, exactly: the remainder goes to the largest fractions, then the lowest index.

    >>> apportion(10, [1, 1, 1])
    [4, 3, 3]
    """
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    fractions = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in fractions[: total - sum(parts)]:
        parts[i] += 1
    return parts
