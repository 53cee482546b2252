"""Models learn: a tiny one in a second, the default one, slowly, far below what counting achieves."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tessera.devnet.text import load_validation, prepare_text
from tessera.models.baselines import bigram_loss
from tessera.models.dataset import Dataset, open_shard, read_index, validation_windows
from tessera.models.device import fast_compute, keep_freed_memory
from tessera.models.pipeline import Pipeline
from tessera.models.presets import DEFAULT_BATCH, Batch, default_spec, tiny_spec
from tessera.p2p.blobs import BlobStore


def periodic(length: int, seed: int) -> np.ndarray:
    """Token t is t-1 plus 1 or 2, whichever t-2 says: no bigram model can know, anything with memory can."""
    jumps = np.random.default_rng(seed).integers(1, 3, length // 2).repeat(2)
    return (np.cumsum(jumps) % 23).astype(np.uint16)


@pytest.mark.parametrize(
    ("compute", "kind"),
    [
        ("float32", "codec"),
        ("float32", "dense"),
        # what `tessera up` trains with, where the processor can
        pytest.param("bfloat16", "codec", marks=pytest.mark.slow),
        *(pytest.param("float32", kind, marks=pytest.mark.slow) for kind in ("control", "reparam", "ssn")),
        *(pytest.param("bfloat16", kind, marks=pytest.mark.slow) for kind in ("control", "dense", "reparam", "ssn")),
    ],
)
def test_a_tiny_model_in_stages_learns_what_a_bigram_cannot(kind: str, compute: str) -> None:
    data = Dataset(23, periodic(20_000, 0), periodic(4_000, 1))
    spec = tiny_spec(2, codec=kind, vocab_size=23)  # type: ignore[arg-type]
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"compute": compute})})
    pipeline, windows = Pipeline(spec, steps=80), validation_windows(data.validation, 20, 32)
    assert pipeline.evaluate(windows) == pytest.approx(math.log(23), abs=1e-4)
    pipeline.train(data, Batch(sequences=4, length=32, microbatches=2, steps=80))
    assert pipeline.evaluate(windows) < bigram_loss(data, windows) - 0.15


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_quarter_of_the_default_run_ends_far_below_the_bigram_loss(tmp_path: Path) -> None:
    """The whole of it ends 1.4 nats below."""
    keep_freed_memory()
    batch = replace(DEFAULT_BATCH, steps=DEFAULT_BATCH.steps // 4)
    blobs = BlobStore(tmp_path)
    text = prepare_text(None, blobs, tmp_path / "text.json")
    index = read_index(blobs.path(text.index))
    assert len(index.train) == 1
    train = open_shard(blobs.path(index.train[0].blob), index.train[0], index.vocab_size)
    data = Dataset(index.vocab_size, train, load_validation(blobs, text.index))
    windows = validation_windows(data.validation, 64, DEFAULT_BATCH.length)
    pipeline = Pipeline(default_spec(compute=fast_compute()), steps=batch.steps)
    assert 2_500_000 < pipeline.parameters < 3_700_000
    assert pipeline.evaluate(windows) <= math.log(1024) + 0.1
    pipeline.train(data, batch)
    found, counted = pipeline.evaluate(windows), bigram_loss(data, windows)
    assert found <= counted - 0.5, (found, counted)
