"""The fast copy carries the same bytes as the wheel's own, and refuses a wheel that it does not know."""

from __future__ import annotations

import time

import iroh.iroh_ffi as generated
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.p2p import iroh_fast

CONVERTER = generated._UniffiFfiConverterBytes


@given(st.binary(max_size=3000))
def test_bytes_cross_over_and_back_unchanged(value: bytes) -> None:
    assert CONVERTER.lift(CONVERTER.lower(value)) == value


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_other_buffers_cross_over_too(kind: type) -> None:
    assert CONVERTER.lift(CONVERTER.lower(kind(b"abc" * 500))) == b"abc" * 500


def test_the_copy_is_much_faster_than_byte_by_byte() -> None:
    started = time.perf_counter()
    CONVERTER.lift(CONVERTER.lower(bytes(8 << 20)))
    assert time.perf_counter() - started < 0.5, "the wheel's own loop takes over a second"


def test_installing_again_changes_nothing() -> None:
    before = generated._UniffiRustBufferBuilder.write
    iroh_fast.install()
    assert generated._UniffiRustBufferBuilder.write is before


def test_a_wheel_with_another_layout_is_refused_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = generated._UniffiRustBufferBuilder

    def other_layout(self: object, value: bytes) -> None:
        for byte in reversed(value):
            self._pack_into(1, ">B", byte)  # type: ignore[attr-defined]

    monkeypatch.setattr(builder, "write", other_layout)
    with pytest.raises(ImportError, match=r"iroh==1\.2\.0"):
        iroh_fast.install()
    assert builder.write is other_layout


def test_a_wheel_without_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(generated, "_UniffiRustBufferBuilder")
    with pytest.raises(ImportError, match=r"iroh==1\.2\.0"):
        iroh_fast.install()
