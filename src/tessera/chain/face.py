"""What every generated face is made of: calls, sends and events of one contract, in Python types.

`faces.py` is generated from the ABI by `python -m tessera.chain.build`; this file is the part that does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from tessera.chain import abi
from tessera.chain.types import Chain, Log, Receipt, Topic
from tessera.core.errors import Invalid
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

__all__ = ["Contract", "Event", "decode_events"]

E = TypeVar("E", bound="Event")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a contract. `log` says where it happened."""

    log: Log

    TOPIC: ClassVar[bytes]
    INDEXED: ClassVar[tuple[str, ...]]  # ABI types
    PLAIN: ClassVar[tuple[str, ...]]
    ORDER: ClassVar[tuple[int, ...]]  # of the fields, as positions in INDEXED + PLAIN

    @classmethod
    def decode(cls, log: Log) -> Self:
        """Raises `Invalid` when `log` is another event, or not what the ABI says."""
        if not log.topics or log.topics[0] != cls.TOPIC or len(log.topics) != 1 + len(cls.INDEXED):
            raise Invalid(f"this log is no {cls.__name__}")
        if any(len(topic) != 32 for topic in log.topics):
            raise Invalid(f"this {cls.__name__} has a topic that is not 32 bytes")
        values = [*abi.decode(cls.INDEXED, b"".join(log.topics[1:])), *abi.decode_told(cls.PLAIN, log.data)]
        return cls(log, *(values[position] for position in cls.ORDER))


class Contract:
    """One deployed contract. Views cost one request; methods that take a `key` send a transaction and wait for it."""

    ARTIFACT: ClassVar[str]

    def __init__(self, chain: Chain, address: str) -> None:
        self.chain = chain
        self.address: Account = parse_account(address)
        self._block: int | None = None

    def at(self, block: int) -> Self:
        """The same contract as it was after a block: all views then fit together."""
        pinned = type(self)(self.chain, self.address)
        pinned._block = block
        return pinned

    async def events(
        self, kind: type[E], from_block: int = 0, to_block: int | None = None, topics: Sequence[Topic] = ()
    ) -> list[E]:
        """All events of one kind, in order. `topics` narrows the indexed fields, by position."""
        logs = await self.chain.logs(self.address, [kind.TOPIC, *topics], from_block, to_block)
        return [kind.decode(log) for log in logs]

    async def _call(self, selector: str, types: Sequence[str], values: Sequence[Any], out: Sequence[str]) -> Any:
        call = bytes.fromhex(selector) + abi.encode(types, values)
        data = await self.chain.call(self.address, call, block=self._block)
        if not data and out:
            raise Invalid(f"{self.address} answers nothing: no {self.ARTIFACT} stands there")
        results = abi.decode(out, data)
        return results[0] if len(results) == 1 else results

    async def _send(self, key: AccountKey, selector: str, types: Sequence[str], values: Sequence[Any]) -> Receipt:
        return await self.chain.send(key, self.address, bytes.fromhex(selector) + abi.encode(types, values))


def decode_events(kind: type[E], address: Account, receipt: Receipt) -> list[E]:
    """The events of one kind that `address` emitted in a transaction."""
    return [
        kind.decode(log)
        for log in receipt.logs
        if log.address == address and log.topics and log.topics[0] == kind.TOPIC
    ]
