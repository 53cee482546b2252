"""The text of a run: read, tokenised and measured once, kept as blobs, found again at the next start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId, parse_blob_id
from tessera.models.baselines import bigram_loss, unigram_loss
from tessera.models.corpus import Corpus, read_folder, read_standard_library
from tessera.models.dataset import Dataset, tokenize, validation_windows
from tessera.models.presets import DEFAULT_BATCH
from tessera.models.tokenizer import Tokenizer, train_tokenizer
from tessera.p2p.blobs import BlobStore
from tessera.training.home import write_atomic

__all__ = ["VALIDATION_WINDOWS", "Text", "load_dataset", "load_tokenizer", "prepare_text"]

log = structlog.get_logger()

VOCABULARY = 1024
VALIDATION_WINDOWS = 64  # of the preset's length, for the run and for the baselines beside it


@dataclass(frozen=True)
class Text:
    """A prepared corpus. Losses in nats per token."""

    source: str
    is_python: bool  # the standard library's sources
    dataset: BlobId
    tokenizer: BlobId
    vocab_size: int  # what the tokenizer found; little text holds fewer pieces than asked for
    unigram_loss: float
    bigram_loss: float


def prepare_text(data: Path | None, blobs: BlobStore, cache: Path) -> Text:
    """Read `data` (None: the standard library's sources), train the tokenizer, tokenise, measure the baselines.

    The result is kept in `cache`, under a hash of the text itself, so only reading is repeated. The baselines are
    measured on the windows that a run validates on.

    Raises: Invalid when there is nothing to read or too little.  Cost: about 10 s for 10 MB, 1 s when cached.
    """
    corpus = read_standard_library() if data is None else read_folder(data)
    name = _digest(corpus)
    found = _cached(cache, name, blobs)
    if found is not None:
        return found
    log.info("preparing_text", source=corpus.source, megabytes=round(corpus.size_bytes / 1e6, 1))
    tokenizer = train_tokenizer(corpus.train, VOCABULARY)
    dataset = tokenize(corpus, tokenizer)
    windows = validation_windows(dataset, VALIDATION_WINDOWS, DEFAULT_BATCH.length)
    text = Text(
        source=corpus.source,
        is_python=data is None,
        dataset=blobs.put(dataset.to_bytes()),
        tokenizer=blobs.put(tokenizer.to_bytes()),
        vocab_size=tokenizer.vocab_size,
        unigram_loss=unigram_loss(dataset, windows),
        bigram_loss=bigram_loss(dataset, windows),
    )
    write_atomic(cache, json.dumps({"name": name, "text": asdict(text)}).encode())
    return text


def load_tokenizer(blobs: BlobStore, blob: BlobId) -> Tokenizer:
    return Tokenizer.from_bytes(blobs.path(blob).read_bytes())


def load_dataset(blobs: BlobStore, blob: BlobId) -> Dataset:
    return Dataset.from_bytes(blobs.path(blob).read_bytes())


def _digest(corpus: Corpus) -> str:
    parts = [f"{VOCABULARY}/{VALIDATION_WINDOWS}/{DEFAULT_BATCH.length}/{len(corpus.train)}".encode()]
    parts += [sha256(text.encode()) for text in (*corpus.train, *corpus.validation)]
    return sha256(*parts).hex()


def _cached(cache: Path, name: str, blobs: BlobStore) -> Text | None:
    """What an earlier start left, if it is about the same text and its blobs are still here."""
    try:
        value = json.loads(cache.read_bytes())
        text = Text(**value["text"])
        parse_blob_id(text.dataset)
        parse_blob_id(text.tokenizer)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, Invalid) as error:
        log.warning("text_cache_unreadable", file=str(cache), reason=str(error))
        return None
    usable = value["name"] == name and blobs.has(text.dataset) and blobs.has(text.tokenizer)
    return text if usable else None
