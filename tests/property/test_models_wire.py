"""Laws of messages: sizes, rounding, and that no bytes can do more than be refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import CodecConfig, ModelSpec
from tessera.models.noise import integers, orthonormal, symmetric, uniform
from tessera.models.presets import tiny_spec
from tessera.models.wire import Wire

CODES = {"int4": 7, "int5": 15, "int6": 31, "int8": 127}
NUMBERS = (*CODES, "bfloat16", "float32")


def wire(number: str, width: int = 8) -> Wire:
    codec = CodecConfig(kind="codec", k=width, wire=number)  # type: ignore[arg-type]
    return Wire(ModelSpec(model=tiny_spec().model, codec=codec, stages=2))


def tensors(seed: int, shape: tuple[int, int, int], exponent: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(*shape[:2], 1, generator=generator).mul(3).exp()  # tokens of different sizes
    return torch.randn(*shape, generator=generator) * spread * 10.0**exponent


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([8, 16]))
exponents = st.integers(-25, 25)


@given(st.integers(0, 2**32), shapes, exponents, st.sampled_from(NUMBERS))
def test_a_message_has_its_announced_size_and_its_shape_back(
    seed: int, shape: tuple[int, int, int], exponent: int, number: str
) -> None:
    engine, x = wire(number, shape[2]), tensors(seed, shape, exponent)
    data = engine.pack(x)
    assert len(data) == engine.size(*shape[:2])
    back = engine.unpack(data, *shape[:2])
    assert back.shape == x.shape
    if number not in CODES:
        assert engine.pack(back) == data, "what was received packs to the same bytes"


@given(st.integers(0, 2**32), shapes, exponents, st.sampled_from(list(CODES)))
def test_rounding_to_the_nearest_code_errs_by_half_a_step_at_most(
    seed: int, shape: tuple[int, int, int], exponent: int, number: str
) -> None:
    engine, x = wire(number, shape[2]), tensors(seed, shape, exponent)
    error = (engine.unpack(engine.pack(x), *shape[:2]) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    # Half a step, and the scale is at most 1/128 over largest / levels.
    assert bool((error <= largest * (0.5 / CODES[number]) * (1 + 1 / 64)).all())


@given(st.integers(0, 2**32), shapes, exponents)
def test_float32_messages_lose_nothing(seed: int, shape: tuple[int, int, int], exponent: int) -> None:
    engine, x = wire("float32", shape[2]), tensors(seed, shape, exponent)
    assert torch.equal(engine.unpack(engine.pack(x), *shape[:2]), x)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 2**32), exponents, st.sampled_from(list(CODES)))
def test_random_rounding_is_right_on_average(seed: int, exponent: int, number: str) -> None:
    engine, x = wire(number), tensors(seed, (1, 4, 8), exponent)
    draws = 400
    mean = sum(engine.unpack(engine.pack(x, ("test", seed, n)), 1, 4).double() for n in range(draws)) / draws
    step = x.abs().amax(-1, keepdim=True).double() / CODES[number]
    # One draw's deviation is at most half a step; six standard errors of the mean.
    assert bool(((mean - x).abs() <= 6 * 0.51 * step / draws**0.5).all())


@given(st.binary(max_size=300), st.sampled_from(NUMBERS), st.integers(1, 3), st.integers(1, 3))
def test_any_bytes_are_either_refused_or_finite(data: bytes, number: str, batch: int, length: int) -> None:
    engine = wire(number, 8)
    data = data[: engine.size(batch, length)]
    try:
        x = engine.unpack(data, batch, length)
    except Invalid:
        return
    assert len(data) == engine.size(batch, length)
    assert bool(torch.isfinite(x).all())


@given(st.lists(st.one_of(st.integers(0, 99), st.text(max_size=5)), max_size=4), st.integers(1, 50))
def test_noise_depends_on_its_name_alone(name: list[object], count: int) -> None:
    first = uniform((count,), *name)
    torch.rand(3)
    np.random.default_rng(0).random(3)
    assert np.array_equal(first, uniform((count,), *name))
    assert np.array_equal(first, uniform((count + 1,), *name)[:count]), "a longer draw begins with a shorter one"
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    assert not np.array_equal(uniform((8,), *name), uniform((8,), *name, 0))


@given(st.integers(1, 1000), st.integers(0, 99))
def test_integers_stay_below_their_bound(below: int, name: int) -> None:
    values = integers(50, below, name)
    assert 0 <= values.min() <= values.max() < below


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 9))
def test_bases_are_orthonormal(columns: int, more: int, name: int) -> None:
    basis = orthonormal(columns + more, columns, name).astype(np.float64)
    assert np.abs(basis.T @ basis - np.eye(columns)).max() < 1e-6


def test_initial_values_have_the_spread_asked_for() -> None:
    values = symmetric((200, 200), 0.3, "spread")
    assert abs(float(values.std()) - 0.3) < 0.003
    assert abs(float(values.mean())) < 0.005


def test_codes_lie_highest_bit_first_without_gaps() -> None:
    """1, -1, 15, -15, 0, 2, -2, 3 in int5 under the scale 1."""
    codes = torch.tensor([1.0, -1.0, 15.0, -15.0, 0.0, 2.0, -2.0, 3.0]).reshape(1, 1, 8)
    bits = "00001 11111 01111 10001 00000 00010 11110 00011".replace(" ", "")
    expected = bytes.fromhex("803f") + int(bits, 2).to_bytes(5, "big")
    assert wire("int5").pack(codes) == expected
