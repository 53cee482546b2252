"""Messages beside replays: what counts as a step, and what as another message."""

from __future__ import annotations

import math

import pytest
import torch

from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.distance import Distance, compare, relative_error, tolerance
from tessera.models.presets import tiny_spec
from tessera.models.wire import Wire

NOISE = ("gradient", 0, 1, 2, 3)


def wire(number: str = "int8") -> Wire:
    spec: ModelSpec = tiny_spec()
    codec = CodecConfig(kind="codec", k=8, wire=number)  # type: ignore[arg-type]
    return Wire(spec.model_copy(update={"codec": codec}))


def message(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number", ["int8", "bfloat16", "float32"])
def test_a_message_is_at_no_distance_from_itself(number: str) -> None:
    w, x = wire(number), message()
    assert compare(w, w.pack(x), x) == Distance(0.0, 0.0, 256)
    if number == "int8":
        assert compare(w, w.pack(x, NOISE), x, NOISE).mean == 0


@pytest.mark.parametrize("number", ["int8", "bfloat16", "float32"])
def test_another_message_is_far(number: str) -> None:
    w = wire(number)
    assert compare(w, w.pack(message(1)), message()).mean > 20


def test_one_code_off_by_one_is_one_step() -> None:
    w, x = wire(), message()
    data = bytearray(w.pack(x))
    code = data[-1]
    data[-1] = code + 1 if code != 127 else code - 1
    found = compare(w, bytes(data), x)
    assert found.mean == pytest.approx(1 / 256)
    assert found.worst == pytest.approx(1 / 8)


def test_rounding_with_another_name_is_seen() -> None:
    w, x = wire(), message()
    assert compare(w, w.pack(x, NOISE), x, ("gradient", 0, 1, 2, 4)).mean > 0.2


def test_a_scale_that_is_a_hair_off_counts_for_little_and_one_that_is_twice_as_large_for_everything() -> None:
    w, x = wire(), message()
    assert compare(w, w.pack(x * 1.0001), x).mean < 0.1
    assert compare(w, w.pack(x * 2), x).mean == 127
    assert compare(w, w.pack(x * 0), x).mean == 127
    assert compare(w, w.pack(x), x * 0).mean == 127
    assert compare(w, w.pack(x * 0), x * 0).mean == 0


def test_bytes_that_are_no_message_and_replays_that_diverged_are_invalid() -> None:
    w, x = wire(), message()
    with pytest.raises(Invalid, match="bytes"):
        compare(w, w.pack(x)[:-1], x)
    with pytest.raises(Invalid, match="not finite"):
        compare(w, w.pack(x), x / 0)


def test_the_tolerance_of_a_short_message_allows_for_counting() -> None:
    limits = tolerance("float32", 2)
    assert limits.used(Distance(1 / 64, 1 / 8, 64)) < 1 < limits.used(Distance(1 / 64, 1 / 8, 6400))
    assert limits.used(Distance(0.0, 3.0, 6400)) > 1


def test_a_deeper_stage_may_differ_by_the_root_of_its_depth() -> None:
    shallow, deep = tolerance("bfloat16", 2), tolerance("bfloat16", 8)
    assert deep.mean == pytest.approx(2 * shallow.mean)
    assert tolerance("bfloat16", 1) == shallow


def test_relative_error_of_nothing_and_of_nonsense() -> None:
    x = torch.ones(3)
    assert relative_error(x, x) == 0
    assert relative_error(x * 1.01, x) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(x * 0, x * 0) == 0
    assert relative_error(x, x * 0) == math.inf
    assert relative_error(x * math.nan, x) == math.inf
