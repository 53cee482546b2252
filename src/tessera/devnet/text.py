"""The text of a run: read, tokenised and measured once, kept as blobs, found again at the next start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import structlog

from tessera.core.errors import Invalid, Missing
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId, parse_blob_id
from tessera.models.baselines import bigram_loss, unigram_loss
from tessera.models.corpus import Source, open_source, read_standard_library
from tessera.models.dataset import Dataset, DatasetIndex, Ids, open_shard, read_index, validation_windows
from tessera.models.dataset_prepare import prepare_dataset, train_on
from tessera.models.presets import DEFAULT_BATCH
from tessera.models.tokenizer import Tokenizer
from tessera.p2p.blobs import BlobStore
from tessera.training.home import write_atomic
from tessera.training.manifest import Manifest

__all__ = ["VALIDATION_WINDOWS", "Text", "load_tokenizer", "load_validation", "prepare_text", "text_of"]

log = structlog.get_logger()

VOCABULARY = 1024
VALIDATION_WINDOWS = 64  # of the preset's length, for the run and for the baselines beside it
BASELINE_TOKENS = 16 * 2**20  # that the baselines count


@dataclass(frozen=True)
class Text:
    """A prepared data set. Losses in nats per token."""

    source: str
    is_python: bool  # the standard library's sources
    index: BlobId
    tokenizer: BlobId
    vocab_size: int  # what the tokenizer found; little text holds fewer pieces than asked for
    unigram_loss: float
    bigram_loss: float


def prepare_text(data: Path | None, blobs: BlobStore, cache: Path) -> Text:
    """Read `data` (None: the standard library's sources), train the tokenizer, tokenise, measure the baselines.

    The result is kept in `cache` for as long as the files do not change. The baselines are measured on the windows that
    a run validates on, and count at most 16 million tokens.

    Raises: Invalid when there is nothing to read or too little.  Cost: about 10 s for 10 MB, 0.1 s when cached.
    """
    source = read_standard_library() if data is None else open_source(data)
    name = _name(source)
    found = _cached(cache, name, blobs)
    if found is not None:
        return found
    log.info("preparing_text", source=source.description, files=len(source.files))
    tokenizer = train_on(source, VOCABULARY)
    tokenizer_blob = blobs.put(tokenizer.to_bytes())
    prepared = prepare_dataset(
        source, tokenizer, tokenizer_blob, store=blobs, folder=cache.with_suffix(".part"),
    )  # fmt: skip
    text = _measured(source.description, prepared.blob, prepared.index, blobs, is_python=data is None)
    write_atomic(cache, json.dumps({"name": name, "text": asdict(text)}).encode())
    return text


def text_of(manifest: Manifest, blobs: BlobStore, cache: Path) -> Text:
    """The text of a manifest whose data sets are in `blobs`; the baselines are those of its first set.

    Raises: Missing when a set or the tokenizer is not here, saying how to get it.
    """
    first = manifest.data.sets[0]
    for blob in (manifest.tokenizer, *(BlobId(part.index) for part in manifest.data.sets)):
        if not blobs.has(blob):
            raise Missing(f"blob {blob} is not here: prepare it with `tessera data add`, with the same --state-dir")
    found = _cached(cache, first.index, blobs)
    if found is not None:
        return found
    index = read_index(blobs.path(BlobId(first.index)))
    text = _measured(first.description or index.description, BlobId(first.index), index, blobs, is_python=False)
    write_atomic(cache, json.dumps({"name": first.index, "text": asdict(text)}).encode())
    return text


def load_tokenizer(blobs: BlobStore, blob: BlobId) -> Tokenizer:
    return Tokenizer.from_bytes(blobs.path(blob).read_bytes())


def load_validation(blobs: BlobStore, index: BlobId) -> Ids:
    """The validation split of a data set that is here."""
    facts = read_index(blobs.path(index))
    return open_shard(blobs.path(facts.validation.blob), facts.validation, facts.vocab_size)


def _measured(source: str, blob: BlobId, index: DatasetIndex, blobs: BlobStore, *, is_python: bool) -> Text:
    parts, tokens = [], 0
    for shard in index.train:
        parts.append(open_shard(blobs.path(shard.blob), shard, index.vocab_size))
        tokens += shard.tokens
        if tokens >= BASELINE_TOKENS:
            break
    train: Ids = np.concatenate(parts)[:BASELINE_TOKENS]
    dataset = Dataset(index.vocab_size, train, load_validation(blobs, blob))
    windows = validation_windows(dataset.validation, VALIDATION_WINDOWS, DEFAULT_BATCH.length)
    return Text(
        source=source,
        is_python=is_python,
        index=blob,
        tokenizer=index.tokenizer,
        vocab_size=index.vocab_size,
        unigram_loss=unigram_loss(dataset, windows),
        bigram_loss=bigram_loss(dataset, windows),
    )


def _name(source: Source) -> str:
    facts = f"{VOCABULARY}/{VALIDATION_WINDOWS}/{DEFAULT_BATCH.length}/{source.description}/{source.fingerprint()}"
    return sha256(facts.encode()).hex()


def _cached(cache: Path, name: str, blobs: BlobStore) -> Text | None:
    """What an earlier start left, if it is about the same text and its blobs are still here."""
    try:
        value = json.loads(cache.read_bytes())
        text = Text(**value["text"])
        parse_blob_id(text.index)
        parse_blob_id(text.tokenizer)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, Invalid) as error:
        log.warning("text_cache_unreadable", file=str(cache), reason=str(error))
        return None
    if value["name"] != name or not (blobs.has(text.index) and blobs.has(text.tokenizer)):
        return None
    return text if all(blobs.has(shard.blob) for shard in read_index(blobs.path(text.index)).shards) else None
