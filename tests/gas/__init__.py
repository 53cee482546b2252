"""What every operation of our contracts costs, as gas in its receipt.

Each module here is named after a contract and has `async def table(chain) -> dict[str, int]`: operations by name, by
accounts from `PEOPLE`, on a chain of its own, so that one contract's figures do not depend on another's transactions.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from chain_support import WORKERS, key
from tessera.chain.client import RpcChain

HOLDERS = [key(f"holder {i}") for i in range(16)]
PEOPLE = [*WORKERS, *HOLDERS, key("stranger")]  # whom a chain that charges for gas must give some
CONTRACTS = sorted(module.name for module in pkgutil.iter_modules(__path__))


async def gas_table(contract: str, chain: RpcChain) -> dict[str, int]:
    """One contract's operations and their gas, on a fresh chain."""
    used: dict[str, int] = await import_module(f"gas.{contract}").table(chain)
    return used
