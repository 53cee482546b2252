"""LocalChain charges what other implementations charge: the same transactions on anvil use the same gas."""

from __future__ import annotations

import pytest

from chain_gas import HOLDERS, gas_table
from chain_support import WORKERS, anvil, fund_on_anvil, memory_chain
from tessera.chain.client import RpcChain
from tessera.chain.rpc import HttpRpc


@pytest.mark.anyio
async def test_receipts_use_the_same_gas_as_anvils() -> None:
    with anvil() as url:
        fund_on_anvil(url, [person.account for person in [*WORKERS, *HOLDERS]])
        rpc = HttpRpc(url)
        on_anvil = await gas_table(RpcChain(rpc))
        await rpc.aclose()
    assert await gas_table(memory_chain().client()) == on_anvil
