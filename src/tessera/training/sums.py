"""What the workers of one stage exchange, under the names that their lead gives: gradients, parts of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tessera.core.errors import Late, Misbehaviour
from tessera.core.ids import PeerId
from tessera.training.exchange import Exchange

__all__ = ["SummedTrainer", "Sums"]

ATTEMPTS = 256  # to end one step in one term


class SummedTrainer(Protocol):
    """What the sizes and checks come from."""

    @property
    def gradient_bytes(self) -> int: ...
    def check_gradient(self, data: bytes, tokens: int) -> int: ...
    def partition_bytes(self, round_: int) -> int: ...
    def check_partition(self, round_: int, data: bytes) -> None: ...


class Sums:
    """One worker's end.

    Args:
        tokens: of a whole step: nobody can have more in his sums.
    """

    def __init__(self, exchange: Exchange, trainer: SummedTrainer, tokens: int) -> None:
        self._exchange, self._trainer, self._tokens = exchange, trainer, tokens

    async def offer(self, term: int, step: int, attempt: int, part: bytes) -> None:
        """Our gradients of `step`."""
        await self._exchange.offer(self._exchange.name("gradient", step, _attempt(term, attempt)), part)

    async def collect(
        self, term: int, step: int, attempt: int, owners: Sequence[PeerId], patience_s: float
    ) -> list[bytes]:
        """The gradients of all `owners`, in their order.

        Raises: Late: somebody's did not come.  Misbehaviour: somebody's are no gradients, named.
        """
        name = self._exchange.name("gradient", step, _attempt(term, attempt))

        def check(data: bytes) -> None:
            self._trainer.check_gradient(data, self._tokens)

        size = self._trainer.gradient_bytes
        found = await self._exchange.collect(name, owners, patience_s, size_bytes=size, check=check)
        for fault in found.faults.values():
            raise fault
        missing = [owner for owner in owners if owner not in found.parts]
        if missing:
            raise Late(f"{missing[0][:16]}… did not show its sums of step {step} within {patience_s:.0f} s")
        return [found.parts[owner] for owner in owners]

    async def offer_round(self, round_: int, part: bytes) -> None:
        """Our part of the state in a round."""
        await self._exchange.offer(self._exchange.name("partition", round_), part)

    async def collect_round(self, round_: int, owners: Sequence[PeerId], patience_s: float) -> list[bytes]:
        """The parts of those `owners` who showed theirs in time."""
        name, size = self._exchange.name("partition", round_), self._trainer.partition_bytes(round_)

        def check(data: bytes) -> None:
            self._trainer.check_partition(round_, data)

        found = await self._exchange.collect(name, owners, patience_s, size_bytes=size, check=check)
        return list(found.parts.values())


def _attempt(term: int, attempt: int) -> int:
    if attempt >= ATTEMPTS:
        raise Misbehaviour(f"the lead tries to end a step for the {attempt}th time")
    return term * ATTEMPTS + attempt
