"""What leaves the payer is measured on a copy of the chain, whatever the transaction and its events say."""

from __future__ import annotations

from typing import Any

import pytest
from eth_abi.abi import encode as abi_encode

from agents_world import AGENT, ATTACKER, PAYER, SELLER
from contract_sources import DEED, SHOP, bytecode
from tessera.agents.guard import Guard
from tessera.agents.simulation import NATIVE, Claim, Pay, Planned, simulate
from tessera.agents.tools import ToolSpec
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.core.errors import Invalid, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account

pytestmark = pytest.mark.anyio
ME = AGENT.account


class World:
    """A purse with 1,000 units that a shop may take, and a deed."""

    coin: Coin
    shop: Account
    deed: Account

    def __init__(self) -> None:
        self.local = LocalChain(None, chain_id=31_337, alloc={ME: 10**18})
        self.chain: RpcChain = self.local.client()

    async def open(self) -> World:
        self.coin = await Coin.deploy(self.chain, PAYER)
        thief = abi_encode(["address"], [ATTACKER.account])
        self.shop = await self._deploy(bytecode(SHOP) + thief)
        self.deed = await self._deploy(bytecode(DEED) + thief + abi_encode(["address"], [ME]))
        await self.coin.mint(PAYER, ME, 1_000)
        await self.coin.approve(AGENT, self.shop, 1_000)
        return self

    async def _deploy(self, code: bytes) -> Account:
        contract = (await self.chain.send(PAYER, None, code)).contract
        assert contract is not None
        return contract

    def planned(self, to: Account, name: str, types: str = "", *values: Any, wei: int = 0) -> Planned:
        kinds = types.split(",") if types else []
        return Planned(ME, to, keccak(f"{name}({types})".encode())[:4] + abi_encode(kinds, values), wei)

    def buy(self, name: str, units: int = 100) -> Planned:
        return self.planned(self.shop, name, "address,uint256", self.coin.address, units)


@pytest.fixture
async def world() -> World:
    return await World().open()


async def test_what_a_call_says_may_leave(world: World) -> None:
    found = await simulate(world.chain, world.buy("buy"), Claim((Pay(world.coin.address, world.shop, 100),)))
    assert (found.verdict, found.findings) == ("same", ())
    assert found.leaves == (f"100 units of {world.coin.address} leave",)
    assert world.local.head.number == 5  # nothing happened


@pytest.mark.parametrize(
    ("name", "units", "claimed", "why"),
    [
        ("buy", 100, 99, "does not say"),
        ("buy_and_more", 100, 100, "200 units"),
        ("buy_elsewhere", 100, 100, "100 units"),
        ("buy_elsewhere", 100, 1_000, "100 units"),
        ("buy", 1_001, 1_001, "fails"),
    ],
)
async def test_more_money_or_another_payee_differs(world: World, name: str, units: int, claimed: int, why: str) -> None:
    claim = Claim((Pay(world.coin.address, world.shop, claimed),))
    found = await simulate(world.chain, world.buy(name, units), claim)
    assert found.verdict == "differs"
    assert why in found.findings[0]


async def test_allowances_and_ownership_leave_too(world: World) -> None:
    coin, thief = world.coin.address, ATTACKER.account
    approve = world.planned(coin, "approve", "address,uint256", thief, 2**256 - 1)
    for planned, words in (
        (approve, "may take"),
        (world.planned(world.deed, "claim_reward"), f"number 7 of {world.deed} goes to {thief}"),
        (world.planned(world.deed, "register"), "may take everything"),
        (world.planned(world.deed, "upgrade"), f"itself goes to {thief}"),
    ):
        found = await simulate(world.chain, planned, Claim())
        assert found.verdict == "differs"
        assert words in found.findings[0]
    some = world.planned(coin, "approve", "address,uint256", SELLER, 50)
    assert (await simulate(world.chain, some, Claim(approves=(Pay(coin, SELLER, 50),)))).verdict == "same"
    assert (await simulate(world.chain, some, Claim(approves=(Pay(coin, SELLER, 49),)))).verdict == "differs"
    assert (await simulate(world.chain, world.planned(world.deed, "nothing"), Claim())).verdict == "same"


async def test_the_network_s_own_coin_is_money(world: World) -> None:
    planned = world.planned(world.shop, "take_ether", wei=5)
    assert (await simulate(world.chain, planned, Claim())).verdict == "differs"
    assert (await simulate(world.chain, planned, Claim((Pay(NATIVE, world.shop, 5),)))).verdict == "same"


async def test_a_node_that_cannot_simulate_or_lies_is_not_known() -> None:
    class Node:
        answer: Any = None

        async def request(self, method: str, params: list[Any]) -> Any:
            if self.answer is None:
                raise Invalid("there is no method 'eth_simulateV1' here")
            return self.answer

    node, planned = Node(), Planned(ME, SELLER, b"")
    ok = {"status": "0x1", "returnData": "0x", "logs": [{"address": "0x1", "topics": 3}]}
    for answer in (None, [], {}, "x", [{"calls": []}], [{"calls": [1]}], [{"calls": [ok]}], [{"calls": [{}, {}]}]):
        node.answer = answer
        assert (await simulate(node, planned, Claim())).verdict == "unknown"


async def test_the_guard_refuses_what_differs_and_asks_about_what_is_not_known(world: World) -> None:
    spec = ToolSpec("buy", "pay", {"shop": "target", "units": "amount"}, signs=True)
    guard = Guard([spec], f"Pay 100 to {world.shop}")
    call = ("buy", {"shop": world.shop, "units": 100})
    claim = Claim((Pay(world.coin.address, world.shop, 100),))
    same = await simulate(world.chain, world.buy("buy"), claim)
    differs = await simulate(world.chain, world.buy("buy_and_more"), claim)
    assert guard.decide(*call, same).answer == "allow"
    assert guard.decide(*call).verdict.rules == ("not_simulated",)
    assert guard.decide(*call, differs).answer == "deny"
    assert guard.decide(*call, differs).evidence["simulation"]["findings"]
    with pytest.raises(Refused, match="simulation_differs"):
        guard.admit(*call, differs)


async def test_one_simulation_has_the_gas_of_one_block(world: World) -> None:
    call = {"from": ME, "to": world.shop, "data": "0x", "gas": hex(10_000_000)}
    for calls in ([], [call] * 257, "x"):
        with pytest.raises(Invalid):
            await world.chain.request("eth_simulateV1", [{"blockStateCalls": [{"calls": calls}]}])
    with pytest.raises(Invalid):
        await world.chain.request("eth_simulateV1", [{"blockStateCalls": [{"calls": [call], "stateOverrides": {}}]}])
