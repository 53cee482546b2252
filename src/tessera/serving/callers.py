"""How much one caller may ask: requests and tokens a minute, and answers at once.

A caller is whoever pays (an account, an API key), else the address that asks; its name is never a thing that the caller
can make up. A minute's worth is a bucket that refills evenly, so a caller may come in bursts of a whole minute. What
is remembered is bounded: beyond `max_callers` the one that was quiet for longest is forgotten, and starts afresh when
it comes again. Counts are of this process: behind several gateways a caller has so many times its limits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from starlette.types import ASGIApp, Receive, Scope, Send

from tessera.core.clock import Clock
from tessera.core.errors import Unavailable
from tessera.serving.envelope import error_response

__all__ = ["CallerLimits", "Callers", "TooMany", "Visit", "address_of"]

MINUTE_S = 60.0


class TooMany(Unavailable):
    """The caller has asked for more than it may: wait `retry_after_s`."""

    code: ClassVar[str] = "rate_limit_exceeded"
    status: ClassVar[int] = 429


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """For each caller; 0 = no limit. Generous, since who pays is welcome: they hold off a flood, not a customer."""

    requests_per_minute: int = 6_000
    tokens_per_minute: int = 6_000_000  # of prompt and completion; what was reserved and not used comes back
    concurrent: int = 64  # answers at once
    max_callers: int = 20_000  # remembered at once


def address_of(scope: Scope) -> str:
    """The name of a caller of whom nothing else is known."""
    client = scope.get("client")
    return f"address {client[0] if client else ''}"


class _Bucket:
    """What is left of a minute's worth. May go below zero for one request that is larger than the whole."""

    __slots__ = ("_at", "_left", "_per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def wait_s(self, count: int, now: float) -> float:
        """How long until `count` may be taken; 0 when at once."""
        self._left = min(self._per_minute, self._left + max(0.0, now - self._at) * self._per_minute / MINUTE_S)
        self._at = now
        missing = min(count, self._per_minute) - self._left
        return max(0.0, missing * MINUTE_S / self._per_minute)

    def take(self, count: int) -> None:
        self._left = min(self._per_minute, self._left - count)


class _Caller:
    __slots__ = ("active", "requests", "tokens")

    def __init__(self, limits: CallerLimits, now: float) -> None:
        self.active = 0
        self.requests = _Bucket(limits.requests_per_minute, now) if limits.requests_per_minute else None
        self.tokens = _Bucket(limits.tokens_per_minute, now) if limits.tokens_per_minute else None


class Visit:
    """One answer in the making."""

    def __init__(self, caller: _Caller, reserved: int) -> None:
        self._caller, self._reserved = caller, reserved

    def used(self, tokens: int) -> None:
        """Gives back what was reserved and not used. Only the first call counts."""
        if self._caller.tokens is not None and self._reserved:
            self._caller.tokens.take(min(tokens, self._reserved) - self._reserved)
        self._reserved = 0


class Callers:
    """Everybody who asks, and how much."""

    def __init__(self, limits: CallerLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    def __len__(self) -> int:
        return len(self._callers)

    def knock(self, name: str) -> None:
        """Counts a request. Raises: TooMany."""
        caller, now = self._find(name)
        if caller.requests is not None:
            self._take(caller.requests, 1, now, f"{self._limits.requests_per_minute} requests a minute")

    @contextmanager
    def visit(self, name: str, tokens: int) -> Iterator[Visit]:
        """An answer of at most `tokens` tokens, prompt included. Raises: TooMany."""
        caller, now = self._find(name)
        if self._limits.concurrent and caller.active >= self._limits.concurrent:
            raise TooMany(f"{caller.active} answers at once, at most {self._limits.concurrent} expected")
        if caller.tokens is not None:
            self._take(caller.tokens, tokens, now, f"{self._limits.tokens_per_minute} tokens a minute")
        caller.active += 1
        try:
            yield Visit(caller, tokens)
        finally:
            caller.active -= 1

    def door(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose routes under `/v1` count each request of an address, whoever pays for it in the end."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"].startswith("/v1"):
                try:
                    self.knock(address_of(scope))
                except TooMany as error:
                    await error_response(error)(scope, receive, send)
                    return
            await app(scope, receive, send)

        return guarded

    def _take(self, bucket: _Bucket, count: int, now: float, limit: str) -> None:
        if wait_s := bucket.wait_s(count, now):
            raise TooMany(f"at most {limit}; nothing was charged", retry_after_s=wait_s)
        bucket.take(count)

    def _find(self, name: str) -> tuple[_Caller, float]:
        now = self._clock.time()
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = _Caller(self._limits, now)
            self._forget_one()
        else:
            self._callers.move_to_end(name)
        return caller, now

    def _forget_one(self) -> None:
        """Drops who was quiet for longest. Who has an answer in the making stays: there are few such callers."""
        if len(self._callers) > self._limits.max_callers:
            quiet = next((name for name, caller in self._callers.items() if not caller.active), None)
            if quiet is not None:
                del self._callers[quiet]
