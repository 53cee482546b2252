"""What a stage tells a gateway: anything survives the way, and nothing else is believed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.core.errors import Misbehaviour
from tessera.serving.decoding.frames import Frame, pack_hidden, pack_logprobs, unpack_hidden, unpack_logprobs
from tessera.serving.decoding.shards import check_kept
from tessera.serving.engine import Token

logprobs = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
ids = st.integers(0, 2**32 - 1)


@settings(max_examples=25)
@given(st.data(), st.sampled_from([0, 1, 20]), st.integers(1, 4))
def test_log_probabilities_survive_the_wire(data: st.DataObject, count: int, length: int) -> None:
    top = st.lists(st.tuples(ids, logprobs), min_size=count, max_size=count).map(tuple)
    one = st.builds(Token, ids, logprobs, top)
    tokens = data.draw(st.lists(one, min_size=length, max_size=length))
    packed = pack_logprobs(tokens)
    assert unpack_logprobs([token.id for token in tokens], packed, count) == tokens
    with pytest.raises(Misbehaviour):
        unpack_logprobs([token.id for token in tokens], packed + b"\0", count)
    with pytest.raises(Misbehaviour):
        unpack_logprobs([token.id for token in tokens], packed, None)


@given(st.lists(ids, min_size=1, max_size=3), st.binary(max_size=80), st.integers(0, 2))
def test_any_bytes_give_tokens_or_misbehaviour(tokens: list[int], data: bytes, count: int) -> None:
    try:
        found = unpack_logprobs(tokens, data, count)
    except Misbehaviour:
        return
    assert [token.id for token in found] == tokens
    assert all(token.logprob is not None and token.logprob <= 0 for token in found)


@given(st.binary(max_size=64))
def test_a_hidden_state_is_finite_numbers(data: bytes) -> None:
    try:
        values = unpack_hidden(data)
    except Misbehaviour:
        return
    assert values
    assert all(math.isfinite(value) for value in values)
    assert pack_hidden(values) == data


@pytest.mark.parametrize("kept", [None, -1, 5, 6, True, 1.0, "1", [1]])
def test_a_stage_cannot_have_more_of_a_text_than_there_is(kept: Any) -> None:
    assert check_kept(Frame({"op": "ready", "kept": 4}, [], b""), 5) == 4
    with pytest.raises(Misbehaviour):
        check_kept(Frame({"op": "ready", "kept": kept}, [], b""), 5)
