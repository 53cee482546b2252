"""Sessions of a decoding stage: limits, positions, and that nothing of a refused call stays."""

import pytest
import torch

from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.models.decode import StageDecoder
from tessera.models.pipeline import Pipeline
from tessera.models.presets import tiny_spec
from tessera.models.stage import Stage

SPEC = tiny_spec(2)


def pair(sessions: int = 4) -> tuple[StageDecoder, StageDecoder]:
    first, last = (StageDecoder(Stage(SPEC, stage), max_sessions=sessions) for stage in range(2))
    torch.nn.init.normal_(last.stage.get_parameter("head"), std=0.1, generator=torch.Generator().manual_seed(0))
    return first, last


def feed(decoders: tuple[StageDecoder, StageDecoder], session: str, ids: list[int]) -> torch.Tensor:
    message = decoders[0].step(session, ids, None)
    assert isinstance(message, bytes)
    assert len(message) == decoders[1].payload_limit(len(ids))
    logits = decoders[1].step(session, ids, message)
    assert isinstance(logits, torch.Tensor)
    return logits


def test_logits_are_one_row_over_the_vocabulary() -> None:
    logits = feed(pair(), "a", [1, 2, 3])
    assert logits.shape == (SPEC.model.vocab_size,)
    assert logits.dtype == torch.float32


def test_sessions_do_not_see_each_other() -> None:
    decoders, alone = pair(), pair()
    feed(decoders, "a", [1, 2, 3])
    feed(decoders, "b", [9, 8])
    mixed = feed(decoders, "a", [4])
    feed(alone, "x", [1, 2, 3])
    assert torch.equal(mixed, feed(alone, "x", [4]))


def test_pieces_of_any_size_give_the_same_logits() -> None:
    """To float rounding, and where that turns a code over, to one step of it."""
    text = [5, 17, 250, 3, 3, 99, 42, 7, 7, 7, 1]
    whole = feed(pair(), "a", text)
    for cuts in ([1] * 11, [4, 3, 4], [10, 1], [2, 9]):
        decoders, start = pair(), 0
        for size in cuts:
            logits = feed(decoders, "a", text[start : start + size])
            start += size
        torch.testing.assert_close(logits, whole, rtol=0, atol=0.02)


def test_a_dropped_session_starts_from_nothing() -> None:
    decoders = pair()
    fresh = feed(decoders, "a", [1, 2])
    feed(decoders, "a", [3])
    for decoder in decoders:
        assert decoder.position("a") == 3
        decoder.drop("a")
        decoder.drop("a")
        assert decoder.position("a") == len(decoder) == 0
    assert torch.equal(feed(decoders, "a", [1, 2]), fresh)


def test_a_caller_with_another_position_is_told() -> None:
    first, _ = pair()
    first.step("a", [1, 2], None, position=0)
    with pytest.raises(Conflict, match="at token 2, not 3") as caught:
        first.step("a", [1], None, position=3)
    assert caught.value.fields["position"] == 2
    first.drop("a")
    with pytest.raises(Conflict, match="at token 0, not 2"):
        first.step("a", [1], None, position=2)
    assert len(first) == 0


def test_sessions_are_bounded() -> None:
    first, _ = pair(sessions=2)
    first.step("a", [1], None)
    first.step("b", [1], None)
    with pytest.raises(Unavailable, match="2 sessions"):
        first.step("c", [1], None)
    first.step("a", [2], None)
    first.drop("b")
    first.step("c", [1], None)


def test_the_context_is_a_limit() -> None:
    first, _ = pair()
    first.step("a", [1] * (SPEC.model.context - 1), None)
    with pytest.raises(Invalid, match="do not fit"):
        first.step("a", [1, 1], None)
    first.step("a", [1], None)
    with pytest.raises(Invalid, match="do not fit"):
        first.step("a", [1], None)


@pytest.mark.parametrize("ids", [[], [-1], [SPEC.model.vocab_size], [True], [1.0], ["1"]])
def test_bad_ids_open_no_session(ids: list[int]) -> None:
    first, _ = pair()
    with pytest.raises(Invalid, match="token id"):
        first.step("a", ids, None)
    assert len(first) == 0


def test_bad_messages_and_names_open_no_session() -> None:
    first, last = pair()
    for payload in (None, b"", b"\xff" * last.payload_limit(1)):
        with pytest.raises(Invalid):
            last.step("a", [1], payload)
    with pytest.raises(Invalid, match="no payload"):
        first.step("a", [1], b"")
    for name in ("", "x" * 129):
        with pytest.raises(Invalid, match="session's name"):
            first.step(name, [1], None)
    assert len(first) == len(last) == 0


def test_generation_stays_within_the_context() -> None:
    pipeline = Pipeline(SPEC, steps=1)
    assert len(pipeline.generate([1] * 60, 100)) == 4
    assert pipeline.generate([1], 3) == [0, 0, 0], "an untrained head: all tokens equal, the lowest wins"
    for prompt in ([], [1] * SPEC.model.context):
        with pytest.raises(Invalid, match="a prompt has"):
            pipeline.generate(prompt, 1)
