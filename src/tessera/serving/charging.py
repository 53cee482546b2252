"""What the gateway asks of whoever takes the money.

What a buyer can rely on: not served, not charged. A payment is checked and held before any work; it is settled when the
answer is complete (streams: when the first token exists) and before a byte of it leaves; a request that fails earlier
costs nothing and its authorization stays good. A stream that breaks on our side after settlement is owed: the same
authorization with the same request is served again without another settlement, by any gateway that shares the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tessera.core.errors import PaymentRequired

__all__ = ["PAYMENT_HEADER", "FakePayments", "Hold", "PaidRequest", "Payments"]

PAYMENT_HEADER = "PAYMENT-SIGNATURE"


@dataclass(frozen=True, slots=True)
class PaidRequest:
    """What is paid for: where, and the SHA-256 of the body."""

    url: str
    digest: bytes


class Hold(Protocol):
    """One payment, checked and set aside for one request."""

    async def settle(self) -> dict[str, str]:
        """Moves the money; returns the headers that tell the buyer.

        Raises: PaymentRequired when it does not move; Unavailable or Late when the chain cannot be asked.
        """
        ...

    def owe(self) -> None:
        """Settled but not served: the same payment may come again with the same request."""
        ...

    async def release(self) -> None:
        """The request is over. Safe to call in any state and twice; does not fail, and is not cancelled."""
        ...


class Payments(Protocol):
    """Checks payments."""

    async def hold(self, header: str | None, request: PaidRequest) -> Hold:
        """Checks the payment in `header` (None: there is none) and sets it aside.

        Raises: PaymentRequired, whose fields `headers` and `offer` tell what to pay and why this was not enough.
        """
        ...


class FakePayments:
    """Working payments without a chain: the header names a coin, and each coin pays once."""

    def __init__(self, coins: set[str]) -> None:
        self.coins = coins
        self.held: set[str] = set()
        self.settled: list[str] = []
        self.owed: dict[str, bytes] = {}

    async def hold(self, header: str | None, request: PaidRequest) -> FakeHold:
        if header is None:
            raise PaymentRequired("pay one coin", headers={"PAYMENT-REQUIRED": "one coin"})
        if header in self.held or (header not in self.coins and self.owed.get(header) != request.digest):
            raise PaymentRequired("this coin is spent", reason="nonce_already_used")
        self.held.add(header)
        return FakeHold(self, header, request.digest)


@dataclass
class FakeHold:
    payments: FakePayments
    coin: str
    digest: bytes
    open: bool = field(default=True)

    async def settle(self) -> dict[str, str]:
        if self.payments.owed.pop(self.coin, None) is None:
            self.payments.coins.remove(self.coin)
            self.payments.settled.append(self.coin)
        return {"PAYMENT-RESPONSE": self.coin}

    def owe(self) -> None:
        self.payments.owed[self.coin] = self.digest

    async def release(self) -> None:
        if self.open:
            self.open = False
            self.payments.held.discard(self.coin)
