"""The data sets of this machine's owner: prepared here, to be named in manifests. A file about each is kept.

All sets of a run are cut by one tokenizer, so sets that are added here share the first one's unless another is named.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from tessera.core.errors import Invalid, Missing
from tessera.core.hashing import sha256
from tessera.core.ids import Account, BlobId, parse_account, parse_blob_id
from tessera.devnet.text import VOCABULARY, load_tokenizer, load_validation
from tessera.models.corpus import Source, open_source
from tessera.models.dataset import SHARD_TOKENS
from tessera.models.dataset_prepare import Progress, prepare_dataset, train_on
from tessera.models.tokenizer import Tokenizer
from tessera.p2p.blobs import BlobStore
from tessera.training.files import one_at_a_time
from tessera.training.home import Home, write_atomic
from tessera.training.manifest import DataSet, Manifest

__all__ = ["NEW", "KnownSet", "add_set", "find_set", "known_sets", "sample_of"]

log = structlog.get_logger()

NEW = "new"  # instead of a tokenizer: train one
NAME_LIMIT = 100  # characters
_RECORD_LIMIT = 64 * 1024  # bytes


@dataclass(frozen=True)
class KnownSet:
    """A data set that was prepared here."""

    index: BlobId
    name: str
    account: Account  # who owns it
    path: str  # where its text was
    tokenizer: BlobId
    vocab_size: int
    tokens: int
    shards: int
    text_bytes: int
    skipped_files: int
    skipped_rows: int
    reasons: tuple[str, ...]  # the first of what was skipped, and why
    added: int  # seconds since 1970

    @property
    def entry(self) -> DataSet:
        """What goes into a manifest's `data.sets`."""
        return DataSet(index=self.index, weight=1, account=self.account, description=self.name)


def add_set(
    home: Home,
    path: Path,
    *,
    field: str,
    name: str,
    account: Account,
    tokenizer: str,
    now: int,
    vocabulary: int = VOCABULARY,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> KnownSet:
    """Prepare the text at `path` and remember the set. Goes on where an interrupted preparation of it stopped.

    Args:
        tokenizer: a blob id, a tokenizer's or a manifest's file, "new", or "": that of the sets already here, if any.
        vocabulary: size of a new tokenizer.

    Raises: Invalid: no such text or tokenizer; Conflict: another process prepares a set here.
    """
    if not name.strip() or len(name) > NAME_LIMIT:
        raise Invalid(f"a data set's name has 1 to {NAME_LIMIT} characters, not {len(name)}")
    blobs, source = BlobStore(home.blobs), open_source(path, field=field)
    with one_at_a_time(_folder(home) / "lock", f"prepares a data set in {home.path}"):  # a run may go on meanwhile
        chosen, blob = _tokenizer(home, blobs, source, tokenizer, vocabulary)
        work = _folder(home) / ("part-" + sha256(f"{path.absolute()}\0{field}".encode()).hex()[:16])
        prepared = prepare_dataset(
            source, chosen, blob, store=blobs, folder=work, description=name, shard_tokens=shard_tokens,
            progress=progress,
        )  # fmt: skip
        known = KnownSet(
            index=prepared.blob,
            name=name,
            account=parse_account(account),
            path=str(path.absolute()),
            tokenizer=blob,
            vocab_size=prepared.index.vocab_size,
            tokens=prepared.index.tokens,
            shards=len(prepared.index.train),
            text_bytes=prepared.text_bytes,
            skipped_files=prepared.skipped.files,
            skipped_rows=prepared.skipped.rows,
            reasons=tuple(prepared.skipped.reasons),
            added=now,
        )
        write_atomic(_folder(home) / f"{known.index}.json", json.dumps(asdict(known)).encode())
        log.info("data_set_added", index=known.index, tokens=known.tokens, shards=known.shards)
    return known


def known_sets(home: Home) -> list[KnownSet]:
    """What was prepared here, oldest first. Damaged records are named in the log and passed over."""
    found = []
    for file in sorted(_folder(home).glob("*.json")):
        try:
            found.append(_read(file))
        except (OSError, ValueError, TypeError, KeyError, Invalid) as error:
            log.warning("data_set_unreadable", file=str(file), reason=str(error))
    return sorted(found, key=lambda known: (known.added, known.index))


def find_set(home: Home, what: str) -> KnownSet:
    """By the first digits of its id, or its name. Raises `Missing` unless exactly one fits."""
    found = [known for known in known_sets(home) if known.index.startswith(what) or known.name == what]
    if len(found) != 1:
        raise Missing(f"{len(found)} data sets here are called {what[:80]!r}: `tessera data list` shows them")
    return found[0]


def sample_of(home: Home, known: KnownSet, characters: int = 400) -> str:
    """The beginning of a set's validation text, as its tokenizer gives it back."""
    blobs = BlobStore(home.blobs)
    ids = load_validation(blobs, known.index)[:characters]
    return load_tokenizer(blobs, known.tokenizer).decode(ids.tolist())[:characters]


def _tokenizer(home: Home, blobs: BlobStore, source: Source, asked: str, vocabulary: int) -> tuple[Tokenizer, BlobId]:
    if asked == NEW or (not asked and not known_sets(home)):
        log.info("training_tokenizer", source=source.description, vocabulary=vocabulary)
        trained = train_on(source, vocabulary)
        return trained, blobs.put(trained.to_bytes())
    if asked and (file := Path(asked)).is_file():
        return _from_file(blobs, file)
    blob = parse_blob_id(asked) if asked else known_sets(home)[0].tokenizer
    if not blobs.has(blob):
        raise Missing(f"tokenizer {blob[:16]}… is not in this state directory: give its file instead")
    return load_tokenizer(blobs, blob), blob


def _from_file(blobs: BlobStore, file: Path) -> tuple[Tokenizer, BlobId]:
    """A tokenizer's own file, or a manifest that names one which is here."""
    data = file.read_bytes()
    try:
        blob = Manifest.parse(data).tokenizer
    except Invalid:
        tokenizer = Tokenizer.from_bytes(data)
        return tokenizer, blobs.put(tokenizer.to_bytes())
    if not blobs.has(blob):
        raise Missing(f"{file} names tokenizer {blob[:16]}…, which is not in this state directory")
    return load_tokenizer(blobs, blob), blob


def _read(file: Path) -> KnownSet:
    if file.stat().st_size > _RECORD_LIMIT:
        raise Invalid(f"{file} has over {_RECORD_LIMIT} bytes")
    value = json.loads(file.read_bytes())
    known = KnownSet(**{**value, "reasons": tuple(value["reasons"])})
    parse_blob_id(known.index)
    parse_blob_id(known.tokenizer)
    parse_account(known.account)
    return known


def _folder(home: Home) -> Path:
    folder = home.path / "datasets"
    folder.mkdir(exist_ok=True)
    return folder
