"""Whatever JSON comes as a body, it is a request or a named refusal; and so for frames and payments."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.core.errors import Invalid, Misbehaviour
from tessera.serving.decoding.frames import pack, unpack
from tessera.serving.envelope import error_body
from tessera.serving.paying.offers import parse_payment
from tessera.serving.schemas import IGNORED, NEUTRAL, ChatRequest, CompletionRequest, EmbeddingRequest, parse, read_json

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *NEUTRAL, *IGNORED})
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(st.characters(codec=None)), ANY, max_size=6)


@settings(max_examples=300, deadline=None)
@given(BODIES, st.sampled_from([ChatRequest, CompletionRequest, EmbeddingRequest]))
def test_a_body_parses_or_is_refused_in_an_envelope_that_can_be_sent(body: dict[str, object], kind: type) -> None:
    try:
        parse(kind, read_json(json.dumps(body).encode()))
    except Invalid as error:
        json.dumps(error_body(error), ensure_ascii=False).encode()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_misbehaviour(data: bytes) -> None:
    try:
        frame = unpack(data, max_tokens=8, vocab_size=100)
    except Misbehaviour:
        return
    assert unpack(pack(frame.header, frame.ids, frame.payload), max_tokens=8, vocab_size=100) == frame


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8).filter(lambda key: key != "ids"), st.integers() | st.text(max_size=8)),
    st.lists(st.integers(0, 99), max_size=8),
    st.binary(max_size=64),
)
def test_a_packed_frame_comes_back(header: dict[str, object], ids: list[int], payload: bytes) -> None:
    frame = unpack(pack(header, ids, payload), max_tokens=8, vocab_size=100)
    assert (frame.header, frame.ids, frame.payload) == (header, ids, payload)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12))
def test_a_frame_with_too_many_or_foreign_tokens_is_misbehaviour(ids: list[int]) -> None:
    fits = len(ids) <= 8 and max(ids) < 100
    if fits:
        assert unpack(pack({}, ids), max_tokens=8, vocab_size=100).ids == ids
    else:
        with pytest.raises(Misbehaviour):
            unpack(pack({}, ids), max_tokens=8, vocab_size=100)


@settings(max_examples=200, deadline=None)
@given(ANY | st.fixed_dictionaries({"x402Version": st.just(2), "accepted": ANY, "payload": ANY}))
def test_any_json_for_a_payment_parses_or_is_refused(value: object) -> None:
    header = base64.b64encode(json.dumps(value).encode()).decode()
    with pytest.raises(Invalid):  # no arbitrary value holds an authorization
        parse_payment(header)
