"""A fair: a chain in memory with an escrow, a street, and agents who come and go. For first steps and demonstrations.

async with open_fair() as fair:
    seller = fair.seller({"write": Service(40, write)})
    order = fair.order(seller, fair.judge({"write": look}), "write", "Ten words about tiles", 40)
    progress, work = await fair.trade(order)
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
from tessera.chain.faces import Coin, JobEscrow
from tessera.chain.local import LocalChain
from tessera.core.amount import Amount
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Late
from tessera.core.signing import AccountKey
from tessera.devnet.ledger import LOCAL_CHAIN_ID

__all__ = ["Fair", "open_fair"]

GRACE_S, JOB_S, MOST_TURNS = 60, 600, 20


@dataclass
class Fair:
    """One buyer with a mandate over `coins` units, and whoever else comes."""

    jobs: Jobs
    street: Street
    buyer: Buyer
    mandate: Mandate
    ledger: IntentLedger
    _folder: Path
    _clock: Clock
    _stack: AsyncExitStack
    _others: list[Seller | Evaluator] = field(default_factory=list)

    def seller(self, services: Mapping[str, Service]) -> Seller:
        """Somebody new who sells."""
        key = AccountKey.generate()
        desk, shelf = self._desk(key), Shelf(self._folder / key.account)
        seller = Seller(key, self.jobs, desk, self.street, shelf, services, clock=self._clock)
        self.street.move_in(desk, seller)
        self._others.append(seller)
        return seller

    def judge(self, judges: Mapping[str, Judge]) -> Evaluator:
        """Somebody new who judges."""
        key = AccountKey.generate()
        judge = Evaluator(key, self.jobs, self._desk(key), self.street, judges, clock=self._clock)
        self._others.append(judge)
        return judge

    def order(self, seller: Seller, judge: Evaluator, kind: str, text: str, units: int) -> Order:
        """What the buyer wants of a seller."""
        price, deadline = Amount(units, self.jobs.asset), int(self._clock.time()) + JOB_S
        intent = intent_id("fair", seller.account, kind, text)
        return Order(
            intent, self.mandate.id, seller.account, judge.account, price, deadline, f"{kind}: {text}"[:120],
            Brief(kind, text, {}),
        )  # fmt: skip

    async def trade(self, order: Order) -> tuple[Progress, bytes]:
        """Everybody takes turns until the order is over. Returns: how it ended, and the work if it was paid."""
        for _ in range(MOST_TURNS):
            progress = await self.buyer.advance(order)
            if progress.is_over:
                paid = progress.outcome is not None and progress.outcome.paid > 0
                return progress, await self.buyer.collect(order) if paid else b""
            for other in self._others:
                await other.step()
        raise Late(f"the order is not over after {MOST_TURNS} turns: who is silent?")

    def _desk(self, key: AccountKey) -> Desk:
        desk = Desk(key.account, self._folder / f"{key.account}.sqlite", clock=self._clock)
        self._stack.callback(desk.close)
        self.street.move_in(desk)
        return desk


@asynccontextmanager
async def open_fair(coins: int = 1_000, clock: Clock | None = None) -> AsyncIterator[Fair]:
    """Open it in a folder that is gone afterwards."""
    clock = clock or SystemClock()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessera-fair-")))
        chain = stack.enter_context(LocalChain(None, chain_id=LOCAL_CHAIN_ID, clock=clock)).client()
        patron, agent = AccountKey.generate(), AccountKey.generate()
        coin = await Coin.deploy(chain, patron)
        escrow = await JobEscrow.deploy(chain, patron, coin.address, GRACE_S)
        await coin.mint(patron, agent.account, coins)
        jobs, street = await Jobs.open(chain, escrow.address), Street()
        ledger = IntentLedger(folder / "ledger.sqlite", clock=clock)
        stack.callback(ledger.close)
        most = Amount(coins, jobs.asset)
        mandate = Mandate(
            payer=patron.account, agent=agent.account, per_payment=most, per_period=most, approve_above=most,
            payees=(escrow.address,), expires_at=int(clock.time()) + 86_400,
        )  # fmt: skip
        ledger.open(sign_mandate(mandate, patron))
        desk = Desk(agent.account, folder / "buyer.sqlite", clock=clock)
        stack.callback(desk.close)
        street.move_in(desk)
        buyer = Buyer(agent, jobs, ledger, desk, street, clock=clock)
        yield Fair(jobs, street, buyer, mandate, ledger, folder, clock, stack)
