"""What one worker knows of a step: for each microbatch, what came in and what went out, from whom and to whom.

Codes are small, so they are kept whole: to send them again when a neighbour dies, to answer one who takes over, to sign
receipts at the end of the step, and to be audited after it.

Invariants: a microbatch is computed once in a step, whoever asks again; what is signed is what arrived last from the
worker who serves the microbatch now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tessera.core.hashing import sha256
from tessera.core.ids import PeerId

__all__ = ["Passage", "StepLog"]


@dataclass(slots=True)
class Passage:
    """One microbatch's way through this stage."""

    index: int
    source: PeerId | None  # who sends it to us; None at stage 0
    target: PeerId | None  # whom we send it to; None at the last stage
    begun: bool = False  # it is computed, or about to be
    code_in: bytes | None = None
    code_out: bytes | None = None
    gradient_in: bytes | None = None
    gradient_out: bytes | None = None
    done: bool = False  # its gradient is in our sums


@dataclass(slots=True)
class StepLog:
    """The passages of one step, by index."""

    step: int
    passages: dict[int, Passage] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.passages.values())

    def done(self) -> list[Passage]:
        """Those in our sums, by index."""
        return [self.passages[index] for index in sorted(self.passages) if self.passages[index].done]

    def came_from(self, source: PeerId) -> dict[int, bytes]:
        """SHA-256 of the codes that `source` sent and we used, by index."""
        return {p.index: sha256(p.code_in or b"") for p in self.done() if p.source == source}

    def came_back_from(self, target: PeerId) -> dict[int, bytes]:
        """SHA-256 of the gradients that `target` sent and we used, by index."""
        return {p.index: sha256(p.gradient_in or b"") for p in self.done() if p.target == target}

    def went_to(self, target: PeerId) -> dict[int, bytes]:
        """SHA-256 of the codes that we sent to `target`, by index."""
        return {p.index: sha256(p.code_out or b"") for p in self if p.target == target and p.code_out is not None}

    def went_back_to(self, source: PeerId) -> dict[int, bytes]:
        """SHA-256 of the gradients that we sent to `source`, by index."""
        return {p.index: sha256(p.gradient_out or b"") for p in self if p.source == source and p.gradient_out}

    def sources(self) -> list[PeerId]:
        return sorted({p.source for p in self if p.source is not None})

    def targets(self) -> list[PeerId]:
        return sorted({p.target for p in self if p.target is not None})
