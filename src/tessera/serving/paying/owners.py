"""Tokens for who owns shares and has signed in: a level for holding enough, and a part of the capacity in proportion.

Both are tokens of a window and end with it: what is not used is lost, and nothing is carried over. They are used before
credit; who has neither pays like anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tessera.core.errors import Invalid
from tessera.core.ids import parse_account
from tessera.serving.paying.allowances import BalanceHold, all_tokens, most_tokens
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import PaidRequest
from tessera.serving.paying.holdings import Holding, Holdings
from tessera.serving.paying.keys import ApiKey

__all__ = ["OwnersTokens", "Tier", "Tokens", "capacity", "tiers"]

Tokens = Callable[[Holding], tuple[str, int]]  # what the right is called, and how many tokens it gives in a window


@dataclass(frozen=True, slots=True)
class Tier:
    """What holding so many shares is good for. Shares in their smallest unit."""

    name: str
    least_shares: int
    tokens: int  # in each window

    def __post_init__(self) -> None:
        if self.least_shares <= 0 or self.tokens <= 0:
            raise Invalid(f"the tier {self.name!r} needs shares and tokens above 0")


def tiers(*levels: Tier) -> Tokens:
    """The highest level that a holding reaches."""
    downwards = sorted(levels, key=lambda tier: tier.least_shares, reverse=True)

    def tokens(holding: Holding) -> tuple[str, int]:
        reached = next((tier for tier in downwards if holding.shares >= tier.least_shares), None)
        return ("tier", 0) if reached is None else ("tier", reached.tokens)

    return tokens


def capacity(tokens_per_window: int) -> Tokens:
    """A part of so many tokens, in proportion to the shares held:

    tokens = floor(capacity · held / supply)
    """

    def tokens(holding: Holding) -> tuple[str, int]:
        return "capacity", tokens_per_window * holding.shares // holding.supply if holding.supply else 0

    return tokens


class OwnersTokens:
    """Paying with the tokens that come with shares."""

    def __init__(self, holdings: Holdings, balances: Balances, rights: Sequence[Tokens]) -> None:
        self._holdings, self._balances, self._rights = holdings, balances, tuple(rights)

    async def hold(self, key: ApiKey, request: PaidRequest) -> BalanceHold | None:
        """See `KeyedWay.hold`. None when no right has so many tokens left."""
        if not self._rights:
            return None
        account = parse_account(key.owner)
        holding = await self._holdings.of(account)
        for right in self._rights:
            kind, tokens = right(holding)
            name = f"{kind}/{account}/{holding.window}"
            reserve = await self._balances.hold(name, most_tokens(request), allowed=tokens)
            if reserve is not None:
                return BalanceHold(self._balances, reserve, all_tokens, unit="tokens", caller=account, allowed=tokens)
        return None

    async def left(self, account: str) -> list[dict[str, int | str]]:
        """What each right has left in this window, for who asks."""
        owner = parse_account(account)
        holding = await self._holdings.of(owner)
        found: list[dict[str, int | str]] = []
        for right in self._rights:
            kind, tokens = right(holding)
            used = -(await self._balances.read(f"{kind}/{owner}/{holding.window}")).units
            ends = int(self._holdings.ends(holding))
            found.append({"kind": kind, "tokens": tokens, "tokens_left": max(0, tokens - used), "until": ends})
        return found
