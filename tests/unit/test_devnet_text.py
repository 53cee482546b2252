"""The text of a run: prepared once, found again, done again when something is gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_world import write
from tessera.core.errors import Invalid
from tessera.devnet import text as module
from tessera.devnet.text import load_tokenizer, load_validation, prepare_text
from tessera.models.dataset import read_index
from tessera.p2p.blobs import BlobStore

CODE = "def add(first, second):\n    return first + second\n\n" * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "text", {f"{n}.py": f"# file {n}\n{CODE}".encode() for n in range(40)})
    return tmp_path / "text"


def test_text_is_prepared_once_and_again_when_a_shard_is_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, cache = BlobStore(tmp_path / "blobs"), tmp_path / "text.json"
    first = prepare_text(folder, blobs, cache)
    assert 0 < first.bigram_loss < first.unigram_loss
    ids = load_validation(blobs, first.index)
    assert load_tokenizer(blobs, first.tokenizer).decode(ids.tolist()).startswith("# file ")
    with monkeypatch.context() as patched:
        patched.setattr(module, "train_on", None)  # what is cached is not prepared
        assert prepare_text(folder, blobs, cache) == first
    index = read_index(blobs.path(first.index))
    for damage in (lambda: blobs.remove(index.train[0].blob), lambda: cache.write_text("{}"), cache.unlink):
        damage()
        assert prepare_text(folder, blobs, cache) == first, "the same text, the same run"
        assert blobs.has(index.train[0].blob)
    write(folder, {"more.py": b"print('more')\n"})
    assert prepare_text(folder, blobs, cache).index != first.index
    assert json.loads(cache.read_bytes())["text"]["index"] != first.index


def test_baselines_count_a_bounded_part(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BASELINE_TOKENS", 500)
    counted: list[int] = []
    measure = module.unigram_loss
    monkeypatch.setattr(module, "unigram_loss", lambda data, w: counted.append(data.train.size) or measure(data, w))
    prepare_text(folder, BlobStore(tmp_path / "blobs"), tmp_path / "text.json")
    assert counted == [500]


def test_a_text_without_a_whole_window_to_validate_on_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "text", {"a.txt": b"x" * 30_000})
    with pytest.raises(Invalid, match="shorter than one window of 256"):
        prepare_text(tmp_path / "text", BlobStore(tmp_path / "blobs"), tmp_path / "text.json")
