"""Tokenizer, corpus, dataset and baselines."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from tessera.core.errors import Invalid
from tessera.models import corpus as corpus_module
from tessera.models.baselines import bigram_loss, unigram_loss
from tessera.models.corpus import Corpus, read_folder, read_standard_library
from tessera.models.dataset import Dataset, batch, tokenize, validation_windows
from tessera.models.tokenizer import END, train_tokenizer

TEXT = "def add(first, second):\n    return first + second\n\n" * 400


def write(folder: Path, names: dict[str, bytes]) -> None:
    for name, data in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def dataset(train: int = 5000, validation: int = 1000, vocab_size: int = 300) -> Dataset:
    generator = np.random.default_rng(0)
    first, second = (generator.integers(0, vocab_size, n).astype(np.uint16) for n in (train, validation))
    return Dataset(vocab_size, first, second)


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


def test_the_standard_library_is_read_without_tests_and_split_by_file() -> None:
    corpus = read_standard_library()
    assert corpus.size_bytes > 5_000_000
    assert 0.01 < len(corpus.validation) / len(corpus.train) < 0.2
    assert not set(corpus.train) & set(corpus.validation)
    joined = "".join(corpus.train)
    assert "def dataclass(" in joined
    assert "class TestCase" in joined, "unittest is no test"
    assert corpus == read_standard_library()


def test_a_folder_is_split_by_name_whatever_the_order_on_disk(tmp_path: Path) -> None:
    names = {f"part{i % 3}/file{i}.txt": f"file {i}\n".encode() + TEXT.encode() for i in range(40)}
    write(tmp_path / "a", names)
    write(tmp_path / "b", dict(reversed(names.items())))
    first, second = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert (first.train, first.validation) == (second.train, second.validation)
    assert len(first.train) + len(first.validation) == 40
    assert first.validation


def test_what_is_no_text_is_skipped(tmp_path: Path) -> None:
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
            "huge.txt": b"x" * (corpus_module.FILE_LIMIT + 1),
        },
    )
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.txt")
    corpus = read_folder(tmp_path)
    assert sorted(corpus.train + corpus.validation) == sorted([TEXT, "zwölf " * 500])


def test_one_file_is_split_by_position(tmp_path: Path) -> None:
    write(tmp_path, {"only.txt": TEXT.encode()})
    for path in (tmp_path, tmp_path / "only.txt"):
        corpus = read_folder(path)
        assert corpus.train[0] + corpus.validation[0] == TEXT
        assert len(corpus.validation[0]) == pytest.approx(len(TEXT) / 16, abs=1)


def test_folders_without_text_say_why(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no such file or folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="it holds no text"):
        read_folder(tmp_path / "empty")
    write(tmp_path / "binary", {"a.bin": b"\0", "b.bin": b"\xff"})
    with pytest.raises(Invalid, match="none of its 2 files is readable"):
        read_folder(tmp_path / "binary")
    write(tmp_path / "small", {"a.txt": b"hello", "b.txt": b"world"})
    with pytest.raises(Invalid, match="10 bytes of text"):
        read_folder(tmp_path / "small")
    write(tmp_path / "blank", {"a.txt": b" "})
    with pytest.raises(Invalid, match="nothing to learn"):
        read_folder(tmp_path / "blank" / "a.txt")


def test_too_much_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.txt": TEXT.encode(), "b.txt": TEXT.encode()})
    monkeypatch.setattr(corpus_module, "TOTAL_LIMIT", 100)
    with pytest.raises(Invalid, match="smaller folder"):
        read_folder(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(corpus_module, "FILES_LIMIT", 1)
    with pytest.raises(Invalid, match="over 1 files"):
        read_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"closed/a.txt": TEXT.encode()})
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(Invalid, match="closed"):
            read_folder(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_dataset_is_its_documents_joined_by_end() -> None:
    corpus = Corpus("here", (TEXT, "second"), ("third",))
    tokenizer = train_tokenizer(corpus.train, 300)
    data = tokenize(corpus, tokenizer)
    ids = [int(i) for i in data.train]
    assert ids == [*tokenizer.encode(TEXT), END, *tokenizer.encode("second"), END]
    assert ids.count(END) == 2
    again = Dataset.from_bytes(data.to_bytes())
    assert again.digest() == data.digest()
    assert np.array_equal(again.validation, data.validation)


def test_tokens_of_a_dataset_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Dataset.from_bytes(dataset().to_bytes()).train[0] = 1


def test_a_batch_is_fixed_by_its_name() -> None:
    data = dataset()
    one = batch(data, 1, 2, 3, 4, 16)
    assert one.shape == (4, 17)
    assert np.array_equal(one, batch(Dataset.from_bytes(data.to_bytes()), 1, 2, 3, 4, 16))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(one, batch(data, *other, 4, 16))


def test_batches_reach_the_first_and_the_last_token() -> None:
    data = Dataset(300, np.arange(20, dtype=np.uint16), np.arange(20, dtype=np.uint16))
    rows = np.concatenate([batch(data, 0, step, 0, 8, 16) for step in range(20)])
    assert rows.min() == 0
    assert rows.max() == 19
    assert np.array_equal(np.unique(rows[:, 0]), np.arange(4))
    assert np.array_equal(rows[:, 1:], rows[:, :-1] + 1)


def test_validation_windows_cover_the_split_without_overlap() -> None:
    data = Dataset(65_536, np.arange(20, dtype=np.uint16), np.arange(1000, dtype=np.uint16))
    windows = validation_windows(data, 10, 64)
    assert windows.shape == (10, 65)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 999
    targets = windows[:, 1:].ravel()
    assert len(np.unique(targets)) == len(targets)
    assert len(validation_windows(data, 1000, 64)) <= 1000 // 64 + 1


def test_splits_shorter_than_a_window_are_refused() -> None:
    data = dataset(train=16, validation=16)
    with pytest.raises(Invalid, match="shorter than one window"):
        batch(data, 0, 0, 0, 1, 16)
    with pytest.raises(Invalid, match="shorter than one window"):
        validation_windows(data, 1, 16)
    assert batch(data, 0, 0, 0, 1, 15).shape == (1, 16)


def chain(length: int, seed: int) -> np.ndarray:
    """A first-order chain: token t is followed by one of (t + 1, t + 2, t + 3) mod 30, with odds 2 : 1 : 1."""
    jumps = np.random.default_rng(seed).choice([1, 2, 3], length, p=[0.5, 0.25, 0.25])
    return (np.cumsum(jumps) % 30).astype(np.uint16)


def test_counting_finds_the_entropy_of_a_chain() -> None:
    data = Dataset(30, chain(50_000, 0), chain(20_000, 1))
    windows = validation_windows(data, 100, 100)
    entropy = 1.5 * math.log(2)
    assert bigram_loss(data, windows) == pytest.approx(entropy, rel=0.01)
    assert unigram_loss(data, windows) == pytest.approx(math.log(30), rel=0.01)


def test_pairs_never_seen_cost_a_finite_loss() -> None:
    data = Dataset(300, np.array([1, 2] * 50, np.uint16), np.arange(200, dtype=np.uint16))
    windows = validation_windows(data, 3, 50)
    for loss in (unigram_loss(data, windows), bigram_loss(data, windows)):
        assert math.isfinite(loss)
        assert loss > 1


def test_the_bigram_loss_is_no_worse_than_a_plain_additive_one() -> None:
    data = Dataset(30, chain(3000, 2), chain(3000, 3))
    windows = validation_windows(data, 20, 100)
    counts = np.full((30, 30), 0.1)
    np.add.at(counts, (data.train[:-1], data.train[1:]), 1)
    table = -np.log(counts / counts.sum(1, keepdims=True))
    assert bigram_loss(data, windows) <= table[windows[:, :-1], windows[:, 1:]].mean() + 1e-3
