"""Which payments are in flight, owed or in doubt, so that one authorization is worked for once at a time.

The chain is what makes a nonce pay once; this ledger only knows what the chain cannot: that an authorization is being
worked for right now, that one was settled without an answer, or that its settlement got no answer from the chain.
Invariants: a payment is in at most one state; owed and doubtful ones are bounded in number and age, oldest out first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Literal

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Unavailable

__all__ = ["PaymentLedger", "PaymentName"]

MAX_REMEMBERED = 4_096
REMEMBER_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class PaymentName:
    """An EIP-3009 authorization: a nonce belongs to its payer. Both lower-case hex."""

    payer: str
    nonce: str


@dataclass(frozen=True, slots=True)
class _Memory:
    state: Literal["owed", "doubtful"]
    request: bytes
    since: float


class PaymentLedger:
    """The payments of one gateway process."""

    def __init__(self, clock: Clock, *, max_held_per_payer: int) -> None:
        self._clock = clock
        self._max_held_per_payer = max_held_per_payer
        self._held: set[PaymentName] = set()
        self._by_payer: Counter[str] = Counter()
        self._memories: OrderedDict[PaymentName, _Memory] = OrderedDict()

    @property
    def held(self) -> int:
        """Payments in flight."""
        return len(self._held)

    def hold(self, name: PaymentName) -> None:
        """Takes `name` for one request. Raises: Conflict when it is taken; Unavailable when its payer has too many."""
        if name in self._held:
            raise Conflict("this authorization is already paying for another request")
        if self._by_payer[name.payer] >= self._max_held_per_payer:
            limit = self._max_held_per_payer
            raise Unavailable(f"{limit} payments of this payer are in flight; nothing was charged")
        self._held.add(name)
        self._by_payer[name.payer] += 1

    def release(self, name: PaymentName) -> None:
        self._held.discard(name)
        self._by_payer[name.payer] -= 1
        if self._by_payer[name.payer] <= 0:
            del self._by_payer[name.payer]

    def remember(self, name: PaymentName, state: Literal["owed", "doubtful"], request: bytes) -> None:
        """That `name` was settled (or may have been) for `request`, which got no answer."""
        self._memories[name] = _Memory(state, request, self._clock.time())
        self._memories.move_to_end(name)
        while len(self._memories) > MAX_REMEMBERED:
            self._memories.popitem(last=False)

    def recall(self, name: PaymentName, request: bytes) -> Literal["owed", "doubtful"] | None:
        """What is remembered of `name` for exactly this request.

        The request's digest stands in for a secret: after settlement the authorization is public on the chain.
        """
        memory = self._memories.get(name)
        if memory is None or memory.request != request or self._clock.time() - memory.since > REMEMBER_S:
            return None
        return memory.state

    def forget(self, name: PaymentName) -> None:
        self._memories.pop(name, None)
