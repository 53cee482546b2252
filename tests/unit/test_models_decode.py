"""Sessions of a decoding stage: limits, positions, and that nothing of a refused call stays."""

from dataclasses import replace

import pytest
import torch

from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.models.decode import IDLE_BATCHES, StageDecoder
from tessera.models.pages import PAGE, page_bytes
from tessera.models.pipeline import Pipeline
from tessera.models.presets import tiny_spec
from tessera.models.stage import Stage
from tessera.models.steps import Step

SPEC = tiny_spec(2)


def pair(sessions: int = 4, cache_bytes: int | None = None) -> tuple[StageDecoder, StageDecoder]:
    first, last = (
        StageDecoder(Stage(SPEC, stage), max_sessions=sessions, cache_bytes=cache_bytes) for stage in range(2)
    )
    torch.nn.init.normal_(last.stage.get_parameter("head"), std=0.1, generator=torch.Generator().manual_seed(0))
    return first, last


def feed(decoders: tuple[StageDecoder, StageDecoder], session: str, ids: list[int]) -> torch.Tensor:
    message = decoders[0].step(session, ids, None)
    assert isinstance(message, bytes)
    assert len(message) == decoders[1].payload_limit(len(ids))
    logits = decoders[1].step(session, ids, message)
    assert isinstance(logits, torch.Tensor)
    return logits


def step(decoders: tuple[StageDecoder, StageDecoder], wanted: Step) -> torch.Tensor:
    """What the last stage tells."""
    (message,) = decoders[0].run([wanted])
    assert isinstance(message, bytes), message
    (told,) = decoders[1].run([replace(wanted, payload=message)])
    assert isinstance(told, torch.Tensor), told
    return told


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
    text = [5, 17, 250, 3, 3, 99, 42, 7, 7, 7, 1]
    whole = feed(pair(), "a", text)
    for cuts in ([1] * 11, [4, 3, 4], [10, 1], [2, 9]):
        decoders, start = pair(), 0
        for size in cuts:
            logits = feed(decoders, "a", text[start : start + size])
            start += size
        assert torch.equal(logits, whole)


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


def test_a_rewind_forgets_guesses_and_nothing_that_is_final() -> None:
    decoders, alone = pair(), pair()
    feed(decoders, "a", [1, 2, 3])
    guessed = step(decoders, Step("a", [4, 9, 9, 9], start=3, want=4))
    assert guessed.shape == (4, SPEC.model.vocab_size)
    for token in (1, 2, 3, 4):
        plain = feed(alone, "x", [token])
    assert torch.equal(guessed[0], plain)
    assert torch.equal(step(decoders, Step("a", [5], start=4))[0], feed(alone, "x", [5]))
    (error,) = decoders[0].run([Step("a", [7], start=3)])
    assert isinstance(error, Conflict)
    assert decoders[0].position("a") == 5


def test_a_text_seen_before_is_not_computed_again() -> None:
    decoders, text = pair(), [n % 7 for n in range(3 * PAGE)]
    whole = feed(decoders, "a", text)
    for decoder in decoders:
        decoder.drop("a")
        assert decoder.open("b", text) == 2 * PAGE, "the last page has the token whose logits are asked for"
        assert decoder.open("other", [9, *text]) == 0
    assert torch.equal(feed(decoders, "b", text[2 * PAGE :]), whole)
    assert torch.equal(feed(decoders, "b", [1]), feed(pair(), "x", [*text, 1]))


def test_only_what_the_same_source_sent_is_used_again() -> None:
    _, last = pair()
    text = [1] * (2 * PAGE)
    message = b"\0" * last.payload_limit(len(text))
    assert last.open("a", text, source="attacker") == 0
    last.run([Step("a", text, message)])
    last.drop("a")
    assert last.open("b", text, source="payer") == 0
    assert last.open("c", text, source="attacker") == PAGE


def test_the_messages_of_a_text_can_be_sent_again() -> None:
    first, last = pair()
    text = [n % 5 for n in range(PAGE + 3)]
    sent = first.step("a", text, None)
    assert first.messages("a", 0, len(text)) == sent
    logits = last.step("a", text, sent)
    again = pair()[1]
    again.run([Step("b", text[:7], first.messages("a", 0, 7), want=0)])
    (rest,) = again.run([Step("b", text[7:], first.messages("a", 7, len(text)))])
    assert isinstance(rest, torch.Tensor)
    assert torch.equal(rest[-1], logits)
    for start, end in ((0, 0), (0, len(text) + 1), (-1, 2)):
        with pytest.raises(Conflict):
            first.messages("a", start, end)


