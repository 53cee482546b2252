"""The wallet's tools on a real (embedded) chain, and the same tools offered to strangers over MCP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from eth_abi.abi import encode as abi_encode
from fastmcp.client import Client

from agents_world import (  # noqa: F401
    AGENT,
    APPROVER,
    ATTACKER,
    NOW,
    PAYER,
    QUICK,
    SELLER,
    Seller,
    close_ledgers,
    make_mandate,
    open_ledger,
)
from contract_sources import SHOP, bytecode
from runtime_world import OPENED, Killed, close_desks, fresh_tables, says_no, says_yes  # noqa: F401
from tessera.agents.approvals import Approvals, approve
from tessera.agents.commerce.tools import CommerceTools
from tessera.agents.intents import Coin as CoinTerms
from tessera.agents.mandates import asset_id
from tessera.agents.paying import Payer
from tessera.agents.runtime.agent import Agent, Tool
from tessera.agents.runtime.models import scripted
from tessera.agents.runtime.server import make_server
from tessera.agents.runtime.session import Runtime
from tessera.agents.runtime.wallet import Wallet
from tessera.agents.settlements import ChainSettlements, FakeSettlements
from tessera.agents.steps import StepLedger
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.core.clock import FakeClock
from tessera.core.hashing import keccak
from tessera.core.ids import Account

pytestmark = pytest.mark.anyio


class Purse:
    """1,000 units in the agent's purse; up to 100 at once, 250 a day, the approver above 50."""

    coin: Coin
    shop: Account

    async def open(self, **changes: Any) -> Purse:
        self.clock = FakeClock(NOW)
        self.local = LocalChain(None, chain_id=31_337, clock=self.clock)
        self.chain = self.local.client()
        self.coin = await Coin.deploy(self.chain, PAYER)
        thief = abi_encode(["address"], [ATTACKER.account])
        shop = (await self.chain.send(PAYER, None, bytecode(SHOP) + thief)).contract
        assert shop is not None
        self.shop = shop
        await self.coin.mint(PAYER, AGENT.account, 1_000)
        await self.coin.approve(AGENT, self.shop, 1_000)
        asset = asset_id(31_337, self.coin.address)
        terms = {"approve_above": 50, "asset": asset, "payees": (SELLER, self.shop)}
        self.mandate = make_mandate(**(terms | changes))
        where = fresh_tables()
        self.ledger = open_ledger(self.mandate, where=where, clock=self.clock)
        settlements, terms_of_coin = ChainSettlements(self.chain), CoinTerms(asset, "Test USD", "2")
        payer = Payer(self.ledger, AGENT, terms_of_coin, settlements, config=QUICK, clock=self.clock)
        self.wallet = Wallet(
            self.ledger, payer, settlements, self.mandate.id, terms_of_coin, AGENT, self.chain
        )  # fmt: skip
        self.steps = StepLedger(where, clock=self.clock)
        self.approvals = Approvals(APPROVER.account, where, clock=self.clock)
        OPENED.extend([self.steps, self.approvals])
        return self

    def runtime(self, lines: list[Any], ask: Any = None) -> Runtime:
        agent = Agent("buyer", scripted(lines), tools=self.wallet.tools())
        return Runtime(
            agent, self.steps, approvals=self.approvals, ask=ask, mandate=self.mandate.id,
            check_payment=self.wallet.check_payment, stopped=lambda: self.ledger.is_stopped(self.mandate.id),
        )  # fmt: skip

    async def held(self, who: Account) -> int:
        return await self.coin.balanceOf(who)


@pytest.fixture
async def purse() -> Purse:
    return await Purse().open()


def pay(units: int, payee: str = SELLER) -> dict[str, Any]:
    return {"tool": "pay", "arguments": {"payee": payee, "units": units}}


async def test_a_payment_that_the_user_asks_for_is_made_once(purse: Purse) -> None:
    lines = [{"tool": "get_budget"}, {"tool": "get_balance"}, pay(40), "paid"]
    outcome = await purse.runtime(lines).start(f"Pay 40 to {SELLER}")
    budget, balance, paid = (made.answer for made in outcome.calls)
    assert (budget["left"], balance["units"], paid["state"]) == (250, 1_000, "consumed")
    assert (await purse.held(SELLER), purse.ledger.spent(purse.mandate.id).paid) == (40, 40)
    assert outcome.calls[2].decision.evidence["simulation"]["verdict"] == "same"
    assert (await purse.runtime([]).replay(outcome.run)).calls[2].holds


