"""Guessing the next tokens at the gateway, so that one way through the stages gives several.

The last stage chooses every token as it would without guesses, and tells how many of them were right, so a guess can
cost time but never changes a text. How many are worth sending follows from how many were right lately.

Invariants: a draft that knows nothing guesses nothing; its memory is bounded by the text and the table.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from tessera.serving.decoding.stage_session import MAX_GUESSES

__all__ = ["Draft", "Drafter", "NgramDraft", "NgramTable", "Pace"]

LONGEST = 4  # tokens that agree when a text repeats itself: tried first, then fewer
SHORTEST = 2  # at least; one more where a table knows what two tokens mostly mean
WORTH = 0.02  # a guess is sent while the chance that it and all before it are right is at least this
MEMORY = 0.9  # of the estimate, for each guess that was judged
PROBE_EVERY = 8  # rounds without a guess before one is tried again


class Drafter(Protocol):
    """Guesses for one text. A small model fits as well as a table."""

    async def propose(self, ids: Sequence[int], count: int) -> Sequence[int]:
        """Up to `count` tokens that may follow `ids`, which begins with the `ids` of the call before."""
        ...


class Draft(Protocol):
    """Where drafters come from; many texts at once."""

    def begin(self) -> Drafter: ...


class NgramTable:
    """What mostly follows the last few tokens, counted in other texts.

    Args:
        order: tokens looked back at, at most.
        least: times that a context of several tokens must have been seen; fewer say less than a shorter context does.
        entries: contexts kept at most, the most frequent ones.
    """

    def __init__(
        self, texts: Iterable[Sequence[int]], *, order: int = 3, least: int = 3, entries: int = 100_000
    ) -> None:
        self.order = order
        counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for end in range(1, len(text)):
                for size in range(1, min(order, end) + 1):
                    counts[tuple(text[end - size : end])][text[end]] += 1
        known = [(context, after) for context, after in counts.items() if len(context) == 1 or after.total() >= least]
        common = sorted(known, key=lambda item: (-item[1].total(), item[0]))[:entries]
        self._next = {context: max(after.items(), key=lambda pair: (pair[1], -pair[0]))[0] for context, after in common}

    def __len__(self) -> int:
        return len(self._next)

    def after(self, ids: Sequence[int]) -> int | None:
        """The likeliest next token, by the longest context that the table has."""
        for size in range(min(self.order, len(ids)), 0, -1):
            if (token := self._next.get(tuple(ids[len(ids) - size :]))) is not None:
                return token
        return None


class NgramDraft:
    """Guesses that a text goes on as it did after the same tokens before; else as other texts do."""

    def __init__(self, table: NgramTable | None = None) -> None:
        self.table = table

    def begin(self) -> Drafter:
        return _NgramDrafter(self.table)


class _NgramDrafter:
    def __init__(self, table: NgramTable | None) -> None:
        self._table = table
        self._shortest = SHORTEST if table is None else SHORTEST + 1
        self._seen = 0
        self._ends: dict[tuple[int, ...], int] = {}  # where a run of tokens ended last

    async def propose(self, ids: Sequence[int], count: int) -> list[int]:
        for end in range(max(1, self._seen), len(ids)):  # a run counts once something has followed it
            for size in range(self._shortest, min(LONGEST, end) + 1):
                self._ends[tuple(ids[end - size : end])] = end
        self._seen = len(ids)
        text = list(ids[-max(LONGEST, self._table.order if self._table else 0) :])
        found = list[int]()
        place = self._repeats(ids)
        while len(found) < count:
            if place is not None and place < len(ids):
                token: int | None = ids[place]
                place += 1
            else:
                token = self._table.after(text) if self._table is not None else None
            if token is None:
                break
            found.append(token)
            text = [*text[1:], token]
        return found

    def _repeats(self, ids: Sequence[int]) -> int | None:
        """Where what followed the same tokens before begins."""
        for size in range(min(LONGEST, len(ids)), self._shortest - 1, -1):
            if (end := self._ends.get(tuple(ids[-size:]))) is not None:
                return end
        return None


class Pace:
    """How many guesses to send, from how many were right."""

    def __init__(self) -> None:
        self.guessed = self.right = 0
        self._chance = 0.7  # that a guess is right whose predecessors are; a start that soon does not matter
        self._silent = 0

    def count(self) -> int:
        """Guesses for the next round: while all of them being right has a chance of `WORTH`."""
        count = MAX_GUESSES if self._chance >= 0.999 else int(math.log(WORTH) / math.log(max(self._chance, 1e-9)))
        if count:
            return min(count, MAX_GUESSES)
        self._silent += 1
        return 1 if self._silent % PROBE_EVERY == 0 else 0

    def note(self, guessed: int, right: int) -> None:
        """So many guesses were sent, and the first `right` of them were what followed."""
        self.guessed += guessed
        self.right += right
        for hit in [True] * right + [False] * (right < guessed):
            self._chance = MEMORY * self._chance + (1 - MEMORY) * hit
