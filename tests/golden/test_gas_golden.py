"""What settlement costs, in gas: a change that makes it dearer is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chain_support import memory_chain
from gas import CONTRACTS, gas_table


@pytest.mark.slow
@pytest.mark.anyio
async def test_gas_stays_what_it_was(golden: Callable[[str, Any], None]) -> None:
    tables = {contract: await gas_table(contract, memory_chain().client()) for contract in CONTRACTS}
    golden("tests/golden/gas.json", tables)
