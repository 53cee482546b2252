"""An agent's wallet as tools: look, buy over x402, pay an account, send a transaction; all under its mandate.

Invariants: each purchase and payment is one intent of its run, so that a model which tries again, a killed process and
a seller who asks twice pay once; what is signed as a transaction was tried on a copy of the chain first, and counts
against the mandate before it is sent; the tools know no key but the purse's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from eth_abi.abi import encode as abi_encode

from tessera.agents.approvals import Approval, payment_call
from tessera.agents.guard import Simulated
from tessera.agents.intents import Coin, Intent, intent_id
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import parse_asset
from tessera.agents.paying import Payer, Purchase
from tessera.agents.runtime.agent import Tool
from tessera.agents.runtime.calls import NeedsPerson, current_calls
from tessera.agents.settlements import Settlements
from tessera.agents.simulation import Claim, Pay, Planned, simulate
from tessera.agents.tools import Source, ToolSpec
from tessera.chain.client import RpcChain
from tessera.core.amount import Amount
from tessera.core.errors import Conflict, Invalid, Missing, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

__all__ = ["Wallet"]

BODY_SHOWN = 100_000  # characters of what was bought
DATA_LIMIT = 65_536  # bytes of a transaction's data
_OWN = Source(author="own")


@dataclass
class Wallet:
    """One purse under one mandate.

    Args:
        chain: where transactions go; None leaves the tools out that send one.
    """

    ledger: IntentLedger
    payer: Payer
    settlements: Settlements
    mandate: str
    coin: Coin
    key: AccountKey
    chain: RpcChain | None = None

    def tools(self) -> list[Tool]:
        looking = [
            Tool(self.get_balance, ToolSpec("get_balance", "read", source=_OWN)),
            Tool(self.get_budget, ToolSpec("get_budget", "read", source=_OWN)),
            Tool(self.list_purchases, ToolSpec("list_purchases", "read", source=_OWN)),
        ]
        buying = ToolSpec("buy", "pay", {"url": "url", "most": "amount", "purpose": "plain"}, repeatable=True)
        if self.chain is None:
            return [*looking, Tool(self.buy, buying)]
        paying = ToolSpec(
            "pay", "pay", {"payee": "target", "units": "amount", "purpose": "plain"}, signs=True, repeatable=True
        )
        sending = ToolSpec(
            "send_transaction", "pay",
            {"contract": "target", "payee": "target", "units": "amount", "receives": "plain", "data": "plain"},
            signs=True,
        )  # fmt: skip
        return [
            *looking,
            Tool(self.buy, buying),
            Tool(self.pay, paying, self._simulate_pay),
            Tool(self.send_transaction, sending, self._simulate_transaction),
        ]

    def check_payment(self, tool: str, arguments: Mapping[str, Any]) -> None:
        """For a guard's `mandate`: refuse what the mandate would refuse anyway. Raises: Refused."""
        mandate = self.ledger.mandate(self.mandate)
        units = arguments.get("units", arguments.get("most", 0))
        payee = arguments.get("payee")
        if isinstance(units, int) and tool != "buy" and units > mandate.per_payment.units:
            raise Refused(f"{units} units, at most {mandate.per_payment.units} at once", rule="per_payment")
        if isinstance(payee, str) and payee and not mandate.any_payee and parse_account(payee) not in mandate.payees:
            raise Refused(f"{payee} is not on the mandate's list", rule="payee")

    # --- looking ----------------------------------------------------------------------------------------------------

    async def get_balance(self) -> dict[str, Any]:
        """What the purse holds, in the coin's smallest units."""
        balance = await self.settlements.balance(self.coin.asset, self.key.account)
        return {"account": self.key.account, "asset": balance.asset, "units": balance.units}

    async def get_budget(self) -> dict[str, Any]:
        """What the mandate allows, and what is left of it now."""
        mandate = self.ledger.mandate(self.mandate)
        spent = await anyio.to_thread.run_sync(self.ledger.spent, self.mandate)
        return {
            "per_payment": mandate.per_payment.units, "per_period": mandate.per_period.units,
            "period_s": mandate.period_s, "left": max(mandate.per_period.units - spent.units, 0),
            "approve_above": mandate.approve_above.units, "payees": list(mandate.payees),
            "any_payee": mandate.any_payee, "purposes": list(mandate.purposes), "expires_at": mandate.expires_at,
        }  # fmt: skip

    async def list_purchases(self) -> list[dict[str, Any]]:
        """The last hundred purchases and payments, newest first, and what became of each."""
        entries = await anyio.to_thread.run_sync(self.ledger.entries)
        mine = [entry for entry in entries if entry.intent.mandate == self.mandate]
        return [
            {"payee": e.intent.payee, "units": e.intent.amount.units, "resource": e.intent.resource,
             "purpose": e.intent.purpose, "state": e.state, "note": e.note}
            for e in reversed(mine[-100:])
        ]  # fmt: skip

    # --- money ------------------------------------------------------------------------------------------------------

    async def buy(self, url: str, most: int, purpose: str = "") -> dict[str, Any]:
        """Fetch an address that may ask for money (x402), for at most `most` units. The same address is paid once."""
        intent = intent_id(current_calls().run, "buy", url, purpose)
        purchase = Purchase(intent, self.mandate, url, Amount(most, self.coin.asset), purpose=purpose)
        bought = await self._approved(lambda approval: self.payer.buy(purchase, approval))
        paid = 0 if bought.entry is None else bought.entry.intent.amount.units
        text = bought.body.decode("utf-8", errors="replace")
        return {"status": bought.status, "paid": paid, "text": text[:BODY_SHOWN]}

    async def pay(self, payee: str, units: int, purpose: str = "") -> dict[str, Any]:
        """Pay an account so many units of the coin. The same payment again within a run is the same one."""
        intent = Intent(
            intent_id(current_calls().run, "pay", payee, units, purpose), self.mandate, parse_account(payee),
            Amount(units, self.coin.asset), f"pay {payee}", purpose,
        )  # fmt: skip
        entry = await self._approved(lambda approval: self.payer.pay(intent, self._chain(), approval))
        if entry.state == "released":
            raise Conflict(f"this payment was given up: {entry.note}")
        return {"state": entry.state, "transaction": entry.note, "units": units, "payee": payee}

    async def send_transaction(
        self, contract: str, data: str, units: int = 0, payee: str = "", receives: str = ""
    ) -> dict[str, Any]:
        """Call a contract with the purse. Say all that it does: `units` of the coin go to `payee` (else the contract),
        and a coin `receives` comes in. It is tried first, and refused if anything else leaves the purse."""
        planned, claim = self._transaction(
            {"contract": contract, "data": data, "units": units, "payee": payee, "receives": receives}
        )
        if claim.pays:
            name = intent_id(current_calls().run, "transaction", planned.digest)
            spent, resource = Amount(units, self.coin.asset), f"transaction {planned.digest}"
            intent = Intent(name, self.mandate, claim.pays[0].payee, spent, resource)
            await self._approved(lambda approval: self._count(intent, approval))
        receipt = await self._chain().send(self.key, planned.to, planned.data)
        return {"transaction": receipt.tx_hash, "block": receipt.block_number, "units": units}

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _count(self, intent: Intent, approval: Approval | None) -> None:
        """Counted as paid before it is sent: a crash in between costs budget, never money."""
        balance = await self.settlements.balance(self.coin.asset, self.key.account)

        def work() -> None:
            if self.ledger.mandate(self.mandate).agent != self.key.account:
                raise Refused("the mandate is another agent's", rule="agent")
            try:
                self.ledger.reserve(intent, balance=balance, approval=approval)
            except Refused as error:
                error.fields["intent"] = intent.to_dict()
                raise
            self.ledger.consume(intent.id, intent.resource)

        await anyio.to_thread.run_sync(work)

    async def _approved(self, work: Callable[[Approval | None], Awaitable[Any]]) -> Any:
        """Do it; where the ledger wants the approver's signature, with that, or ask for it."""
        try:
            return await work(None)
        except Refused as error:
            if error.rule != "approval" or "intent" not in error.fields:
                raise
            intent = Intent.from_dict(error.fields["intent"])
        call = payment_call(intent, self.ledger.mandate(self.mandate))
        approvals = current_calls().approvals
        try:
            answer = None if approvals is None else await anyio.to_thread.run_sync(approvals.answer, call.digest)
        except Missing:
            answer = None
        if isinstance(answer, Approval):
            return await work(answer)
        evidence = {"rules": ["approve_above"], "to": {intent.payee: "payee"}, "amounts": [intent.amount.units]}
        raise NeedsPerson(call, evidence)

    async def _simulate_pay(self, arguments: Mapping[str, Any]) -> Simulated:
        """The coins' way as a plain transfer, which moves the same units as the authorization that is signed."""
        payee, units, coin = parse_account(arguments["payee"]), int(arguments["units"]), parse_asset(self.coin.asset)[1]
        if not 0 < units < 2**256:
            raise Invalid(f"{units} units are no payment")
        data = keccak(b"transfer(address,uint256)")[:4] + abi_encode(["address", "uint256"], [payee, units])
        claim = Claim((Pay(coin, payee, units),))
        return await simulate(self._chain(), Planned(self.key.account, coin, data), claim)

    async def _simulate_transaction(self, arguments: Mapping[str, Any]) -> Simulated:
        planned, claim = self._transaction(arguments)
        return await simulate(self._chain(), planned, claim)

    def _transaction(self, arguments: Mapping[str, Any]) -> tuple[Planned, Claim]:
        """The same for the same arguments: what was tried is what is signed."""
        text, units = str(arguments["data"]), int(arguments.get("units") or 0)
        try:
            data = bytes.fromhex(text.removeprefix("0x"))
        except ValueError as error:
            raise Invalid(f"data is hex, not {text[:40]!r}") from error
        if len(data) > DATA_LIMIT or units < 0:
            raise Invalid(f"at most {DATA_LIMIT} bytes of data, and no negative units")
        contract = parse_account(arguments["contract"])
        payee = parse_account(arguments["payee"]) if arguments.get("payee") else contract
        coin = parse_asset(self.coin.asset)[1]
        came: tuple[Account, ...] = (parse_account(arguments["receives"]),) if arguments.get("receives") else ()
        claim = Claim((Pay(coin, payee, units),) if units else (), receives=came)
        return Planned(self.key.account, contract, data), claim

    def _chain(self) -> RpcChain:
        if self.chain is None:
            raise Invalid("this wallet knows no chain to send to")
        return self.chain
