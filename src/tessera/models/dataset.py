"""Tokens to train on, and batches by name.

A microbatch is named (seed, step, index); every peer that holds the same dataset derives the same ids, so no token
id crosses a wire. Validation windows are fixed: the same tokens at the first step and the last, on every machine.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.models.corpus import Corpus
from tessera.models.noise import integers
from tessera.models.tokenizer import END, Tokenizer

__all__ = ["Dataset", "batch", "tokenize", "validation_windows"]

_MAGIC = b"tessera/data/1\n\0"
_HEADER = len(_MAGIC) + 24


@dataclass(frozen=True)
class Dataset:
    """Token ids of both splits, documents joined by END. Read-only arrays."""

    vocab_size: int
    train: NDArray[np.uint16]
    validation: NDArray[np.uint16]

    def to_bytes(self) -> bytes:
        """Magic, three little-endian 8-byte numbers (vocabulary, lengths), both arrays. Two bytes for each token."""
        sizes = np.array([self.vocab_size, self.train.size, self.validation.size], dtype="<u8")
        return b"".join(
            (_MAGIC, sizes.tobytes(), self.train.astype("<u2").tobytes(), self.validation.astype("<u2").tobytes())
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Dataset:
        """Raises: Invalid: not a dataset, cut short, or ids outside its vocabulary."""
        if len(data) < _HEADER or not data.startswith(_MAGIC):
            raise Invalid("not a dataset: its first bytes differ")
        vocab_size, train, validation = (int(n) for n in np.frombuffer(data, "<u8", 3, len(_MAGIC)))
        if not 2 <= vocab_size <= 65_536 or len(data) != _HEADER + 2 * (train + validation):
            raise Invalid(f"a dataset of {train} + {validation} tokens in {len(data)} bytes cannot be")
        ids = np.frombuffer(data, "<u2", train + validation, _HEADER).astype(np.uint16)
        return _checked(cls(vocab_size, ids[:train], ids[train:]))

    def digest(self) -> str:
        """SHA-256 of `to_bytes`, 64 hex digits: the name under which a run refers to it."""
        return sha256(self.to_bytes()).hex()


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> Dataset:
    """Both splits as token ids."""

    def join(texts: tuple[str, ...]) -> NDArray[np.uint16]:
        end = np.array([END], dtype=np.uint16)
        parts = [part for ids in tokenizer.encode_all(texts) for part in (ids, end)]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    return _checked(Dataset(tokenizer.vocab_size, join(corpus.train), join(corpus.validation)))


def batch(dataset: Dataset, seed: int, step: int, index: int, sequences: int, length: int) -> NDArray[np.int64]:
    """Microbatch (seed, step, index): ids [sequences, length + 1], windows of the training split at random.

    Raises: Invalid: the split is shorter than one window.
    """
    starts = integers(sequences, _room(dataset.train, length), "batch", seed, step, index)
    return dataset.train[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def validation_windows(dataset: Dataset, count: int, length: int) -> NDArray[np.int64]:
    """At most `count` windows [n, length + 1], spread evenly over the validation split, without overlap of targets.

    Raises: Invalid: the split is shorter than one window.
    """
    room = _room(dataset.validation, length)
    count = max(1, min(count, (room + length - 1) // length))
    starts = np.arange(count) * (room - 1) // max(1, count - 1)
    return dataset.validation[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def _room(ids: NDArray[np.uint16], length: int) -> int:
    """How many windows of `length` + 1 tokens start in `ids`."""
    if length < 1 or ids.size < length + 1:
        raise Invalid(f"a split of {ids.size} tokens is shorter than one window of {length} + 1: give it more text")
    return int(ids.size) - length


def _checked(dataset: Dataset) -> Dataset:
    for ids in (dataset.train, dataset.validation):
        if ids.size == 0 or int(ids.max()) >= dataset.vocab_size:
            raise Invalid("a dataset needs tokens in both splits, all within its vocabulary")
        ids.flags.writeable = False
    return dataset
