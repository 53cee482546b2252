"""From files to shards: everything read once, the same after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_world import write
from tessera.core.errors import Invalid, Unavailable
from tessera.core.ids import BlobId
from tessera.models import dataset_prepare as module
from tessera.models.corpus import Piece, Skipped, Source, open_source
from tessera.models.dataset import DatasetIndex, Shard, open_shard
from tessera.models.dataset_prepare import Prepared, prepare_dataset, train_on
from tessera.models.tokenizer import END, Tokenizer
from tessera.p2p.blobs import BlobStore

LINE = "def add(first, second):\n    return first + second\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files of text and rows, 90 kB."""
    root = tmp_path_factory.mktemp("text")
    write(root, {f"{n % 7}/file{n}.txt": (f"file {n}\n" + LINE * (10 + n)).encode() for n in range(40)})
    rows = [json.dumps({"text": f"row {n} " + "said so. " * (n % 50), "n": n}) for n in range(300)]
    write(root, {"rows.jsonl": "\n".join([*rows[:150], "{", *rows[150:]]).encode()})
    return root


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return train_on(open_source(folder), 400)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", 2000)


class Stop(Exception):
    """The process is killed."""


def prepare(source: Source, tokenizer: Tokenizer, state: Path, shard_tokens: int = 2000) -> Prepared:
    store = BlobStore(state / "blobs")
    return prepare_dataset(
        source, tokenizer, store.put(tokenizer.to_bytes()), store=store, folder=state / "work",
        shard_tokens=shard_tokens,
    )  # fmt: skip


def read_back(prepared: Prepared, state: Path) -> tuple[list[int], list[int]]:
    store = BlobStore(state / "blobs")
    index = DatasetIndex.parse(store.path(prepared.blob).read_bytes())
    assert index == prepared.index

    def ids(shard: Shard) -> list[int]:
        found: list[int] = open_shard(store.path(shard.blob), shard, index.vocab_size).tolist()
        return found

    return [i for shard in index.train for i in ids(shard)], ids(index.validation)


