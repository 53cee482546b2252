"""A street of agents in one process: a working `Post` without a network, whose doors can be shut."""

from __future__ import annotations

from typing import Protocol

from tessera.agents.commerce.desk import Desk
from tessera.agents.commerce.messages import Message
from tessera.core.errors import Missing, Unavailable
from tessera.core.ids import Account

__all__ = ["Sells", "Street"]


class Sells(Protocol):
    """Whoever hands over work; `seller.Seller` does."""

    async def hand_over(self, message: Message) -> bytes: ...


class Street:
    """Everybody who lives here, by account."""

    def __init__(self) -> None:
        self._desks: dict[Account, Desk] = {}
        self._sellers: dict[Account, Sells] = {}
        self.away: set[Account] = set()

    def move_in(self, desk: Desk, seller: Sells | None = None) -> None:
        """An agent is reachable from now on; one that comes back replaces what it was."""
        self._desks[desk.owner] = desk
        if seller is not None:
            self._sellers[desk.owner] = seller

    async def deliver(self, message: Message) -> None:
        if message.recipient in self.away or message.recipient not in self._desks:
            raise Unavailable(f"{message.recipient} is away")
        self._desks[message.recipient].receive(Message.decode(message.encode()))

    async def fetch(self, message: Message) -> bytes:
        if message.recipient in self.away:
            raise Unavailable(f"{message.recipient} is away")
        if message.recipient not in self._sellers:
            raise Missing(f"{message.recipient} sells nothing here")
        return await self._sellers[message.recipient].hand_over(Message.decode(message.encode()))