def test_memory_is_bounded_and_what_was_kept_makes_way_first() -> None:
    limit = 6 * (page_bytes(SPEC.model, 2) + PAGE * SPEC.message_bytes_per_token())
    first, _ = pair(cache_bytes=limit)
    full = [[n] * (2 * PAGE) for n in range(4)]
    for n in range(3):
        first.step(str(n), full[n], None)
    assert first.held_bytes == limit
    (error,) = first.run([Step("new", [1], None)])
    assert isinstance(error, Unavailable)
    assert len(first) == 3, "nobody had to go for it: all of them are at work"
    first.drop("1")
    first.step("new", [1], None)
    assert first.held_bytes == limit
    first.drop("new")
    assert first.open("again", full[1]) == PAGE, "the end of a text goes before its beginning"


def test_an_idle_session_makes_way_and_is_told_so() -> None:
    limit = 2 * (page_bytes(SPEC.model, 2) + PAGE * SPEC.message_bytes_per_token())
    first, _ = pair(cache_bytes=limit)
    first.step("idle", [1, 2], None)
    first.step("busy", [0], None)
    for _ in range(IDLE_BATCHES):
        first.run([Step("busy", [0], start=1, want=0)])
        first.drop("busy")
        first.step("busy", [0], None)
    first.step("busy", [3] * PAGE, None)
    assert len(first) == 1
    (error,) = first.run([Step("idle", [3], start=2)])
    assert isinstance(error, Conflict)


def test_sessions_computed_together_are_what_they_are_alone() -> None:
    """And one that is refused, or whose numbers overflow, leaves the others alone."""
    first, last = pair(sessions=8)
    texts = {str(n): [(n * k) % 300 for k in range(1, 6 + 11 * n)] for n in range(4)}
    outs = first.run([Step(name, text) for name, text in texts.items()] + [Step("bad", [-1])])
    assert isinstance(outs.pop(), Invalid)
    steps = [Step(name, text, out, want=2) for (name, text), out in zip(texts.items(), outs, strict=True)]  # type: ignore[arg-type]
    together = last.run([*steps, Step("bad", [1], b"")])
    assert isinstance(together.pop(), Invalid)
    for text, logits in zip(texts.values(), together, strict=True):
        alone = pair()
        assert torch.equal(step(alone, Step("x", text, want=2)), logits)  # type: ignore[arg-type]


def test_numbers_that_overflow_end_one_session_only() -> None:
    middle = StageDecoder(Stage(tiny_spec(4), 1))
    entry = middle.stage.get_parameter("codecs.1.decode")
    worst = entry[entry.abs().sum(1).argmax()]
    codes = (127 * worst.sign()).to(torch.int8).numpy().tobytes()
    scale = torch.tensor([2.6e36]).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    good = bytes(2) + codes
    fine, damaged = middle.run([Step("good", [1], good), Step("bad", [1], scale + codes)])
    assert isinstance(damaged, Invalid)
    assert isinstance(fine, bytes)
    assert len(middle) == 1


def test_params_that_changed_leave_nothing_of_the_old_ones() -> None:
    pipeline = Pipeline(SPEC, steps=2)
    first = StageDecoder(pipeline.trainers[0])
    text = [1] * (2 * PAGE)
    first.step("a", text, None)
    pipeline.train_step(0, [torch.arange(40).reshape(2, 20)])
    assert first.open("b", text) == 0
    (error,) = first.run([Step("a", [1], start=len(text))])
    assert isinstance(error, Conflict)


def test_hidden_states_come_before_the_head() -> None:
    decoders = pair()
    hidden = step(decoders, Step("a", [1, 2, 3], want=2, hidden=True))
    assert hidden.shape == (2, SPEC.model.width)
    logits = step(pair(), Step("a", [1, 2, 3], want=2))
    torch.testing.assert_close(decoders[1].stage.logits(hidden), logits)


def test_generation_stays_within_the_context() -> None:
    pipeline = Pipeline(SPEC, steps=1)
    assert len(pipeline.generate([1] * 60, 100)) == 4
    assert pipeline.generate([1], 3) == [0, 0, 0], "an untrained head: all tokens equal, the lowest wins"
    for prompt in ([], [1] * SPEC.model.context):
        with pytest.raises(Invalid, match="a prompt has"):
            pipeline.generate(prompt, 1)