@pytest.mark.slow
async def test_a_model_that_pays_twice_pays_once(purse: Purse) -> None:
    outcome = await purse.runtime([pay(40), pay(40), "paid"], says_yes).start(f"Pay 40 to {SELLER}")
    assert [made.answer["state"] for made in outcome.calls] == ["consumed", "consumed"]
    assert await purse.held(SELLER) == 40


async def test_a_process_killed_while_it_pays_pays_once(purse: Purse) -> None:
    send, sent = purse.chain.send, []

    async def dies(*arguments: Any, **named: Any) -> Any:
        sent.append(await send(*arguments, **named))
        raise Killed

    purse.chain.send = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await purse.runtime([pay(40), "paid"]).start(f"Pay 40 to {SELLER}")
    purse.chain.send = send  # type: ignore[method-assign]
    (run,) = purse.steps.runs()
    assert (await purse.runtime([pay(40), "paid"]).resume(run.id)).state == "done"
    assert (len(sent), await purse.held(SELLER)) == (1, 40)


async def test_above_a_sum_the_approver_signs_the_payment_itself(purse: Purse) -> None:
    runtime = purse.runtime([pay(60), "paid"])
    waiting = await runtime.start(f"Pay 60 to {SELLER}")
    question = waiting.question
    assert question is not None
    assert (question.call.tool, question.call.arguments["units"]) == ("pay", 60)
    assert question.evidence["rules"] == ["approve_above"]
    assert await purse.held(SELLER) == 0
    purse.approvals.grant(approve(question.call, APPROVER, NOW + 600))
    assert (await runtime.resume(waiting.run)).state == "done"
    assert await purse.held(SELLER) == 60
    denied = await purse.runtime([pay(70), "paid"], says_no).start(f"Pay 70 to {SELLER}")
    assert "not approved" in denied.calls[0].answer["error"]


@pytest.mark.parametrize(
    ("request_text", "line", "rule"),
    [
        (f"Pay 400 to {SELLER}", pay(400), "mandate"),
        (f"Pay 40 to {ATTACKER.account}", pay(40, ATTACKER.account), "mandate"),
        (f"Pay 40 to {SELLER}", pay(40, "nobody"), "invalid"),
        (f"Pay 40 to {SELLER}", pay(-40), "invalid"),
        (f"Pay 2000 to {SELLER}", pay(2_000), "mandate"),
    ],
)
async def test_what_the_mandate_refuses_is_not_asked_about(
    purse: Purse, request_text: str, line: dict[str, Any], rule: str
) -> None:
    outcome = await purse.runtime([line, "ok"]).start(request_text)
    if outcome.question is not None:
        assert rule in outcome.question.evidence["rules"]
    else:
        assert outcome.calls[0].answer["rule"] == rule
    assert await purse.held(AGENT.account) == 1_000


def shop_call(purse: Purse, method: str, units: int = 30) -> dict[str, Any]:
    data = keccak(f"{method}(address,uint256)".encode())[:4] + abi_encode(
        ["address", "uint256"], [purse.coin.address, units]
    )
    arguments = {"contract": purse.shop, "data": "0x" + data.hex(), "units": units}
    return {"tool": "send_transaction", "arguments": arguments}


async def test_a_transaction_that_does_what_it_says_is_sent_and_counted(purse: Purse) -> None:
    outcome = await purse.runtime([shop_call(purse, "buy"), "ok"]).start(f"Pay 30 to {purse.shop}")
    assert outcome.calls[0].answer["transaction"].startswith("0x")
    assert await purse.held(purse.shop) == 30
    assert purse.ledger.spent(purse.mandate.id).paid == 30


@pytest.mark.parametrize("method", ["buy_and_more", "buy_elsewhere"])
async def test_a_transaction_that_does_more_is_not_signed_even_with_a_yes(purse: Purse, method: str) -> None:
    runtime = purse.runtime([shop_call(purse, method), "ok"], says_yes)
    outcome = await runtime.start(f"Pay 30 to {purse.shop}")
    assert outcome.calls[0].answer["rule"] == "simulation_differs"
    assert await purse.held(AGENT.account) == 1_000


@pytest.mark.slow
async def test_a_stopped_mandate_stops_its_agent(purse: Purse) -> None:
    waiting = await purse.runtime([pay(40, ATTACKER.account), pay(40), "ok"], says_no).start("Look at my budget")
    purse.ledger.stop(purse.mandate.id, "enough")
    with pytest.raises(Exception, match="stopped"):
        await purse.runtime([pay(40), "ok"]).resume(waiting.run)
    assert await purse.held(SELLER) == 0


