"""What the gateway asks of whoever takes the money: ways to pay, tried in order, and a hold on one payment.

What a buyer can rely on: not served, not charged. A payment is checked and held before any work. What costs the same
however long the answer gets is settled when the answer begins (streams: when the first token exists), before a byte of
it leaves; what is metered is settled when the answer ends, for the tokens that were really made, also when the buyer
cancelled. A request that fails earlier costs nothing. A stream that breaks on our side is never paid for: what was
settled before is owed, and the same payment with the same request is served again without another settlement, by any
gateway that shares the tables; what would have been metered is not charged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import anyio
import anyio.lowlevel

from tessera.core.errors import PaymentRequired
from tessera.serving.income.vouchers import purchase_of

__all__ = [
    "API_KEY_HEADER",
    "PAYMENT_HEADER",
    "Charge",
    "FakePayments",
    "Free",
    "Hold",
    "PaidRequest",
    "Payments",
    "Usage",
    "cost_headers",
]

PAYMENT_HEADER = "payment-signature"
API_KEY_HEADER = "authorization"


@dataclass(frozen=True, slots=True)
class PaidRequest:
    """What is paid for, and what came with it.

    Attributes:
        url: as buyers see it.
        digest: of the path and the body.
        headers: by lower-case name, only those that pay or identify: `PAYMENT_HEADER` and `API_KEY_HEADER`.
        max_tokens: the most that the completion can be, of all choices together.
    """

    url: str
    digest: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    prompt_tokens: int = 0
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens really read and made, as we count them."""

    prompt_tokens: int
    completion_tokens: int


def cost_headers(units: int, unit: str, left: int | None = None) -> dict[str, str]:
    """What tells a buyer the price of an answer, whichever way it is paid; `unit` is `tokens` or a coin."""
    headers = {"Tessera-Cost": str(units), "Tessera-Unit": unit}
    return headers if left is None else headers | {"Tessera-Left": str(left)}


class Hold(Protocol):
    """One payment, checked and set aside for one request. After `start`: `finish` once, or `owe`; `release` always."""

    @property
    def caller(self) -> str:
        """Who asks, for limits: an account or a key, never a name that a caller can make up. Empty: anybody."""
        ...

    async def start(self) -> dict[str, str]:
        """Before the first byte of an answer leaves. Moves the money that does not depend on the answer's length.

        Returns: headers that tell the buyer.

        Raises: PaymentRequired when it does not move; Unavailable or Late when the chain cannot be asked.
        """
        ...

    async def finish(self, usage: Usage, *, delivered: bool = True) -> dict[str, str]:
        """The answer is complete, or its buyer cancelled it. Moves the money that is metered.

        Args:
            delivered: bytes of the answer have left, so that what cannot be settled now is a debt of the buyer's;
                otherwise it will not leave.

        Raises: as `start`.
        """
        ...

    def owe(self) -> None:
        """The answer broke on our side: what was settled may come again with the same request; no more is charged."""
        ...

    async def release(self) -> None:
        """The request is over. Safe to call in any state and twice; does not fail, and is not cancelled."""
        ...


class Payments(Protocol):
    """One way to pay."""

    async def hold(self, request: PaidRequest) -> Hold | None:
        """Checks what came with the request, and sets it aside. None: it does not pay this way.

        Raises: PaymentRequired, whose fields `headers` and `offer` tell what to pay and why this was not enough;
            Unavailable or Late when that cannot be known now.
        """
        ...


class Charge:
    """The hold of one request, driven so that money in motion is finished and known whatever the client does."""

    def __init__(self, hold: Hold) -> None:
        self.caller = hold.caller
        self.purchase = purchase_of(hold)
        self._hold = hold
        self._begun = self._over = False

    async def start(self) -> dict[str, str]:
        """See `Hold.start`. A client that leaves meanwhile has paid and got nothing: that is owed."""
        try:
            with anyio.CancelScope(shield=True):
                headers = await self._hold.start()
        except BaseException:
            self._over = True
            raise
        self._begun = True
        await self._owe_if_gone()
        return headers

    async def finish(self, usage: Usage) -> dict[str, str]:
        """See `Hold.finish`. Only the first call counts, and only of an answer that began and did not break."""
        if self._over or not self._begun:
            return {}
        return await self._finish(usage, delivered=True)

    async def settle(self, usage: Usage) -> dict[str, str]:
        """All of it, for an answer that leaves as a whole."""
        headers = await self.start()
        headers |= await self._finish(usage, delivered=False)
        await self._owe_if_gone()
        return headers

    def owe(self) -> None:
        """See `Hold.owe`."""
        self._over = True
        self._hold.owe()

    async def release(self) -> None:
        """See `Hold.release`."""
        await self._hold.release()

    async def _finish(self, usage: Usage, *, delivered: bool) -> dict[str, str]:
        self._over = True
        with anyio.CancelScope(shield=True):
            headers = await self._hold.finish(usage, delivered=delivered)
        return headers  # noqa: RET504 - not inside: mypy thinks that a scope swallows what is returned there

    async def _owe_if_gone(self) -> None:
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class():
            self.owe()
            raise


class Free:
    """Serves anybody for nothing. It is its own hold."""

    def __init__(self, caller: str = "") -> None:
        self.caller = caller

    async def hold(self, request: PaidRequest) -> Free:
        return self

    async def start(self) -> dict[str, str]:
        return {}

    async def finish(self, usage: Usage, *, delivered: bool = True) -> dict[str, str]:
        return {}

    def owe(self) -> None:
        """Nothing was paid."""

    async def release(self) -> None:
        """Nothing was held."""


class FakePayments:
    """Working payments without a chain: the header names a coin, and each coin pays once."""

    def __init__(self, coins: set[str]) -> None:
        self.coins = coins
        self.held: set[str] = set()
        self.settled: list[str] = []
        self.owed: dict[str, bytes] = {}
        self.metered: list[Usage] = []

    async def hold(self, request: PaidRequest) -> FakeHold:
        coin = request.headers.get(PAYMENT_HEADER)
        if coin is None:
            raise PaymentRequired("pay one coin", headers={"PAYMENT-REQUIRED": "one coin"})
        if coin in self.held or (coin not in self.coins and self.owed.get(coin) != request.digest):
            raise PaymentRequired("this coin is spent", reason="nonce_already_used")
        self.held.add(coin)
        return FakeHold(self, coin, request.digest)


@dataclass
class FakeHold:
    payments: FakePayments
    coin: str
    digest: bytes
    open: bool = field(default=True)

    @property
    def caller(self) -> str:
        return f"coin {self.coin}"

    async def start(self) -> dict[str, str]:
        if self.payments.owed.pop(self.coin, None) is None:
            self.payments.coins.remove(self.coin)
            self.payments.settled.append(self.coin)
        return {"PAYMENT-RESPONSE": self.coin}

    async def finish(self, usage: Usage, *, delivered: bool = True) -> dict[str, str]:
        self.payments.metered.append(usage)
        return {}

    def owe(self) -> None:
        self.payments.owed[self.coin] = self.digest

    async def release(self) -> None:
        if self.open:
            self.open = False
            self.payments.held.discard(self.coin)
