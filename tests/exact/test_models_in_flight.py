"""What the memory benchmark counts: a microbatch in flight holds its ids and its packed message, or its graph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.models.memory import _graph_bytes, estimate_memory
from tessera.models.presets import tiny_spec


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "9")
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import bench_memory

    yield bench_memory
    sys.modules.pop("bench_memory", None)


def test_codes_weigh_a_fiftieth_of_their_graph_and_are_counted_to_the_byte(bench: Any) -> None:
    case = bench.Case(tiny_spec(3), 2, 32)
    spec, tokens = case.spec, case.tokens
    first, *others = bench.held_bytes(case, 1)
    codes = tokens * (spec.codec.k + 2) + 8 * (tokens + case.sequences)  # message, and T + 1 ids of eight bytes each
    assert others == [codes] * 4
    assert codes <= first * bench.LIMIT
    assert first == pytest.approx(tokens * _graph_bytes(spec, 1), rel=0.1)
    assert bench.held_bytes(case, 1) == [first, *others], "the same counts each time"
    assert bench.held_bytes(case, 3) == [first] * 3 + [codes] * 2


def test_the_estimate_knows_what_a_graph_less_saves(bench: Any) -> None:
    case = bench.Case(tiny_spec(4), 2, 32)
    need = [
        estimate_memory(case.spec, 1, sequences=2, length=32, microbatches=5, graphs=graphs).in_flight
        for graphs in (2, 3)
    ]
    counted = [sum(bench.held_bytes(case, graphs)) for graphs in (2, 3)]
    assert need[1] - need[0] == pytest.approx(counted[1] - counted[0], rel=0.1)


def test_what_is_given_back_does_not_count(bench: Any) -> None:
    kept = []

    def act() -> None:
        kept.append(torch.zeros(1000))
        torch.zeros(5000).sum()

    assert 4000 <= bench.allocated(act) < 4200
