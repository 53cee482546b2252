"""Guessing: what is proposed, how much, and that it is bounded."""

from __future__ import annotations

import anyio

from tessera.serving.decoding.speculation import NgramDraft, NgramTable, Pace
from tessera.serving.decoding.stage_session import MAX_GUESSES


def propose(draft: NgramDraft, *texts: list[int], count: int = 5) -> list[int]:
    drafter, found = draft.begin(), list[int]()
    for text in texts:
        found = list(anyio.run(drafter.propose, text, count))
    return found


def test_a_text_goes_on_as_it_did_before() -> None:
    text = [1, 2, 3, 4, 5, 9, 9, 2, 3, 4]
    assert propose(NgramDraft(), text) == [5, 9, 9, 2, 3]
    assert propose(NgramDraft(), text[:6], text) == [5, 9, 9, 2, 3]
    assert propose(NgramDraft(), text, count=1) == [5]


def test_the_longest_agreement_counts_and_then_the_latest() -> None:
    assert propose(NgramDraft(), [1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], count=1) == [7]
    assert propose(NgramDraft(), [2, 3, 7, 2, 3, 8, 2, 3], count=1) == [8]


def test_nothing_known_is_nothing_guessed() -> None:
    for text in ([], [1], [1, 2], [1, 2, 3, 4]):
        assert propose(NgramDraft(), text) == []


def test_a_table_knows_what_mostly_followed_elsewhere() -> None:
    table = NgramTable([[1, 2, 3]] * 3 + [[1, 2, 4], *[[7, 2, 5]] * 3, [8, 2, 9]])
    assert table.after([1, 2]) == 3
    assert table.after([7, 2]) == 5
    assert table.after([9, 2]) == 3
    assert table.after([8, 2]) == 3, "seen once only: what two tokens say counts less than what one says"
    assert table.after([9]) is None
    assert propose(NgramDraft(table), [9, 1]) == [2, 3]


def test_a_table_keeps_the_most_frequent_contexts() -> None:
    texts = [[n, n + 1] for n in range(100)] + [[200, 201]] * 5
    table = NgramTable(texts, entries=3)
    assert len(table) == 3
    assert table.after([200]) == 201


def test_many_guesses_where_they_come_true_and_few_where_not() -> None:
    pace = Pace()
    for _ in range(60):
        pace.note(8, 8)
    assert pace.count() == MAX_GUESSES
    for _ in range(60):
        pace.note(1, 0)
    counts = [pace.count() for _ in range(80)]
    assert max(counts) == 1
    assert 5 <= sum(counts) <= 15, "now and then one is tried"
    for _ in range(60):
        pace.note(4, 2)
    assert 2 <= pace.count() <= 12
    assert (pace.guessed, pace.right) == (60 * 13, 60 * 10)
