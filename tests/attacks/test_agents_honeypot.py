"""A honeypot: anybody may buy the coin, and only its maker may sell it. The price looks fine, the purchase works.

The purchase is tried on a copy of the chain, and what came in is sent on at once: what cannot leave is not bought.
"""

from __future__ import annotations

import pytest

from agents_world import AGENT, ATTACKER, PAYER, SELLER
from contract_sources import HONEYPOT, bytecode
from tessera.agents.guard import Guard
from tessera.agents.simulation import Claim, Planned, simulate
from tessera.agents.tools import ToolSpec
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.local import LocalChain
from tessera.core.hashing import keccak
from tessera.core.ids import Account

pytestmark = pytest.mark.anyio
ME = AGENT.account


def _buying(coin: Account, method: str = "buy(uint256)", arguments: bytes = b"") -> Planned:
    return Planned(ME, coin, keccak(method.encode())[:4] + arguments)


async def _chain() -> tuple[RpcChain, Account, Coin]:
    chain = LocalChain(None, chain_id=31_337).client()
    receipt = await chain.send(ATTACKER, None, bytecode(HONEYPOT))
    assert receipt.contract is not None
    return chain, receipt.contract, await Coin.deploy(chain, PAYER)


async def test_a_coin_that_cannot_be_sold_is_not_bought() -> None:
    chain, trap, _ = await _chain()
    found = await simulate(chain, _buying(trap, arguments=(500).to_bytes(32, "big")), Claim(receives=(trap,)))
    assert found.verdict == "differs"
    assert "cannot leave again" in found.findings[0]
    guard = Guard([ToolSpec("buy_coin", "pay", {"coin": "target"}, signs=True)], f"Buy the coin {trap}")
    assert guard.decide("buy_coin", {"coin": trap}).answer == "ask"  # the request names it: all else is in order
    assert guard.decide("buy_coin", {"coin": trap}, found).answer == "deny"


async def test_a_coin_that_can_be_sold_is_bought() -> None:
    chain, _, coin = await _chain()
    mint = _buying(coin.address, "mint(address,uint256)", bytes.fromhex(ME[2:]).rjust(32, b"\0") + bytes(31) + b"\x05")
    assert (await simulate(chain, mint, Claim(receives=(coin.address,)))).verdict == "same"


async def test_a_purchase_that_brings_nothing_differs() -> None:
    chain, trap, coin = await _chain()
    nothing = _buying(coin.address, "approve(address,uint256)", bytes.fromhex(SELLER[2:]).rjust(32, b"\0") + bytes(32))
    found = await simulate(chain, nothing, Claim(receives=(trap,)))
    assert (found.verdict, found.findings) == ("differs", (f"nothing of {trap} comes in",))
