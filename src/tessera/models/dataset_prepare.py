"""From text to a data set: tokenised once, in one pass, into shards whose blob ids the index lists.

Memory holds a shard and the validation split, however large the text is. Whenever a shard is full, what was done is
noted in a folder; a preparation that is killed goes on from there when the same files, tokenizer and sizes are given
again, and otherwise begins anew. Equal text gives equal shards, whether or not it was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from tessera.core import encoding
from tessera.core.errors import Invalid, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId
from tessera.models.corpus import Piece, Skipped, Source
from tessera.models.dataset import (
    DESCRIPTION_LIMIT,
    SHARD_LIMIT,
    SHARD_TOKENS,
    SHARDS_LIMIT,
    VALIDATION_TOKENS,
    DatasetIndex,
    Shard,
    id_type,
)  # fmt: skip
from tessera.models.tokenizer import END, Tokenizer, train_tokenizer

__all__ = ["Prepared", "Progress", "Store", "prepare_dataset", "train_on"]

log = structlog.get_logger()

MINIMUM = 16 * 2**10  # bytes of text, under which nothing is learned
MINIMUM_SHARD = 256  # tokens
SAMPLE_BYTES = 64 * 2**20  # of text that a tokenizer is trained on
_BATCH_BYTES = 2 * 2**20  # of text that is tokenised at once
_VALIDATION = 16  # one token in so many, when no document fell on that side
_NOTE = "progress.json"
_NOTE_LIMIT = 16 * 2**20
_ASIDE = "validation.ids"


Progress = Callable[[int, int], None]


class Store(Protocol):
    """Keeps blobs; `tessera.p2p.blobs.BlobStore` does."""

    def put(self, source: Path) -> BlobId: ...
    def path(self, blob: BlobId) -> Path: ...
    def has(self, blob: BlobId) -> bool: ...


@dataclass(frozen=True)
class Prepared:
    """A data set that is ready."""

    blob: BlobId  # of its index
    index: DatasetIndex
    skipped: Skipped
    text_bytes: int


@dataclass
class _Progress:
    """What is done: everything before `offset` of file `file`. `aside_*` are about the validation split so far."""

    key: str
    file: int = 0
    offset: int = 0
    text_bytes: int = 0
    aside_tokens: int = 0
    aside_digest: str = ""
    shards: list[list[Any]] = field(default_factory=list)
    skipped: dict[str, Any] = field(default_factory=lambda: asdict(Skipped()))


@dataclass(frozen=True)
class _Place:
    """Where a piece begins, and what had been skipped before it."""

    file: int
    offset: int
    skipped: Skipped


_Read = tuple[_Place, Piece]


def train_on(source: Source, vocab_size: int) -> Tokenizer:
    """A tokenizer for this text: trained on all of it, or on 64 MiB, of each file in proportion to its size.

    Raises: Invalid: no text, or a vocabulary that cannot be.
    """
    texts = list(_sample(source, SAMPLE_BYTES))
    if not texts:
        raise Invalid(f"nothing to learn from {source.description}: it holds no text")
    return train_tokenizer(texts, vocab_size)


def prepare_dataset(
    source: Source,
    tokenizer: Tokenizer,
    tokenizer_blob: BlobId,
    *,
    store: Store,
    folder: Path,
    description: str = "",
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Prepared:
    """Tokenise `source` into shards; `store` keeps them and the index.

    Args:
        folder: where progress is noted; this preparation's alone, removed when it is complete.
        shard_tokens: most tokens of a shard.
        progress: told now and then how many bytes of text and how many shards are done.

    Raises: Invalid: too little text, too many bad rows; Unavailable: the disk is full, and what was done is kept.
    """
    if not MINIMUM_SHARD <= shard_tokens <= SHARD_LIMIT:
        raise Invalid(f"a shard has {MINIMUM_SHARD} to {SHARD_LIMIT} tokens, not {shard_tokens}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = _Preparation(source, tokenizer, tokenizer_blob, store, folder, shard_tokens)
        work.read(progress or (lambda text_bytes, shards: None))
        prepared = work.finish(description or source.description)
        shutil.rmtree(folder)
        return prepared
    except OSError as error:
        raise Unavailable(
            f"cannot write in {folder}: {error.strerror or error}; make room and start again, it goes on from here"
        ) from error


class _Preparation:
    """One pass over a source. `_buffer` is the shard that fills."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, blob: BlobId, store: Store, folder: Path, shard_tokens: int
    ) -> None:
        self._source, self._tokenizer, self._blob, self._store, self._folder = source, tokenizer, blob, store, folder
        self._limit, self._dtype = shard_tokens, id_type(tokenizer.vocab_size)
        key = sha256(f"{source.fingerprint()} {blob} {shard_tokens}".encode()).hex()
        self._done, aside = _resume(folder, key, self._dtype, store)
        self._aside, self._aside_tokens = [aside], int(aside.size)
        self._skipped = Skipped(**self._done.skipped)
        self._shards = [Shard.from_value(shard) for shard in self._done.shards]
        self._buffer: list[NDArray[Any]] = []
        self._filled = 0
        self._text_bytes = self._done.text_bytes

    def read(self, progress: Progress) -> None:
        """All pieces, from where the last preparation stood."""
        for batch in _batches(self._pieces()):
            encoded = self._tokenizer.encode_all([piece.text for _, piece in batch])
            for (place, piece), ids in zip(batch, encoded, strict=True):
                part = (np.append(ids, END) if piece.ends else ids).astype(self._dtype)
                if piece.aside and self._aside_tokens < VALIDATION_TOKENS:
                    self._aside.append(part)
                    self._aside_tokens += part.size
                else:
                    self._add(part, place)
                self._text_bytes += len(piece.text.encode())
            progress(self._text_bytes, len(self._shards))

    def finish(self, description: str) -> Prepared:
        train = np.concatenate(self._buffer) if self._buffer else np.zeros(0, self._dtype)
        if self._text_bytes < MINIMUM:
            raise Invalid(
                f"{self._source.description} holds {self._text_bytes} bytes of text, at least {MINIMUM} expected"
                + "".join(f"; {reason}" for reason in self._skipped.reasons)
            )
        aside = np.concatenate(self._aside)
        if aside.size == 0:  # no document fell on that side: the end of the text does
            total = train.size + sum(shard.tokens for shard in self._shards)
            wanted = max(1, min(total // _VALIDATION, VALIDATION_TOKENS))
            while train.size <= wanted and self._shards:
                train = np.concatenate([np.fromfile(self._store.path(self._shards.pop().blob), self._dtype), train])
            train, aside = train[:-wanted], train[-wanted:]
        elif train.size == 0 and not self._shards:  # all of them did
            cut = aside.size - max(1, aside.size // _VALIDATION)
            train, aside = aside[:cut], aside[cut:]
        for start in range(0, train.size, self._limit):
            self._shards.append(self._shard(train[start : start + self._limit]))
        index = DatasetIndex(
            self._tokenizer.vocab_size, self._blob, tuple(self._shards), self._shard(aside),
            description[:DESCRIPTION_LIMIT],
        )  # fmt: skip
        return Prepared(self._keep(index.to_bytes()), index, self._skipped, self._text_bytes)

    def _pieces(self) -> Iterator[_Read]:
        offset = self._done.offset
        for file in range(self._done.file, len(self._source.files)):
            place = _Place(file, offset, self._skipped.copy())
            for piece in self._source.read(file, offset, self._skipped):
                yield place, piece
                place = _Place(file, piece.after, self._skipped.copy())
            offset = 0

    def _add(self, ids: NDArray[Any], place: _Place) -> None:
        """Into the buffer; when that would be too full, it becomes a shard, and what is done is noted."""
        if self._filled and self._filled + ids.size > self._limit:
            self._seal()
            self._save(place)
        while ids.size:  # more than once only for a piece that is longer than a shard
            part, ids = ids[: self._limit], ids[self._limit :]
            self._buffer.append(part)
            self._filled += part.size
            if ids.size:
                self._seal()

    def _seal(self) -> None:
        if len(self._shards) == SHARDS_LIMIT:
            raise Invalid(f"a data set has at most {SHARDS_LIMIT} shards: make them larger, or several sets")
        self._shards.append(self._shard(np.concatenate(self._buffer)))
        self._buffer, self._filled = [], 0
        log.info("shard_ready", shards=len(self._shards), megabytes=round(self._text_bytes / 1e6, 1))

    def _shard(self, ids: NDArray[Any]) -> Shard:
        return Shard(self._keep(ids.astype(self._dtype).tobytes()), int(ids.size))

    def _keep(self, data: bytes) -> BlobId:
        file = self._folder / "blob"
        file.write_bytes(data)
        blob = self._store.put(file)
        file.unlink()
        return blob

    def _save(self, place: _Place) -> None:
        self._aside = [np.concatenate(self._aside)]
        aside = self._aside[0].tobytes()
        done = _Progress(
            self._done.key, place.file, place.offset, self._text_bytes, self._aside_tokens, sha256(aside).hex(),
            [shard.to_value() for shard in self._shards], asdict(place.skipped),
        )  # fmt: skip
        _write(self._folder / _ASIDE, aside)
        _write(self._folder / _NOTE, encoding.encode(asdict(done)))  # last: until then the older note is in force


def _resume(folder: Path, key: str, dtype: np.dtype[Any], store: Store) -> tuple[_Progress, NDArray[Any]]:
    """What an earlier preparation left, if it was of the same; else a beginning."""
    fresh = _Progress(key), np.zeros(0, dtype)
    try:
        with (folder / _NOTE).open("rb") as file:
            done = _Progress(**encoding.decode(file.read(_NOTE_LIMIT + 1), _NOTE_LIMIT))
        aside = np.fromfile(folder / _ASIDE, dtype)
    except FileNotFoundError:
        return fresh
    except (OSError, Invalid, TypeError) as error:
        log.warning("progress_unreadable", folder=str(folder), reason=str(error))
        return fresh
    # The longer validation split of a preparation that was killed between the two writes begins with ours.
    aside = aside[: done.aside_tokens]
    if done.key != key or sha256(aside.tobytes()).hex() != done.aside_digest:
        log.info("preparation_begins_anew", reason="files, tokenizer or sizes have changed")
        return fresh
    if not all(store.has(Shard.from_value(shard).blob) for shard in done.shards):
        log.info("preparation_begins_anew", reason="a shard is no longer there")
        return fresh
    log.info("preparation_goes_on", shards=len(done.shards), megabytes=round(done.text_bytes / 1e6, 1))
    return done, aside


def _batches(pieces: Iterator[_Read]) -> Iterator[list[_Read]]:
    batch: list[_Read] = []
    size = 0
    for item in pieces:
        batch.append(item)
        size += len(item[1].text)
        if size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sample(source: Source, limit: int) -> Iterator[str]:
    """Texts to train a tokenizer on: those of the training split, `limit` bytes of them."""
    sizes = [_size(source.root / name) for name in source.files]
    share = min(1.0, limit / max(1, sum(sizes)))
    for number, size in enumerate(sizes):
        wanted = size * share if share < 1 else float("inf")
        taken, skipped = 0, Skipped()
        for piece in source.read(number, 0, skipped):
            if taken >= wanted:
                break
            taken += len(piece.text)
            if not piece.aside:
                yield piece.text


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # reading it says so
        return 0


def _write(file: Path, data: bytes) -> None:
    """Beside `file`, then in its place: a crash leaves the old content or the new."""
    beside = file.with_suffix(".new")
    with beside.open("wb") as stream:
        stream.write(data)
        stream.flush()
    beside.replace(file)
