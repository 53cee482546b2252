"""Tokenizer, corpus, dataset and baselines."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from data_world import write
from tessera.core.errors import Invalid
from tessera.core.ids import BlobId
from tessera.models import corpus as corpus_module
from tessera.models.baselines import bigram_loss, unigram_loss
from tessera.models.corpus import Piece, Skipped, Source, open_source, read_standard_library
from tessera.models.dataset import Dataset, Shard, open_shard, validation_windows
from tessera.models.dataset_prepare import train_on
from tessera.models.tokenizer import END, train_tokenizer

TEXT = "def add(first, second):\n    return first + second\n\n" * 400


def test_training_a_tokenizer_twice_gives_the_same_bytes() -> None:
    texts = [TEXT, "Grüße aus Köln\n", "\t\r\n \0"]
    first, second = (train_tokenizer(iter(texts), 400) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()
    assert first.digest() == second.digest()


def test_little_text_gives_fewer_tokens_than_asked_for() -> None:
    assert train_tokenizer(["ab"], 5000).vocab_size < 300


def test_end_never_comes_out_of_text() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    ids = tokenizer.encode("before<|end|>after")
    assert END not in ids
    assert tokenizer.decode(ids) == "before<|end|>after"
    assert tokenizer.decode([END, *ids, END]) == "before<|end|>after"


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    for bad in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(Invalid, match="token id"):
            tokenizer.decode([bad])


@pytest.mark.parametrize("size", [0, 256, 65_537])
def test_vocabularies_have_bounds(size: int) -> None:
    with pytest.raises(Invalid, match="257 to 65536"):
        train_tokenizer([TEXT], size)


def pieces(source: Source) -> list[Piece]:
    return [piece for number in range(len(source.files)) for piece in source.read(number, 0, Skipped())]


def split(source: Source) -> tuple[list[str], list[str]]:
    """What trains and what validates."""
    found = pieces(source)
    return [piece.text for piece in found if not piece.aside], [piece.text for piece in found if piece.aside]


def test_the_standard_library_is_read_without_tests_and_split_by_file() -> None:
    source = read_standard_library()
    train, validation = split(source)
    assert sum(map(len, train)) > 5_000_000
    assert 0.01 < len(validation) / len(train) < 0.2
    assert not set(train) & set(validation)
    joined = "".join(train)
    assert "def dataclass(" in joined
    assert "class TestCase" in joined, "unittest is no test"
    assert source.fingerprint() == read_standard_library().fingerprint()


def test_a_folder_is_split_by_name_whatever_the_order_on_disk(tmp_path: Path) -> None:
    names = {f"part{i % 3}/file{i}.txt": f"file {i}\n".encode() + TEXT.encode() for i in range(40)}
    write(tmp_path / "a", names)
    write(tmp_path / "b", dict(reversed(names.items())))
    first, second = split(open_source(tmp_path / "a")), split(open_source(tmp_path / "b"))
    assert first == second
    assert len(first[0]) + len(first[1]) == 40
    assert first[1]


def test_what_is_no_text_is_skipped_and_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.txt": TEXT.encode(),
            "b.md": ("zwölf " * 500).encode(),
            "empty.txt": b" \n",
            "image.png": b"\x89PNG\0\0",
            "latin.txt": "Grüße".encode("latin-1"),
            ".hidden": TEXT.encode(),
            ".git/x": TEXT.encode(),
        },
    )
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.txt")
    source, skipped = open_source(tmp_path), Skipped()
    texts = [p.text for number in range(len(source.files)) for p in source.read(number, 0, skipped)]
    assert texts == [TEXT, "zwölf " * 500]
    assert skipped.files == 3
    reasons = "; ".join(skipped.reasons)
    assert re.search(r"broken\.txt: no file; image\.png: binary.*; latin\.txt: .*can't decode byte 0xfc", reasons)


def test_a_long_text_comes_in_pieces_that_join_and_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 64)
    text = "Grüße aus Köln\n" * 20 + "ü" * 300 + "\n \n" + "x" * 64
    write(tmp_path, {"long.txt": text.encode()})
    source = open_source(tmp_path / "long.txt")
    found = pieces(source)
    assert "".join(piece.text for piece in found) == text
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(len(piece.text.encode()) <= 64 for piece in found)
    for number, piece in enumerate(found[:-1], start=1):
        assert list(source.read(0, piece.after, Skipped())) == found[number:]


def test_sources_without_text_say_why(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no such file or folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="it holds no text"):
        train_on(open_source(tmp_path / "empty"), 300)


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.txt": TEXT.encode(), "b.txt": TEXT.encode()})
    monkeypatch.setattr(corpus_module, "FILES_LIMIT", 1)
    with pytest.raises(Invalid, match="over 1 files"):
        open_source(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"closed/a.txt": TEXT.encode()})
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(Invalid, match="closed"):
            open_source(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_tokens_of_a_shard_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(np.arange(8, dtype="<u4").tobytes())
    ids = open_shard(tmp_path / "shard", Shard(BlobId("ab" * 32), 8), 70_000)
    assert ids.tolist() == list(range(8))
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_validation_windows_cover_the_split_without_overlap() -> None:
    ids = np.arange(1000, dtype=np.uint16)
    windows = validation_windows(ids, 10, 64)
    assert windows.shape == (10, 65)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 999
    targets = windows[:, 1:].ravel()
    assert len(np.unique(targets)) == len(targets)
    assert len(validation_windows(ids, 1000, 64)) <= 1000 // 64 + 1


def test_splits_shorter_than_a_window_are_refused() -> None:
    with pytest.raises(Invalid, match="shorter than one window"):
        validation_windows(np.arange(16), 1, 16)
    assert validation_windows(np.arange(16), 1, 15).tolist() == [list(range(16))]


def chain(length: int, seed: int) -> np.ndarray:
    """A first-order chain: token t is followed by one of (t + 1, t + 2, t + 3) mod 30, with odds 2 : 1 : 1."""
    jumps = np.random.default_rng(seed).choice([1, 2, 3], length, p=[0.5, 0.25, 0.25])
    return (np.cumsum(jumps) % 30).astype(np.uint16)


def test_counting_finds_the_entropy_of_a_chain() -> None:
    data = Dataset(30, chain(50_000, 0), chain(20_000, 1))
    windows = validation_windows(data.validation, 100, 100)
    entropy = 1.5 * math.log(2)
    assert bigram_loss(data, windows) == pytest.approx(entropy, rel=0.01)
    assert unigram_loss(data, windows) == pytest.approx(math.log(30), rel=0.01)


def test_pairs_never_seen_cost_a_finite_loss() -> None:
    data = Dataset(300, np.array([1, 2] * 50, np.uint16), np.arange(200, dtype=np.uint16))
    windows = validation_windows(data.validation, 3, 50)
    for loss in (unigram_loss(data, windows), bigram_loss(data, windows)):
        assert math.isfinite(loss)
        assert loss > 1


def test_the_bigram_loss_is_no_worse_than_a_plain_additive_one() -> None:
    data = Dataset(30, chain(3000, 2), chain(3000, 3))
    windows = validation_windows(data.validation, 20, 100)
    counts = np.full((30, 30), 0.1)
    np.add.at(counts, (data.train[:-1], data.train[1:]), 1)
    table = -np.log(counts / counts.sum(1, keepdims=True))
    assert bigram_loss(data, windows) <= table[windows[:, :-1], windows[:, 1:]].mean() + 1e-3
