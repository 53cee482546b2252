"""Laws of rows of numbers on the wire."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.numbers import BLOCK, pack_numbers, packed_bytes, unpack_numbers

counts = st.integers(0, 3 * BLOCK + 1)
NUMBERS = ("int8", "bfloat16", "float32")


def row(seed: int, count: int, exponent: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(count // BLOCK + 1, generator=generator).mul(3).exp().repeat_interleave(BLOCK)[:count]
    return torch.randn(count, generator=generator) * spread * 10.0**exponent


@given(st.integers(0, 2**32), counts, st.integers(-25, 25), st.sampled_from(NUMBERS))
def test_a_row_has_its_announced_size_and_comes_back(seed: int, count: int, exponent: int, number: str) -> None:
    x = row(seed, count, exponent)
    data = pack_numbers(x, number)  # type: ignore[arg-type]
    assert len(data) == packed_bytes(count, number)  # type: ignore[arg-type]
    back = unpack_numbers(data, count, number)  # type: ignore[arg-type]
    if number == "int8":
        for ours, theirs in zip(back.split(BLOCK), x.split(BLOCK), strict=True):
            largest = float(theirs.abs().max()) if theirs.numel() else 0.0
            # Half a step, and the scale is at most 1/128 over largest / 127; smaller scales than 2^-100 are zero.
            assert bool(((ours - theirs).abs() <= largest * (0.5 / 127) * (1 + 1 / 64) + 127 * 2.0**-100).all())
    else:
        assert pack_numbers(back, number) == data  # type: ignore[arg-type]


@given(st.binary(max_size=600), st.integers(0, 600), st.sampled_from(NUMBERS))
def test_any_bytes_are_finite_numbers_or_refused(data: bytes, count: int, number: str) -> None:
    try:
        x = unpack_numbers(data, count, number)  # type: ignore[arg-type]
    except Invalid:
        return
    assert x.shape == (count,)
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x3f\x80", "-128"),
        (b"\x80\xbf\x01", "under zero"),
        (b"\x80\x7f\x01", "not finite"),
        (b"\xc0\x7f\x00", "not finite"),
        (b"\x7f\x7f\x7f", "not finite"),
        (b"\x80\x3f", "not 2"),
    ],
)
def test_codes_that_nobody_packs_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        unpack_numbers(data, 1, "int8")
