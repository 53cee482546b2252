"""What one session asks of a stage in one go. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """`ids` after the first `start` tokens of a session; what the session had beyond them is forgotten."""

    session: str
    ids: list[int]
    payload: bytes | None = None  # the message of the stage before; None on stage 0
    start: int | None = None  # None = wherever the session is
    want: int = (
        1  # of how many of the last ids the last stage tells what follows; all but the first of them are guesses
    )
    hidden: bool = False  # the last stage tells hidden states instead of logits

    @property
    def final(self) -> int:
        """How many of the ids are no guess."""
        return len(self.ids) - max(0, self.want - 1)
