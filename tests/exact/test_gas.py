"""LocalChain charges what other implementations charge: the same transactions on anvil use the same gas."""

from __future__ import annotations

import pytest

from chain_support import anvil, fund_on_anvil, memory_chain
from gas import CONTRACTS, PEOPLE, gas_table
from tessera.chain.client import RpcChain
from tessera.chain.rpc import HttpRpc

# The two chains have different clocks, and a time in a call's data costs 12 gas less for each zero byte in it.
ZEROS_IN_A_TIME = (12, 24, 36, 48)


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("contract", CONTRACTS)
async def test_receipts_use_the_same_gas_as_anvils(contract: str) -> None:
    with anvil() as url:
        fund_on_anvil(url, [person.account for person in PEOPLE])
        rpc = HttpRpc(url)
        on_anvil = await gas_table(contract, RpcChain(rpc))
        await rpc.aclose()
    here = await gas_table(contract, memory_chain().client())
    assert here.keys() == on_anvil.keys()
    differ = {name: (gas, on_anvil[name]) for name, gas in here.items() if gas != on_anvil[name]}
    assert all(abs(one - other) in ZEROS_IN_A_TIME for one, other in differ.values()), differ
