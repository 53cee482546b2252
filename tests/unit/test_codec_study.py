"""How the codec's study reads its runs: which count, and how many steps one mode needs for another's loss."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tessera.models.config import CODE_BITS


class Study:
    """The benchmark's modules."""

    bench: Any
    figures: Any
    runs: Any


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import bench_codec
    import codec_figures
    import codec_runs

    modules: tuple[ModuleType, ...] = (bench_codec, codec_figures, codec_runs)
    found = Study()
    found.bench, found.figures, found.runs = modules
    yield found
    for module in modules:
        sys.modules.pop(module.__name__, None)


def loss_after(steps: float) -> float:
    return 4.0 - 0.3 * math.log(steps / 1000)


@pytest.mark.parametrize(("steps", "outside"), [(1000, False), (1500, False), (4000, False), (500, True), (6000, True)])
def test_steps_are_read_off_a_line_in_log_steps(study: Study, steps: int, outside: bool) -> None:
    curve = {n: loss_after(n) for n in (1000, 2000, 4000)}
    needed, extrapolated = study.figures.steps_for(curve, loss_after(steps))
    assert needed == pytest.approx(steps)
    assert extrapolated == outside or steps in curve


def test_a_bent_curve_is_followed_between_its_runs(study: Study) -> None:
    curve = {1000: 4.0, 2000: 3.0, 4000: 2.9}
    assert study.figures.steps_for(curve, 3.5)[0] == pytest.approx(1000 * 2**0.5)
    assert study.figures.steps_for(curve, 2.95)[0] == pytest.approx(2000 * 2**0.5)


def record(study: Study, mode: str, steps: int, loss: float, **changed: Any) -> dict[str, Any]:
    run = study.runs.Run(mode, study.runs.Size(), steps, 0)
    return {**run.settings(), "loss": loss, "params": 1, **changed}


def test_figures_follow_from_chosen_runs_alone(study: Study) -> None:
    records = [record(study, mode, n, loss_after(n)) for mode in ("control", "dense") for n in (1000, 2000, 4000)]
    records += [record(study, "codec", 1000, loss_after(1000 / 1.25)), record(study, "codec", 4000, loss_after(3200))]
    records += [record(study, "codec", 4000, 1.0, muon_rate=0.5), record(study, "codec", 4000, 1.0, width=999)]
    figures = study.figures.figures(study.figures.Study(records, study.runs.Size()), overhead_bytes=0.05)
    assert figures["steps_ratio_matched"] == figures["steps_ratio"] == pytest.approx(1.25)
    assert figures["steps_ratio_growth"] == pytest.approx(1.0)
    code = 1024 * figures["k"] / figures["d"] * CODE_BITS[study.runs.MODES["codec"].wire] / 8
    assert figures["bytes_per_token"] == pytest.approx(code + 2.05)
    seconds = [4.855 + 0.04669 * b for b in (2048, 1.0 * figures["bytes_per_token"])]
    assert figures["speedup_vs_dense"] == pytest.approx(seconds[0] / seconds[1] / 1.25, rel=1e-3)
    assert figures["reparam_speedup_vs_dense"] is None


def test_a_finished_run_is_not_trained_again(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(run: Any, data: object, device: str) -> dict[str, Any]:
        trained.append(run)
        return {**run.settings(), "loss": 1.0}

    monkeypatch.setattr(study.bench, "train", train)
    monkeypatch.setattr(study.bench, "prepare", lambda vocab, part: object())
    arguments = argparse.Namespace(threads=1, quick=False, device="cpu")
    plan = [study.runs.Run("codec", study.runs.Size(), steps, 0) for steps in (10, 20)]
    study.bench.complete(plan[:1], tmp_path / "runs.jsonl", arguments)
    study.bench.complete(plan, tmp_path / "runs.jsonl", arguments)
    assert trained == plan


def test_every_mode_describes_a_model(study: Study) -> None:
    for mode in study.runs.MODES:
        run = study.runs.Run(mode, study.runs.Size(), 10, 0, (("muon_rate", 0.5),))
        assert run.spec().optimizer.muon_rate == 0.5
        assert run.settings()["k"] == run.spec().codec.k
