"""What the tests of data sets share: small sets in a store, and a source whose documents are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core.ids import BlobId
from tessera.models.dataset import DatasetIndex, Shard, id_type
from tessera.p2p.blobs import BlobStore


def put_dataset(
    blobs: BlobStore, vocab_size: int, tokenizer: BlobId, train: Sequence[NDArray[Any]], validation: NDArray[Any]
) -> BlobId:
    """A data set of these shards, in `blobs`; its index."""

    def put(ids: NDArray[Any]) -> Shard:
        return Shard(blobs.put(ids.astype(id_type(vocab_size)).tobytes()), len(ids))

    index = DatasetIndex(vocab_size, tokenizer, tuple(put(ids) for ids in train), put(validation))
    return blobs.put(index.to_bytes())


def random_ids(seed: int, count: int, vocab_size: int = 300) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def write(folder: Path, names: dict[str, bytes]) -> None:
    for name, data in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
