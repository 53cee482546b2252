"""Holds on a balance: set aside before the work, used up by what it took, the rest given back.

Two units: tokens, of which somebody may use so many in a window of time and loses what it leaves, and units of a coin,
prepaid. What a request may use at most is set aside first, so that no number of requests at once uses more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import anyio
import structlog

from tessera.core.clock import Clock
from tessera.core.errors import TesseraError, Unavailable
from tessera.serving.paying.balances import Balances, Reserve
from tessera.serving.paying.charging import Free, Hold, PaidRequest, Usage, cost_headers
from tessera.serving.paying.keys import ApiKey

__all__ = ["BalanceHold", "OperatorAllowance", "UsedUp", "all_tokens", "most_tokens"]

log = structlog.get_logger()

DAY_S = 86_400


class UsedUp(Unavailable):
    """The tokens of this key's day are used up: the next day brings new ones."""

    code: ClassVar[str] = "insufficient_quota"
    status: ClassVar[int] = 429


def all_tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens


def most_tokens(request: PaidRequest) -> int:
    return request.prompt_tokens + request.max_tokens


class BalanceHold:
    """A part of a balance, set aside for one request."""

    def __init__(
        self,
        balances: Balances,
        reserve: Reserve,
        cost: Callable[[Usage], int],
        *,
        unit: str,
        caller: str,
        allowed: int = 0,
    ) -> None:
        self.caller = caller
        self._allowed = allowed
        self._balances, self._reserve, self._cost, self._unit = balances, reserve, cost, unit
        self._ended = False

    async def start(self) -> dict[str, str]:
        return {}

    async def finish(self, usage: Usage, *, delivered: bool = True) -> dict[str, str]:
        """See `Hold.finish`. Never more than was set aside."""
        used = min(self._cost(usage), self._reserve.units)
        left = await self._balances.use(self._reserve, used)
        self._ended = True
        return cost_headers(used, self._unit, left + self._allowed)

    def owe(self) -> None:
        """See `Hold.owe`: nothing is used up, and `release` gives all of it back."""

    async def release(self) -> None:
        """See `Hold.release`."""
        if self._ended:
            return
        self._ended = True
        try:
            with anyio.CancelScope(shield=True):
                await self._balances.use(self._reserve, 0)
        except TesseraError as error:  # the hold runs out by itself
            log.warning("balance_not_given_back", caller=self.caller, reason=error.message)


class OperatorAllowance:
    """The operator's own keys: nothing is paid, and a key may be limited to so many tokens a day (UTC)."""

    def __init__(self, balances: Balances, clock: Clock) -> None:
        self._balances, self._clock = balances, clock

    async def hold(self, key: ApiKey, request: PaidRequest) -> Hold:
        """See `KeyedWay.hold`. Raises: UsedUp."""
        caller = f"key {key.id}"
        if not key.tokens_per_day:
            return Free(caller)
        now = self._clock.time()
        name, allowed = f"tokens/{key.id}/{int(now // DAY_S)}", key.tokens_per_day
        reserve = await self._balances.hold(name, most_tokens(request), allowed=allowed)
        if reserve is None:
            left = allowed + (await self._balances.read(name)).units
            raise UsedUp(
                f"this key has {left} of {allowed} tokens left today, the request can take {most_tokens(request)}",
                retry_after_s=DAY_S - now % DAY_S,
                tokens_left=left,
            )
        return BalanceHold(self._balances, reserve, all_tokens, unit="tokens", caller=caller, allowed=allowed)
