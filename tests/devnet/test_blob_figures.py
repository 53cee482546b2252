"""What issue and README claim of blobs, measured between processes that are killed, silenced and cut."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import blob_figures

    yield blob_figures
    sys.modules.pop("blob_figures", None)


@pytest.mark.slow
def test_twenty_interruptions_cost_less_than_a_tenth(figures: object) -> None:
    figure = figures.resume_bytes_ratio(quick=True)  # type: ignore[attr-defined]
    assert figure["interruptions"] == 20
    assert 1.0 < figure["resume_bytes_ratio"] <= 1.1


@pytest.mark.slow
def test_three_capped_peers_are_twice_as_fast_as_one(figures: object) -> None:
    figure = figures.blob_mb_s_ratio(quick=True)  # type: ignore[attr-defined]
    assert figure["one_mb_s"] < 1.1, "it is capped"
    assert figure["blob_mb_s_ratio"] >= 2
