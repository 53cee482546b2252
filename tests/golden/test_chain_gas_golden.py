"""What settlement costs, in gas: a change that makes it dearer is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chain_gas import gas_table
from chain_support import memory_chain


@pytest.mark.anyio
async def test_gas_stays_what_it_was(golden: Callable[[str, Any], None]) -> None:
    golden("tests/golden/chain_gas.json", await gas_table(memory_chain().client()))
