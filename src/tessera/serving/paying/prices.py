"""What tokens cost. Amounts are integers of the asset's smallest unit.

Invariants: what is charged is never above what was authorised for the same request; anything that was served costs at
least one unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tessera.core.errors import Invalid
from tessera.serving.paying.charging import PaidRequest, Usage

__all__ = ["TokenPrice"]


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Units for a lot of tokens, 1,000 of them unless it says otherwise: those read, and those made."""

    prompt_units: int
    completion_units: int
    lot: int = 1_000

    def __post_init__(self) -> None:
        for units in (self.prompt_units, self.completion_units):
            if type(units) is not int or not 0 <= units <= 10**12:
                raise Invalid(f"a price for {self.lot} tokens is an integer from 0 to 10^12 units, not {units!r}")
        if type(self.lot) is not int or not 0 < self.lot <= 2**31:
            raise Invalid(f"a price is for 1 to 2^31 tokens, not {self.lot!r}")

    @classmethod
    def of_context(cls, units: int, context: int) -> Self:
        """The price at which a whole context of tokens costs `units`, to the unit: as a request of any length does.

        >>> TokenPrice.of_context(40_000, 512).cost_down(Usage(500, 12))
        40000
        """
        return cls(units, units, context)

    def cost_down(self, usage: Usage) -> int:
        """What `usage` costs. Rounded down, against the payee, but at least 1: nothing is served for nothing.

            cost = max(1, floor((prompt · p + completion · c) / lot))

        >>> TokenPrice(500, 1500).cost_down(Usage(1000, 3))
        504
        """
        return max(1, self._lots(usage.prompt_tokens, usage.completion_tokens) // self.lot)

    def most_up(self, request: PaidRequest) -> int:
        """The most that `request` can cost, rounded up: what its buyer authorises."""
        return max(1, -(-self._lots(request.prompt_tokens, request.max_tokens) // self.lot))

    def _lots(self, prompt: int, completion: int) -> int:
        return prompt * self.prompt_units + completion * self.completion_units
