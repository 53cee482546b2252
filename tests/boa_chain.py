"""Contracts in a bare EVM, for tests with very many calls: no transactions, no blocks, no gas price.

It runs the bytecode that ships. A face works on it as on any chain, and what a contract refuses is the same error.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import boa
from boa.environment import Env
from boa.util.abi import Address

from tessera.chain import artifact
from tessera.chain.reverts import revert_error, revert_reason
from tessera.chain.types import Receipt
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

T = TypeVar("T")


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("this call waits for something")


class BoaChain:
    """The part of a `Chain` that faces need. Time stands still until `wait`."""

    def __init__(self, timestamp: int) -> None:
        self._env = boa.env
        self._env.enable_fast_mode()
        self._env.evm.patch.timestamp = timestamp

    @property
    def time(self) -> int:
        return int(self._env.evm.patch.timestamp)

    def wait(self, seconds: int) -> None:
        self._env.evm.patch.timestamp += seconds

    @contextmanager
    def anchor(self) -> Iterator[None]:
        """What happens inside is undone."""
        with self._env.anchor():
            yield

    async def chain_id(self) -> int:
        return int(self._env.evm.patch.chain_id)

    async def call(self, to: Account, data: bytes, *, block: int | None = None) -> bytes:
        return self._execute(None, to, data, modifying=False)

    async def send(self, key: AccountKey, to: Account | None, data: bytes, *, value: int = 0) -> Receipt | None:
        assert to is not None
        self._execute(key.account, to, data, modifying=True)
        return None

    async def deploy(self, key: AccountKey, artifact_name: str, *arguments: Any) -> Account:
        code = artifact.load(artifact_name).init_code(*arguments)
        address, computation = self._env.deploy(sender=Address(key.account), bytecode=code)
        assert not computation.is_error
        return parse_account(str(address))

    def _execute(self, sender: Account | None, to: Account, data: bytes, *, modifying: bool) -> bytes:
        who = None if sender is None else Address(sender)
        done = self._env.execute_code(Address(to), who, data=data, is_modifying=modifying)
        if done.is_error:
            raise revert_error(revert_reason(done.output))
        return bytes(done.output)


@contextmanager
def boa_chain(timestamp: int) -> Iterator[BoaChain]:
    with boa.swap_env(Env()):
        yield BoaChain(timestamp)
