"""Jobs and the registry as plain typed functions, with what a guard must know of each: effect, arguments, origins.

    for function, spec in CommerceTools(...).tools(): ...     # any framework's tools, any guard's specs

What others wrote (cards, works) is of outside origin and grants nothing. `hire` pays: it names provider and price, so
that a guard can ask whether the user did; the evaluator is the operator's choice, never the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tessera.agents.commerce.buyer import Buyer, Order
from tessera.agents.commerce.cards import Registry
from tessera.agents.commerce.terms import Brief
from tessera.agents.intents import intent_id
from tessera.agents.tools import Role, Source, ToolSpec
from tessera.core.amount import Amount
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Missing
from tessera.core.ids import Account, parse_account

__all__ = ["CommerceTools"]

WORK_SHOWN = 20_000  # characters
MOST_HOURS = 24 * 7


@dataclass
class CommerceTools:
    """One agent's.

    Args:
        run: the run's name: the same request in one run is one job, whoever asks again.
        evaluator: who judges every job that is ordered here.
    """

    buyer: Buyer
    registry: Registry
    mandate: str
    asset: str
    evaluator: Account
    run: str
    clock: Clock = field(default_factory=SystemClock)
    _orders: dict[str, Order] = field(default_factory=dict)

    def tools(self) -> list[tuple[Callable[..., Any], ToolSpec]]:
        """Each function with its spec."""
        outside = Source(author="outside", text=("name", "about", "work"))
        hire: dict[str, Role] = {
            "provider": "target",
            "units": "amount",
            "kind": "label",
            "text": "content",
            "hours": "plain",
        }
        return [
            (self.search_agents, ToolSpec("search_agents", "read", source=outside)),
            (self.hire, ToolSpec("hire", "pay", hire, source=Source(author="own"), repeatable=True)),
            (self.get_job, ToolSpec("get_job", "read", source=Source(author="own"))),
            (self.read_work, ToolSpec("read_work", "read", source=outside)),
            (self.cancel_job, ToolSpec("cancel_job", "destroy", {"order": "object"}, source=Source(author="own"))),
        ]  # fmt: skip

    async def search_agents(self, kind: str, most: int = 0) -> list[dict[str, Any]]:
        """Agents who offer a kind of work, the best first by what paying clients have said. `most`: price in units."""
        await self.registry.refresh()
        found = self.registry.search(kind, most=most or None)[:20]
        return [
            {"provider": one.card.account, "name": one.card.name, "about": one.card.about,
             "units": one.card.services[kind], "clients": one.clients, "paid": one.paid, "stars": round(one.mean, 2)}
            for one in found
        ]  # fmt: skip

    async def hire(self, provider: str, units: int, kind: str, text: str, hours: int = 1) -> dict[str, Any]:
        """Order work from an agent for `units`, through the escrow. Asking for the same again is the same order."""
        if type(hours) is not int or not 0 < hours <= MOST_HOURS:
            raise Invalid(f"a job takes 1 to {MOST_HOURS} hours, not {hours!r}")
        account, intent = parse_account(provider), intent_id(self.run, "hire", provider, units, kind, text)
        asked = self.buyer.asked(intent)
        deadline = asked.deadline if asked else int(self.clock.time()) + hours * 3_600
        line = " ".join(f"{kind}: {text}".split())[:100]
        title = "".join(char if char.isprintable() else " " for char in line)
        price, brief = Amount(units, self.asset), Brief(kind, text, {})
        order = Order(intent, self.mandate, account, self.evaluator, price, deadline, title, brief)
        self._orders[intent] = order
        return await self.get_job(intent)

    async def get_job(self, order: str) -> dict[str, Any]:
        """How an order stands, and where its money is; what can be done now is done."""
        progress = await self.buyer.advance(self._order(order))
        outcome = progress.outcome
        return {
            "order": order, "phase": progress.phase.name.lower(), "job": progress.job, "note": progress.note,
            "paid": outcome.paid if outcome else 0, "refunded": outcome.refunded if outcome else 0,
        }  # fmt: skip

    async def read_work(self, order: str) -> dict[str, Any]:
        """The work of an order that is paid, as text."""
        work = await self.buyer.collect(self._order(order))
        return {"order": order, "work": work[: 4 * WORK_SHOWN].decode(errors="replace")[:WORK_SHOWN]}

    async def cancel_job(self, order: str) -> dict[str, Any]:
        """Take back an order that is not funded yet."""
        progress = await self.buyer.take_back(self._order(order))
        return {"order": order, "phase": progress.phase.name.lower()}

    def _order(self, intent: str) -> Order:
        if intent not in self._orders:
            raise Missing(f"no order {intent[:16]}… in this run: hire first")
        return self._orders[intent]
