"""Block 0: who has coins from the beginning, and which contracts stand where every chain has them.

The standard contracts are small ones of our own at the addresses of Permit2 and of x402's proxies, so that an official
x402 client pays on a chain without internet as it pays on a public one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tessera.chain import artifact
from tessera.chain.blocks import Block, make_block
from tessera.chain.engine import State
from tessera.chain.world import World
from tessera.core.errors import Invalid
from tessera.core.ids import Account, parse_account

__all__ = ["EXACT_PROXY", "PERMIT2", "UPTO_PROXY", "Genesis", "standard_contracts"]

PERMIT2 = parse_account("0x000000000022D473030F116dDEE9F6B43aC78BA3")
EXACT_PROXY = parse_account("0x402085c248EeA27D92E8b30b2C58ed07f9E20001")
UPTO_PROXY = parse_account("0x4020A4f3b7b90ccA423B9fabCc0CE57C6C240002")


@lru_cache(maxsize=1)
def standard_contracts() -> Mapping[Account, bytes]:
    """Their code by account. They have neither constructor nor immutables: the runtime is all there is."""
    names = {PERMIT2: "permit2", EXACT_PROXY: "x402_exact_proxy", UPTO_PROXY: "x402_upto_proxy"}
    return {account: artifact.load(name).runtime for account, name in names.items()}


@dataclass(frozen=True)
class Genesis:
    """Part of what a chain is: its journal keeps it, and whoever replays the journal must know it.

    Attributes:
        alloc: wei by account.
        contracts: code by account; nonce 1, no storage.
    """

    alloc: Mapping[Account, int] = field(default_factory=dict)
    contracts: Mapping[Account, bytes] = field(default_factory=standard_contracts)

    def block(self, timestamp: int) -> tuple[Block, World]:
        """Block 0, and the accounts after it."""
        state = State(World.empty())
        state.allocate(
            {bytes.fromhex(account[2:]): wei for account, wei in self.alloc.items()},
            {bytes.fromhex(account[2:]): code for account, code in self.contracts.items()},
        )
        return make_block(0, timestamp, bytes(32), state.world.root), state.world

    def to_value(self) -> dict[str, Any]:
        """For JSON; equal for equal ones."""
        return {
            "alloc": {account: str(wei) for account, wei in sorted(self.alloc.items())},
            "contracts": {account: "0x" + code.hex() for account, code in sorted(self.contracts.items())},
        }

    @classmethod
    def from_value(cls, value: Any) -> Genesis:
        """From a journal's or a peer's JSON. Raises `Invalid`."""
        try:
            alloc = {parse_account(account): int(wei) for account, wei in value["alloc"].items()}
            contracts = {
                parse_account(account): bytes.fromhex(code.removeprefix("0x"))
                for account, code in value["contracts"].items()
            }
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Invalid(f"not a chain's genesis: {error!r}") from error
        if any(not 0 <= wei < 2**256 for wei in alloc.values()):
            raise Invalid("a genesis balance is a uint256")
        return cls(alloc, contracts)
