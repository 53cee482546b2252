"""A thief with shards of two times: turned boundaries stop him only until he looks at the shards themselves.

These are the attack's tools as `benchmarks/bench_stitching.py` measures them, on a model that did not train between the
two times. What they achieve against one that did is the benchmark's business.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.models.pipeline import Pipeline
from tessera.training.rotation import turn_after_step


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import bench_stitching

    monkeypatch.setattr(bench_stitching, "WIDTH", 32)
    yield bench_stitching
    sys.modules.pop("bench_stitching", None)


@pytest.fixture
def shards(bench: Any) -> tuple[Any, list[Any], list[Any], np.ndarray]:
    """(spec, shards before a turn, shards after it, windows) of a model that has learnt a little."""
    spec = bench.described(64)
    pipeline, random = Pipeline(spec, steps=40), np.random.default_rng(0)
    windows = (np.cumsum(random.integers(1, 3, (6, 129)), axis=1) % 64).astype(np.int64)
    for step in range(6):
        pipeline.train_step(step, [windows[:4]])
    before = [bench.copy(trainer.stage.state_dict()) for trainer in pipeline.trainers]
    for trainer in pipeline.trainers:
        turn_after_step(trainer, bench.RUN, bench.secrets(), 1)
    after = [bench.copy(trainer.stage.state_dict()) for trainer in pipeline.trainers]
    return spec, before, after, windows[4:]


def test_who_has_seen_his_own_encoder_twice_knows_the_turn(bench: Any, shards: Any) -> None:
    spec, before, after, windows = shards
    stitched = [before[0], after[1], before[2], after[3]]
    whole, broken = bench.Chain(spec, after).loss(windows), bench.Chain(spec, stitched).loss(windows)
    assert broken > whole + 1e-3
    receivers = [after, before, after]  # whose time the code has to fit
    turns = [bench.polar(bench.encoder(stitched, b).T @ bench.encoder(receivers[b], b)) for b in range(3)]
    true = bench.true_turns(bench.Case(steps=6, early=5, every=1, fractions=(), windows=0))
    for found, real in zip(turns, true, strict=True):
        torch.testing.assert_close(found, real, atol=1e-5, rtol=0.0)
    assert bench.Chain(spec, stitched).turned(turns).loss(windows) == pytest.approx(whole, abs=1e-5)


def test_an_encoder_and_a_decoder_that_began_alike_give_the_turn_away(bench: Any, shards: Any) -> None:
    spec, before, after, windows = shards
    stitched = [before[0], after[1], before[2], after[3]]
    whole, broken = bench.Chain(spec, after).loss(windows), bench.Chain(spec, stitched).loss(windows)
    turns = [bench.polar(bench.encoder(stitched, b).T @ bench.decoder(stitched, b)) for b in range(3)]
    assert abs(bench.Chain(spec, stitched).turned(turns).loss(windows) - whole) < 0.2 * (broken - whole)


def test_the_thief_trains_what_he_says_he_trains(bench: Any, shards: Any) -> None:
    spec, before, after, windows = shards
    stitched = [before[0], after[1], before[2], after[3]]
    thief = bench.Chain(spec, stitched)
    was = [parameter.detach().clone() for parameter in thief.parameters()]
    broken = thief.loss(windows)
    thief.train_matrices([windows] * 8)
    assert all(torch.equal(a, b) for a, b in zip(was, thief.parameters(), strict=True))
    assert thief.loss(windows) < broken
    everything = bench.Chain(spec, stitched).train_all([windows] * 2)
    assert not any(torch.equal(a, b) for a, b in zip(was, everything.parameters(), strict=True))
