"""Data sets: token ids in shards, which an index lists.

A shard is a file of little-endian token ids and nothing else: two bytes each, four when the vocabulary is larger than
65,536. The index is canonical JSON that names every shard by its blob id, so that whoever knows the index's blob id
knows every token. The training split has many shards; the validation split has one, which every worker can hold.

    {"description", "format": "tessera/data/2", "tokenizer": blob id, "train": [[blob id, tokens], …],
     "validation": [blob id, tokens], "vocab_size"}

Shards are mapped into memory, not read: a set may be larger than the machine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.ids import BlobId, parse_blob_id

__all__ = [
    "INDEX_LIMIT", "SHARD_TOKENS", "VALIDATION_TOKENS", "VOCABULARY_LIMIT", "Dataset", "DatasetIndex", "Ids", "Shard",
    "id_type", "open_shard", "read_index", "rows",
    "validation_windows",
]  # fmt: skip

Ids = NDArray[Any]  # unsigned, two or four bytes each

FORMAT = "tessera/data/2"
INDEX_LIMIT = 8 * 2**20  # bytes
SHARDS_LIMIT = 65_536  # 275 billion tokens in shards of the usual size
SHARD_LIMIT = 2**26  # tokens of one shard
SHARD_TOKENS = 4 * 2**20  # the usual size: 8 MB
VALIDATION_TOKENS = 2**20  # what preparation puts aside at most
VOCABULARY_LIMIT = 2**20
DESCRIPTION_LIMIT = 200  # characters
_CHECKED_AT_ONCE = 2**20  # ids: bounds what checking a shard holds in memory


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a part of a split is: its blob, and how many tokens that holds."""

    blob: BlobId
    tokens: int

    @classmethod
    def from_value(cls, value: object) -> Shard:
        if not isinstance(value, list) or len(value) != 2 or type(value[1]) is not int:
            raise Invalid(f"a shard is [blob id, tokens], not {str(value)[:80]}")
        if not 1 <= value[1] <= SHARD_LIMIT:
            raise Invalid(f"a shard has 1 to {SHARD_LIMIT} tokens, not {str(value[1])[:40]}")
        return cls(parse_blob_id(value[0]), value[1])

    def to_value(self) -> list[Any]:
        return [self.blob, self.tokens]


@dataclass(frozen=True, slots=True)
class DatasetIndex:
    """What a data set consists of."""

    vocab_size: int
    tokenizer: BlobId
    train: tuple[Shard, ...]
    validation: Shard
    description: str = ""

    @property
    def tokens(self) -> int:
        """Of both splits."""
        return sum(shard.tokens for shard in self.train) + self.validation.tokens

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Of both splits."""
        return (*self.train, self.validation)

    def to_bytes(self) -> bytes:
        """Raises `Invalid` for an index that nobody could read back."""
        data = encoding.encode(
            {
                "description": self.description,
                "format": FORMAT,
                "tokenizer": self.tokenizer,
                "train": [shard.to_value() for shard in self.train],
                "validation": self.validation.to_value(),
                "vocab_size": self.vocab_size,
            }
        )
        DatasetIndex.parse(data)
        return data

    @classmethod
    def parse(cls, data: bytes) -> DatasetIndex:
        """Raises: Invalid: too large, not canonical, or a number out of bounds."""
        value = encoding.decode(data, INDEX_LIMIT)
        fields = {"description", "format", "tokenizer", "train", "validation", "vocab_size"}
        if not isinstance(value, dict) or value.keys() != fields or value["format"] != FORMAT:
            raise Invalid(f"not a data set's index: expected the fields {', '.join(sorted(fields))} of {FORMAT}")
        vocab_size, train, description = value["vocab_size"], value["train"], value["description"]
        if type(vocab_size) is not int or not 2 <= vocab_size <= VOCABULARY_LIMIT:
            raise Invalid(f"a data set's vocabulary has 2 to {VOCABULARY_LIMIT} tokens, not {str(vocab_size)[:40]}")
        if not isinstance(train, list) or not 1 <= len(train) <= SHARDS_LIMIT:
            raise Invalid(f"a data set has 1 to {SHARDS_LIMIT} shards to train on")
        if not isinstance(description, str) or len(description) > DESCRIPTION_LIMIT:
            raise Invalid(f"a data set's description is text of up to {DESCRIPTION_LIMIT} characters")
        return cls(
            vocab_size,
            parse_blob_id(value["tokenizer"]),
            tuple(Shard.from_value(shard) for shard in train),
            Shard.from_value(value["validation"]),
            description,
        )


@dataclass(frozen=True)
class Dataset:
    """Both splits of a small data set in memory, as measured and trained on in one process."""

    vocab_size: int
    train: Ids
    validation: Ids

    def __post_init__(self) -> None:
        for ids in (self.train, self.validation):
            _check_ids(ids, self.vocab_size)


def id_type(vocab_size: int) -> np.dtype[Any]:
    """How a shard stores an id."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


def read_index(path: Path) -> DatasetIndex:
    """The index in the file `path`. Raises: Invalid: too large, or no index."""
    if (size := path.stat().st_size) > INDEX_LIMIT:
        raise Invalid(f"a data set's index of {size} bytes: at most {INDEX_LIMIT} expected")
    return DatasetIndex.parse(path.read_bytes())


def open_shard(path: Path, shard: Shard, vocab_size: int) -> Ids:
    """The ids in the file `path`, mapped into memory, read-only; they stay readable when the file is removed.

    Raises: Invalid: another size than the index says, or an id outside the vocabulary.  Cost: one read of the file.
    """
    dtype = id_type(vocab_size)
    size = path.stat().st_size
    if size != shard.tokens * dtype.itemsize:
        raise Invalid(
            f"shard {shard.blob[:16]}… has {size} bytes, expected {dtype.itemsize} for each of {shard.tokens} tokens"
        )
    ids: Ids = np.memmap(path, dtype=dtype, mode="r")
    _check_ids(ids, vocab_size)
    return ids


def validation_windows(ids: Ids, count: int, length: int) -> NDArray[np.int64]:
    """At most `count` windows [n, length + 1], spread evenly over the validation split, without overlap of targets.

    Raises: Invalid: the split is shorter than one window.
    """
    if length < 1 or ids.size < length + 1:
        raise Invalid(f"a split of {ids.size} tokens is shorter than one window of {length} + 1: give it more text")
    room = int(ids.size) - length
    count = max(1, min(count, (room + length - 1) // length))
    starts = np.arange(count) * (room - 1) // max(1, count - 1)
    return rows(ids, starts.tolist(), length)


def rows(ids: Ids, starts: Sequence[int], length: int) -> NDArray[np.int64]:
    """The windows [n, length + 1] that begin at `starts`."""
    return np.asarray(ids[np.asarray(starts)[:, None] + np.arange(length + 1)], dtype=np.int64)


def _check_ids(ids: Ids, vocab_size: int) -> None:
    if ids.size == 0:
        raise Invalid("a data set needs tokens in both splits")
    for start in range(0, ids.size, _CHECKED_AT_ONCE):
        highest = int(ids[start : start + _CHECKED_AT_ONCE].max())
        if highest >= vocab_size:
            raise Invalid(f"a data set holds the id {highest}, its vocabulary has {vocab_size} tokens")
