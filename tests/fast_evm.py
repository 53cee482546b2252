"""Contracts on the chain's own engine, without signatures, blocks and a journal: for tests with very many calls.

A call takes 1-2 ms, whether it succeeds or reverts, and a slot is read in microseconds. Several times faster than a
chain, because nothing is signed, hashed or estimated; and than boa, which traces each call and explains each revert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.chain import abi, artifact
from tessera.chain.engine import BlockEnv, Message, Outcome, State
from tessera.chain.reverts import revert_reason
from tessera.chain.world import World
from tessera.core.hashing import keccak
from tessera.core.ids import Account, account_from_bytes

GAS = 8_000_000


class Reverted(Exception):
    """A contract said no."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What a call gave back: `result` are the bytes it returned."""

    result: bytes
    outcome: Outcome


class FastEvm:
    """Accounts, contracts and a clock. `fork` gives an independent copy, at once."""

    def __init__(self, now: int, world: World | None = None) -> None:
        self.now = now
        self._state = State(world or World.empty())

    def fork(self) -> FastEvm:
        self._state._state.lock_changes()  # calls leave their changes open, since elsewhere nobody wants them
        return FastEvm(self.now, self._state.world)

    def deploy(self, sender: Account, name: str, *arguments: Any) -> Account:
        """One of the package's contracts."""
        return self.create(sender, artifact.load(name).init_code(*arguments))

    def create(self, sender: Account, code: bytes) -> Account:
        outcome = self._run(sender, None, code)
        assert outcome.contract is not None
        return account_from_bytes(outcome.contract)

    def send(self, sender: Account, to: Account, signature: str, *values: Any) -> Sent:
        """Call `signature` ("fund(uint256,uint256)") and keep what it changed. Raises `Reverted`."""
        outcome = self._run(sender, to, encoded(signature, values))
        return Sent(outcome.output, outcome)

    def word(self, contract: Account, slot: int) -> int:
        """A word of a contract's storage."""
        return self._state.storage(bytes.fromhex(contract[2:]), slot)

    def _run(self, sender: Account, to: Account | None, data: bytes) -> Outcome:
        target = bytes.fromhex(to[2:]) if to else None
        message = Message(bytes.fromhex(sender[2:]), target, data, gas=GAS)
        outcome = self._state.call(message, BlockEnv(1, 1, self.now))
        if not outcome.ok:
            raise Reverted(revert_reason(outcome.output) if outcome.reverted else outcome.error)
        return outcome


def encoded(signature: str, values: Sequence[Any]) -> bytes:
    kinds = signature[signature.index("(") + 1 : -1]
    return keccak(signature.encode())[:4] + abi.encode(kinds.split(",") if kinds else [], values)


def mapped(key: Account | int, slot: int) -> int:
    """Where Vyper keeps the value of `key` in a HashMap at `slot`: key and slot the other way round than Solidity."""
    word = bytes.fromhex(key[2:]).rjust(32, b"\0") if isinstance(key, str) else key.to_bytes(32, "big")
    return int.from_bytes(keccak(slot.to_bytes(32, "big") + word), "big")