def test_shards_hold_every_document_once_with_an_end(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = open_source(folder)
    prepared = prepare(source, tokenizer, tmp_path)
    train, validation = read_back(prepared, tmp_path)
    expected: dict[bool, list[int]] = {False: [], True: []}
    for number in range(len(source.files)):
        for piece in source.read(number, 0, Skipped()):
            expected[piece.aside] += [*tokenizer.encode(piece.text), END]
    assert train == expected[False]
    assert validation == expected[True]
    assert len(prepared.index.train) > 10
    assert all(shard.tokens <= 2000 for shard in prepared.index.train)
    assert (prepared.skipped.rows, prepared.skipped.files) == (1, 0)
    assert not (tmp_path / "work").exists()


class Killed:
    """A source that dies after so many pieces."""

    def __init__(self, source: Source, after: int) -> None:
        self._source, self._left = source, after
        self.readers = {"": self}

    def read(self, path: Path, name: str, offset: int, skipped: Skipped) -> Iterator[Piece]:
        reader = self._source.readers.get(Path(name).suffix, self._source.readers[""])
        for piece in reader.read(path, name, offset, skipped):
            if self._left == 0:
                raise Stop
            self._left -= 1
            yield piece

    def __repr__(self) -> str:  # part of the fingerprint: the same text, the same fingerprint
        return "reader"


@pytest.mark.parametrize("every", [7, pytest.param(60, marks=pytest.mark.slow), 200])
def test_killed_again_and_again_it_ends_with_the_same_shards(
    every: int, folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = open_source(folder)
    whole = prepare(source, tokenizer, tmp_path / "whole")
    lives, result = 0, None
    reads: list[int] = []
    while result is None:
        lives += 1
        killed = Killed(source, every * (1 + lives // 4))  # with little progress in a life, the next one lives longer
        try:
            result = prepare(replace(source, readers=killed.readers), tokenizer, tmp_path / "killed")
        except Stop:
            note = tmp_path / "killed" / "work" / "progress.json"
            reads.append(len(json.loads(note.read_bytes())["shards"]) if note.exists() else 0)
    assert lives >= 2
    assert reads == sorted(reads), "progress is never lost"
    assert every * (1 + lives // 4) < 340, "no life could have read everything"
    assert result.blob == whole.blob
    assert result.skipped == whole.skipped
    assert result.text_bytes == whole.text_bytes


def interrupted(source: Source, tokenizer: Tokenizer, state: Path, after: int = 150) -> None:
    with pytest.raises(Stop):
        prepare(replace(source, readers=Killed(source, after).readers), tokenizer, state)
    assert (state / "work" / "progress.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: (state / "work" / "progress.json").write_bytes(b"{"),
        lambda state: (state / "work" / "progress.json").write_bytes(b"[]"),
        lambda state: (state / "work" / "validation.ids").write_bytes(b"x"),
        lambda state: (state / "work" / "validation.ids").unlink(),
        lambda state: remove_a_shard(state),
    ],
)
def test_what_was_damaged_meanwhile_is_done_again(
    damage: Callable[[Path], object], folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = open_source(folder)
    fixed = replace(source, readers={"": Killed(source, -1)})
    interrupted(source, tokenizer, tmp_path / "a")
    damage(tmp_path / "a")
    assert prepare(fixed, tokenizer, tmp_path / "a").blob == prepare(source, tokenizer, tmp_path / "b").blob


def remove_a_shard(state: Path) -> None:
    note = json.loads((state / "work" / "progress.json").read_bytes())
    BlobStore(state / "blobs").remove(BlobId(note["shards"][0][0]))


def test_changed_files_begin_anew(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "text", {f"{n}.txt": (LINE * 100).encode() for n in range(20)})
    interrupted(open_source(tmp_path / "text"), tokenizer, tmp_path / "a", after=12)
    (tmp_path / "text" / "0.txt").write_text("another\n" + LINE * 100)
    source = open_source(tmp_path / "text")
    assert prepare(source, tokenizer, tmp_path / "a").blob == prepare(source, tokenizer, tmp_path / "b").blob


def test_a_document_longer_than_a_shard_is_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "text", {"a.txt": (LINE * 800).encode(), "b.txt": b"short\n"})
    prepared = prepare(open_source(tmp_path / "text"), tokenizer, tmp_path, shard_tokens=500)
    train, validation = read_back(prepared, tmp_path)
    assert max(shard.tokens for shard in prepared.index.train) == 500
    assert tokenizer.decode(train + validation) == LINE * 800 + "short\n"


@pytest.mark.parametrize("names", [["a.txt"], ["a.txt", "b.txt"], ["only.jsonl"]])
def test_few_documents_are_split_by_position(names: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = json.dumps({"text": LINE * 1000})
    write(tmp_path / "text", {name: (rows if name.endswith("l") else LINE * 800).encode() for name in names})
    train, validation = read_back(prepare(open_source(tmp_path / "text"), tokenizer, tmp_path), tmp_path)
    assert len(validation) == pytest.approx((len(train) + len(validation)) / 16, rel=0.1)


def test_the_validation_split_has_a_limit(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VALIDATION_TOKENS", 300)
    source = open_source(folder)
    prepared = prepare(source, tokenizer, tmp_path)
    assert 300 <= prepared.index.validation.tokens < 1500
    monkeypatch.undo()
    assert prepared.index.tokens == prepare(source, tokenizer, tmp_path / "b").index.tokens


def test_too_little_text_says_what_was_skipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "text", {"a.txt": b"hello", "b.bin": b"\0"})
    with pytest.raises(Invalid, match=r"holds 5 bytes of text, at least 16384 expected; b\.bin: binary"):
        prepare(open_source(tmp_path / "text"), tokenizer, tmp_path)
    with pytest.raises(Invalid, match="a shard has 256 to"):
        prepare(open_source(tmp_path / "text"), tokenizer, tmp_path, shard_tokens=10)


def test_a_full_disk_says_that_it_goes_on_from_here(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(Unavailable, match="No space left on device; make room and start again"):
        prepare(open_source(folder), tokenizer, tmp_path)


def test_a_tokenizer_is_trained_on_a_part_of_each_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(folder)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 10_000)
    texts = list(module._sample(source, 30_000))
    assert 20_000 < sum(map(len, texts)) < 75_000
    assert any(text.startswith("row") for text in texts)
    assert any(text.startswith("file 39") for text in texts)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    ids = np.array([1, 70_000, 2], dtype="<u4")
    (tmp_path / "shard").write_bytes(ids.tobytes())
    shard = Shard(BlobId("ab" * 32), 3)
    assert open_shard(tmp_path / "shard", shard, 70_001).tolist() == [1, 70_000, 2]
    with pytest.raises(Invalid, match="holds the id 70000"):
        open_shard(tmp_path / "shard", shard, 70_000)
    os.truncate(tmp_path / "shard", 6)
    with pytest.raises(Invalid, match="6 bytes, expected 4 for each of 3"):
        open_shard(tmp_path / "shard", shard, 70_001)
