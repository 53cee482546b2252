"""What the chain package hands around: logs, receipts, and the `Chain` that everything else is written against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tessera.core.errors import Invalid
from tessera.core.ids import Account, account_from_bytes
from tessera.core.signing import AccountKey

__all__ = ["Chain", "Header", "Log", "Receipt", "Topic"]

Topic = bytes | Sequence[bytes] | None  # one value, any of several, or anything


@dataclass(frozen=True, slots=True)
class Log:
    """One event as the contract emitted it. `topics[0]` is the hash of the event's signature."""

    address: Account
    topics: tuple[bytes, ...]
    data: bytes
    block_number: int
    log_index: int  # within the block
    tx_hash: str  # 0x and 64 hex digits
    block_hash: str  # likewise
    timestamp: int | None  # of the block, seconds since 1970; None where the node does not say

    @classmethod
    def from_rpc(cls, value: Any) -> Log:
        """From JSON-RPC's form. Raises `Invalid` for anything else: the node is a stranger."""
        try:
            return cls(
                address=account_from_bytes(_hex(value["address"])),
                topics=tuple(_hex(topic) for topic in value["topics"]),
                data=_hex(value["data"]),
                block_number=int(value["blockNumber"], 16),
                log_index=int(value["logIndex"], 16),
                tx_hash="0x" + _hex(value["transactionHash"]).hex(),
                block_hash="0x" + _hex(value["blockHash"]).hex(),
                timestamp=int(value["blockTimestamp"], 16) if value.get("blockTimestamp") else None,
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Invalid(f"the node sent a log that cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Header:
    """What names a block and its place: its hash commits to all that came before."""

    number: int
    hash: str  # 0x and 64 hex digits
    parent: str
    timestamp: int  # seconds since 1970

    @classmethod
    def from_rpc(cls, value: Any) -> Header:
        try:
            return cls(
                number=int(value["number"], 16),
                hash="0x" + _hex(value["hash"]).hex(),
                parent="0x" + _hex(value["parentHash"]).hex(),
                timestamp=int(value["timestamp"], 16),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise Invalid(f"the node sent a block that cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a transaction. `contract` is the account that it created, if it created one."""

    tx_hash: str
    block_number: int
    ok: bool
    gas_used: int
    sender: Account
    contract: Account | None
    logs: tuple[Log, ...]

    @classmethod
    def from_rpc(cls, value: Any) -> Receipt:
        try:
            contract = value.get("contractAddress")
            return cls(
                tx_hash="0x" + _hex(value["transactionHash"]).hex(),
                block_number=int(value["blockNumber"], 16),
                ok=int(value["status"], 16) == 1,
                gas_used=int(value["gasUsed"], 16),
                sender=account_from_bytes(_hex(value["from"])),
                contract=account_from_bytes(_hex(contract)) if contract else None,
                logs=tuple(Log.from_rpc(log) for log in value["logs"]),
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Invalid(f"the node sent a receipt that cannot be read: {error!r}") from error


class Chain(Protocol):
    """An EVM network. Every method waits at most for its own deadline and raises an error of the core tree."""

    async def chain_id(self) -> int: ...

    async def block_number(self) -> int: ...

    async def call(
        self, to: Account, data: bytes, *, block: int | None = None, sender: Account | None = None
    ) -> bytes: ...

    async def send(self, key: AccountKey, to: Account | None, data: bytes, *, value: int = 0) -> Receipt: ...

    async def deploy(self, key: AccountKey, artifact_name: str, *args: Any) -> Account: ...

    async def logs(
        self, address: Account | None, topics: Sequence[Topic], from_block: int, to_block: int | None = None
    ) -> list[Log]: ...

    async def block_logs(self, address: Account | None, topics: Sequence[Topic], block_hash: str) -> list[Log]: ...

    async def header(self, number: int | None = None) -> Header | None: ...

    async def balance(self, account: Account) -> int: ...

    async def code(self, account: Account) -> bytes: ...

    async def gas_price(self) -> int: ...


def _hex(text: Any) -> bytes:
    if not isinstance(text, str) or not text.startswith("0x"):
        raise Invalid(f"expected 0x and hex digits, not {str(text)[:80]!r}")
    try:
        return bytes.fromhex(text[2:])
    except ValueError as error:
        raise Invalid(f"expected hex digits, not {text[:80]!r}") from error
