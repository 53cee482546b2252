"""An agent's home, opened to run: its ledgers, its purse, its model and tools together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from tessera.agents.approvals import NO_MANDATE
from tessera.agents.intents import Coin
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import Mandate
from tessera.agents.memory import Memory
from tessera.agents.paying import Payer
from tessera.agents.runtime.agent import Agent
from tessera.agents.runtime.build import build
from tessera.agents.runtime.calls import Ask
from tessera.agents.runtime.definition import WalletPart
from tessera.agents.runtime.home import AgentHome
from tessera.agents.runtime.models import PayingTransport, close_model
from tessera.agents.runtime.session import Runtime
from tessera.agents.runtime.wallet import Wallet
from tessera.agents.settlements import ChainSettlements
from tessera.agents.steps import StepLedger
from tessera.chain.client import RpcChain
from tessera.chain.rpc import HttpRpc
from tessera.core.amount import Amount
from tessera.core.errors import Invalid
from tessera.core.signing import AccountKey

__all__ = ["OpenAgent", "open_agent"]

Secret = Callable[[str], AccountKey]  # opens a key of the folder, by its name


@dataclass
class OpenAgent:
    """An agent that may run."""

    runtime: Runtime
    steps: StepLedger
    payer: Payer | None


@asynccontextmanager
async def open_agent(home: AgentHome, secret: Secret, ask: Ask | None = None) -> AsyncIterator[OpenAgent]:
    """Ready to run. Opens the purse's key only when there is a mandate."""
    async with AsyncExitStack() as stack:
        steps, ledger, approvals = home.steps(), home.ledger(), home.approvals()
        memory = Memory(home.name, home.database)
        for opened in (steps, ledger, approvals, memory):
            stack.callback(opened.close)
        mandate = home.mandate()
        wallet = payer = None
        if mandate is not None and home.definition.wallet is not None:
            rpc = HttpRpc(home.definition.wallet.chain)
            stack.push_async_callback(rpc.aclose)
            wallet = _wallet(home.definition.wallet, mandate, ledger, secret("agent"), RpcChain(rpc))
            payer = wallet.payer
            stack.push_async_callback(payer.aclose)
        stopped = (lambda: False) if mandate is None else (lambda: ledger.is_stopped(mandate.id))
        agent = _agent(home, wallet)
        stack.push_async_callback(close_model, agent.model)
        runtime = Runtime(
            agent, steps, approvals=approvals, ask=ask, memory=memory, stopped=stopped,
            mandate=NO_MANDATE if mandate is None else mandate.id,
            check_payment=None if wallet is None else wallet.check_payment,
        )  # fmt: skip
        yield OpenAgent(runtime, steps, payer)


def _agent(home: AgentHome, wallet: Wallet | None) -> Agent:
    most = home.definition.model.pay_most
    transport = None
    if most:
        if wallet is None:
            raise Invalid("model.pay_most needs a wallet: `tessera agent new --chain` makes one")
        transport = PayingTransport(wallet.payer, wallet.mandate, Amount(most, wallet.coin.asset))
    tools = [] if wallet is None else wallet.tools()
    return build(home.definition, home.folder, wallet=tools, transport=transport)


def _wallet(part: WalletPart, mandate: Mandate, ledger: IntentLedger, key: AccountKey, chain: RpcChain) -> Wallet:
    coin = Coin(mandate.asset, part.coin_name, part.coin_version)
    settlements = ChainSettlements(chain)
    return Wallet(ledger, Payer(ledger, key, coin, settlements), settlements, mandate.id, coin, key, chain)
