"""Laws of incremental decoding and stop strings, for any bytes and any stops."""

from __future__ import annotations

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.serving.engine import FakeEngine, Sampling
from tessera.serving.text import CharTokenizer, Generation


def pieces_of(ids: list[int], stops: list[str], limit: int) -> tuple[list[str], Generation]:
    async def collect() -> tuple[list[str], Generation]:
        engine = FakeEngine(lambda prompt, sampling: ids)
        generation = Generation(engine, CharTokenizer(), [1], Sampling(max_tokens=limit), stops)
        found = [piece async for piece in generation.pieces()]
        await generation.aclose()
        assert engine.open == 0
        return found, generation

    return anyio.run(collect)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=16).map(str.encode))
def test_the_pieces_join_to_the_decoded_completion(data: bytes) -> None:
    pieces, generation = pieces_of(list(data), [], 100)
    assert "".join(pieces) == data.decode(errors="replace")
    assert generation.completion_tokens == len(data)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abé€", max_size=24), st.lists(st.text(alphabet="abé€", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_earliest_stop_string(text: str, stops: list[str]) -> None:
    pieces, generation = pieces_of(list(text.encode()), stops, 1_000)
    # A stop string counts when its last character arrives; among those that end together the earliest start wins.
    shown = text
    for end in range(1, len(text) + 1):
        starts = [text.find(stop, 0, end) for stop in stops]
        if any(start >= 0 for start in starts):
            shown = text[: min(start for start in starts if start >= 0)]
            break
    assert "".join(pieces) == shown
    assert not any(stop in shown for stop in stops)
    assert generation.finish_reason == "stop"


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12), st.integers(1, 12))
def test_the_token_limit_is_never_passed(text: str, limit: int) -> None:
    data = list(text.encode())
    _, generation = pieces_of(data, [], limit)
    assert generation.completion_tokens == min(len(data), limit)
    assert generation.finish_reason == ("length" if len(data) >= limit else "stop")
