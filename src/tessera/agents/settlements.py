"""What the payer asks of a chain: did this authorization move money? The chain is the only witness that is believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode

from tessera.agents.mandates import parse_asset
from tessera.core.amount import Amount
from tessera.core.errors import Invalid, Unavailable
from tessera.core.hashing import keccak
from tessera.core.ids import Account

__all__ = ["ChainSettlements", "FakeSettlements", "Fate", "SettlementChain", "Settlements"]

_USED = keccak(b"AuthorizationUsed(address,bytes32)")
_CANCELED = keccak(b"AuthorizationCanceled(address,bytes32)")
LOOK_BACK_BLOCKS = 64  # further than when it was signed: the node that was asked then may have been ahead


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of an authorization. Paid, with the transaction; cancelled; or unused, as of the chain's `time`."""

    state: Literal["unused", "paid", "cancelled"]
    time: int  # of the block that was looked at, seconds since 1970
    transaction: str = ""


class Settlements(Protocol):
    """A chain, as far as a payer must see it."""

    async def head(self) -> int:
        """The number of the latest block."""
        ...

    async def balance(self, asset: str, account: Account) -> Amount: ...

    async def fate(self, asset: str, payer: Account, nonce: bytes, since_block: int) -> Fate:
        """Raises: Unavailable or Late when the chain cannot be asked: then nothing is known."""
        ...


class SettlementChain(Protocol):
    """What `ChainSettlements` needs of a client; `tessera.chain.RpcChain` is one."""

    async def request(self, method: str, params: list[Any]) -> Any: ...
    async def call(self, to: Account, data: bytes, *, block: int | None = None) -> bytes: ...
    async def logs(
        self, address: Account | None, topics: Sequence[Any], from_block: int, to_block: int | None = None
    ) -> Sequence[Any]: ...


class ChainSettlements:
    """`Settlements` of one EVM chain."""

    def __init__(self, chain: SettlementChain) -> None:
        self._chain = chain

    async def head(self) -> int:
        return (await self._block())[0]

    async def balance(self, asset: str, account: Account) -> Amount:
        data = keccak(b"balanceOf(address)")[:4] + abi_encode(["address"], [account])
        (units,) = abi_decode(["uint256"], await self._chain.call(parse_asset(asset)[1], data))
        return Amount(units, asset)

    async def fate(self, asset: str, payer: Account, nonce: bytes, since_block: int) -> Fate:
        """State and hour are read at one block, so that "unused, and too late now" cannot be half true."""
        contract = parse_asset(asset)[1]
        number, time = await self._block()
        data = keccak(b"authorizationState(address,bytes32)")[:4]
        data += abi_encode(["address", "bytes32"], [payer, nonce])
        (used,) = abi_decode(["bool"], await self._chain.call(contract, data, block=number))
        if not used:
            return Fate("unused", time)
        topics = [[_USED, _CANCELED], bytes.fromhex(payer[2:]).rjust(32, b"\0"), nonce]
        found = await self._chain.logs(contract, topics, max(0, min(since_block, number) - LOOK_BACK_BLOCKS))
        if not found:
            raise Unavailable("the authorization is used, and the node does not show by what")
        return Fate("paid" if found[0].topics[0] == _USED else "cancelled", time, found[0].tx_hash)

    async def _block(self) -> tuple[int, int]:
        block = await self._chain.request("eth_getBlockByNumber", ["latest", False])
        try:
            return int(block["number"], 16), int(block["timestamp"], 16)
        except (TypeError, KeyError, ValueError) as error:
            raise Invalid(f"the node's latest block cannot be read: {error!r}") from error


class FakeSettlements:
    """A working chain of one coin in memory: it knows EIP-3009's rules and counts what it pays."""

    def __init__(self, asset: str, balances: dict[Account, int], now: int = 1_800_000_000) -> None:
        self.asset, self.balances, self.now = asset, balances, now
        self.blocks = 1
        self.used: dict[tuple[Account, bytes], Fate] = {}
        self.payments: list[tuple[Account, Account, int]] = []  # payer, payee, units

    async def head(self) -> int:
        return self.blocks

    async def balance(self, asset: str, account: Account) -> Amount:
        return Amount(self.balances.get(account, 0), asset)

    async def fate(self, asset: str, payer: Account, nonce: bytes, since_block: int) -> Fate:
        found = self.used.get((payer, nonce))
        return Fate("unused", self.now) if found is None else Fate(found.state, self.now, found.transaction)

    def settle(self, payer: Account, payee: Account, units: int, valid_before: int, nonce: bytes) -> str | None:
        """What `transferWithAuthorization` does with a right signature: the transaction, or None when it reverts."""
        if (payer, nonce) in self.used or self.now >= valid_before or self.balances.get(payer, 0) < units:
            return None
        self.blocks += 1
        transaction = "0x" + self.blocks.to_bytes(32, "big").hex()
        self.used[payer, nonce] = Fate("paid", self.now, transaction)
        self.balances[payer] -= units
        self.balances[payee] = self.balances.get(payee, 0) + units
        self.payments.append((payer, payee, units))
        return transaction
