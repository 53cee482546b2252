"""What the tests of commerce share: a buyer, a seller, an evaluator, and ways to let each of them die."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from chain_support import NOW, key
from escrow_world import CLIENT, EVALUATOR, GRACE, PROVIDER, Escrow, local_escrow
from tessera.agents.commerce.buyer import Buyer, Order, Progress
from tessera.agents.commerce.desk import Desk
from tessera.agents.commerce.evaluator import Evaluator, Judge
from tessera.agents.commerce.jobs import Jobs
from tessera.agents.commerce.seller import Seller, Service, Shelf
from tessera.agents.commerce.street import Street
from tessera.agents.commerce.terms import Brief
from tessera.agents.intents import intent_id
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import Mandate, sign_mandate
from tessera.core.amount import Amount
from tessera.core.clock import FakeClock
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

OWNER = key("owner of the buyer")
BRIEF = Brief("write", "Ten words about tiles", {"language": "en"})
PRICE, LIFE_S = 40, 600
CLOSERS: list[Any] = []


class Crash(BaseException):
    """The process is gone."""


@dataclass
class Fuse:
    """Lets a process die at its n-th act, before it is done or after."""

    at: int = -1
    after: bool = False
    acts: int = 0
    names: list[str] = field(default_factory=list)

    def burn(self, name: str, *, done: bool) -> None:
        if not done:
            self.names.append(name)
        if self.acts == self.at and done == self.after:
            self.at = -1
            raise Crash(name)
        self.acts += done


class Fused:
    """Anything whose methods of these names are acts of a process."""

    def __init__(self, inner: Any, fuse: Fuse, *names: str) -> None:
        self._inner, self._fuse, self._names = inner, fuse, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        def act(*args: Any, **kwargs: Any) -> Any:
            self._fuse.burn(name, done=False)
            result = found(*args, **kwargs)
            self._fuse.burn(name, done=True)
            return result

        async def act_async(*args: Any, **kwargs: Any) -> Any:
            self._fuse.burn(name, done=False)
            result = await found(*args, **kwargs)
            self._fuse.burn(name, done=True)
            return result

        return act_async if name in ("send", "fetch", "deliver") and self._inner.__class__.__name__ != "Desk" else act


async def write(brief: Brief) -> bytes:
    """A worker."""
    return f"{brief.text}: done".encode()


async def accept(brief: Brief, work: bytes) -> str:
    """A judge who looks."""
    return "" if work == await write(brief) else "not what was asked for"


@dataclass
class Market:
    """One buyer, one seller, one evaluator; what they hold lasts, they themselves may be made anew at any time."""

    escrow: Escrow
    clock: FakeClock
    mandate: Mandate
    ledger: IntentLedger
    street: Street
    desks: dict[Account, Desk]
    folder: Path
    judge: Judge = accept
    worker: Any = write

    async def jobs(self, fuse: Fuse | None = None) -> Jobs:
        chain: Any = self.escrow.chain if fuse is None else Fused(self.escrow.chain, fuse, "send")
        return await Jobs.open(chain, self.escrow.escrow.address)

    def _desk(self, who: AccountKey, fuse: Fuse | None) -> Any:
        desk = self.desks[who.account]
        return desk if fuse is None else Fused(desk, fuse, "send", "handled", "note")

    async def buyer(self, fuse: Fuse | None = None) -> Buyer:
        ledger: Any = self.ledger if fuse is None else Fused(self.ledger, fuse, "reserve", "sign", "consume", "release")
        return Buyer(CLIENT, await self.jobs(fuse), ledger, self._desk(CLIENT, fuse), self.street, clock=self.clock)

    async def seller(self, fuse: Fuse | None = None, **settings: Any) -> Seller:
        shelf: Any = Shelf(self.folder / "shelf")
        shelf = shelf if fuse is None else Fused(shelf, fuse, "put")
        services = settings.pop("services", {"write": Service(PRICE, self.worker)})
        jobs, desk = await self.jobs(fuse), self._desk(PROVIDER, fuse)
        seller = Seller(PROVIDER, jobs, desk, self.street, shelf, services, clock=self.clock, **settings)
        self.street.move_in(self.desks[PROVIDER.account], seller)
        return seller

    async def evaluator(self, fuse: Fuse | None = None, **settings: Any) -> Evaluator:
        jobs, desk = await self.jobs(fuse), self._desk(EVALUATOR, fuse)
        return Evaluator(EVALUATOR, jobs, desk, self.street, {"write": self.judge}, clock=self.clock, **settings)

    def order(self, name: str | int = "order", **changes: Any) -> Order:
        fields: dict[str, Any] = {
            "intent": intent_id(name), "mandate": self.mandate.id, "provider": PROVIDER.account,
            "evaluator": EVALUATOR.account, "price": self.units(PRICE), "deadline": int(self.clock.time()) + LIFE_S,
            "title": "Ten words", "brief": BRIEF,
        }  # fmt: skip
        return Order(**(fields | changes))

    def units(self, units: int) -> Amount:
        return Amount(units, self.mandate.asset)

    async def finish(self, order: Order, rounds: int = 8) -> Progress:
        """Everybody lives, and takes turns."""
        buyer, seller, evaluator = await self.buyer(), await self.seller(), await self.evaluator()
        progress = await buyer.advance(order)
        for _ in range(rounds):
            if progress.is_over:
                break
            await seller.step()
            await evaluator.step()
            progress = await buyer.advance(order)
        return progress

    async def wallets(self) -> tuple[int, int, int, int]:
        """Of client, provider, evaluator and the escrow, since the beginning."""
        client, provider, evaluator, escrow = await self.escrow.holdings()
        return client - 10**12, provider - 10**12, evaluator - 10**12, escrow


async def open_market(folder: Path, **changes: Any) -> Market:
    os.makedirs(folder, exist_ok=True)
    escrow = await local_escrow()
    assert escrow.clock is not None
    await escrow.coin.approve(CLIENT, escrow.escrow.address, 0)  # the buyer needs no allowance
    asset = (await Jobs.open(escrow.chain, escrow.escrow.address)).asset
    fields: dict[str, Any] = {
        "payer": OWNER.account, "agent": CLIENT.account, "per_payment": 100, "per_period": 1_000, "approve_above": 100,
        "expires_at": NOW + 30 * 86_400, "payees": (escrow.escrow.address,),
    }  # fmt: skip
    fields |= changes
    for name in ("per_payment", "per_period", "approve_above"):
        fields[name] = Amount(fields[name], asset)
    mandate = Mandate(**fields)
    ledger = IntentLedger(folder / "ledger.sqlite", clock=escrow.clock)
    ledger.open(sign_mandate(mandate, OWNER))
    street, desks = Street(), {}
    for person in (CLIENT, PROVIDER, EVALUATOR):
        desks[person.account] = Desk(person.account, folder / f"{person.account}.sqlite", clock=escrow.clock)
        street.move_in(desks[person.account])
    CLOSERS.extend([ledger, *desks.values()])
    return Market(escrow, escrow.clock, mandate, ledger, street, desks, folder)


@pytest.fixture(autouse=True)
def close_books() -> Iterator[None]:
    """Those of `open_market`, after each test of a module that imports this."""
    yield
    while CLOSERS:
        CLOSERS.pop().close()


__all__ = ["BRIEF", "GRACE", "LIFE_S", "PRICE", "Crash", "Fuse", "Market", "close_books", "open_market"]