async def test_buying_over_http_pays_once_and_hands_the_goods_over() -> None:
    mandate, clock = make_mandate(), FakeClock(NOW)
    chain = FakeSettlements(mandate.asset, {AGENT.account: 1_000}, NOW)
    seller, ledger = Seller(chain), open_ledger(mandate, clock=clock)
    coin = CoinTerms(mandate.asset, "Test USD", "2")
    payer = Payer(ledger, AGENT, coin, chain, config=QUICK, clock=clock, transport=seller.transport())
    wallet, steps = Wallet(ledger, payer, chain, mandate.id, coin, AGENT), StepLedger()
    OPENED.append(steps)
    line = {"tool": "buy", "arguments": {"url": "https://seller/data", "most": 50}}
    agent = Agent("buyer", scripted([line, line, {"tool": "list_purchases"}, "ok"]), tools=wallet.tools())
    outcome = await Runtime(agent, steps, ask=says_yes, approvals=_approvals(clock)).start(
        "Buy https://seller/data for at most 50"
    )
    first, second, listed = (made.answer for made in outcome.calls)
    assert first == second == {"status": 200, "paid": 40, "text": '{"data":"/data"}'}
    assert [entry["state"] for entry in listed] == ["consumed"]
    assert chain.payments == [(AGENT.account, SELLER, 40)]
    await payer.aclose()


def _approvals(clock: FakeClock) -> Approvals:
    OPENED.append(approvals := Approvals(APPROVER.account, clock=clock))
    return approvals


# --- over MCP ---------------------------------------------------------------------------------------------------------


async def told(client: Client[Any], tool: str, arguments: dict[str, Any]) -> Any:
    result = await client.call_tool(tool, arguments)
    return json.loads(result.content[0].text)  # type: ignore[union-attr]


async def test_a_stranger_s_agent_pays_only_what_the_operator_asked_for(purse: Purse) -> None:
    server = make_server(purse.runtime([]), f"Pay 40 to {SELLER}")
    async with Client(server) as client:
        names = {tool.name for tool in await client.list_tools()}
        assert names == {"get_balance", "get_budget", "list_purchases", "buy", "pay", "send_transaction"}
        assert (await told(client, "get_balance", {}))["units"] == 1_000
        refused = await told(client, "pay", {"payee": ATTACKER.account, "units": 40})
        assert refused["rule"] == "mandate"
        paid = await told(client, "pay", {"payee": SELLER, "units": 40})
        assert paid["state"] == "consumed"
    assert (await purse.held(SELLER), await purse.held(ATTACKER.account)) == (40, 0)
    assert {run.state for run in purse.steps.runs()} == {"done"}


@pytest.mark.slow
async def test_without_a_request_a_call_waits_and_is_made_once_after_a_yes(purse: Purse) -> None:
    async with Client(make_server(purse.runtime([]))) as client:
        call = ("pay", {"payee": SELLER, "units": 40})
        waiting = await told(client, *call)
        assert waiting["why"] == ["amount_unexplained", "payee_not_named"]
        assert await told(client, *call) == waiting
        (question,) = purse.approvals.pending()
        assert question.call.digest == waiting["waiting"]
        purse.approvals.grant(approve(question.call, APPROVER, NOW + 600))
        assert (await told(client, *call))["state"] == "consumed"
        assert await purse.held(SELLER) == 40


async def test_job_tools_are_offered_too_and_hire_nobody_whom_the_user_did_not_name() -> None:
    class Unreached:
        """Whatever the guard refuses reaches neither buyer nor registry."""

    unreached: Any = Unreached()
    mandate = make_mandate()
    jobs = CommerceTools(unreached, unreached, mandate.id, mandate.asset, APPROVER.account, "run")
    steps = StepLedger(fresh_tables())
    OPENED.append(steps)
    agent = Agent("buyer", scripted([]), tools=[Tool(function, spec) for function, spec in jobs.tools()])
    async with Client(make_server(Runtime(agent, steps), f"Pay 40 to {SELLER}")) as client:
        assert {tool.name for tool in await client.list_tools()} >= {"search_agents", "hire", "get_job", "read_work"}
        order = {"provider": ATTACKER.account, "units": 40, "kind": "chart", "text": "draw"}
        assert (await told(client, "hire", order))["rule"] == "nobody"
