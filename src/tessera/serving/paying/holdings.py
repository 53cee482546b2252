"""What an account owns of a model, read from the chain: the right to tokens that goes with it.

An owner's holding in a window of time (a day, by default) is the least of what it held in the last block before the
window began and what it holds now, looked up again every `cache_s`. So each share counts for one account in a window,
whoever it is handed to, and who sells loses the right within that time; who buys has it from the next window on.

Balances of past blocks are summed from the share contract's events, which every node keeps, and not read from past
state, which most nodes forget within minutes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eth_abi.abi import encode as abi_encode

from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Unavailable
from tessera.core.hashing import keccak
from tessera.core.ids import Account

__all__ = ["Holding", "Holdings", "HoldingsConfig"]

TRANSFER = keccak(b"Transfer(address,address,uint256)")
POSTED = keccak(b"Posted(uint256,bytes32,uint256)")
REMEMBERED = 10_000  # accounts


class HoldingsChain(Protocol):
    """What holdings ask of a chain; `tessera.chain.RpcChain` is one."""

    async def call(self, to: Account, data: bytes) -> bytes: ...
    async def header(self, number: int | None = None) -> Any: ...
    async def logs(
        self, address: Account, topics: Sequence[bytes | None], from_block: int, to_block: int | None = None
    ) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class HoldingsConfig:
    """Times in seconds."""

    share: Account  # the model's share contract
    since_block: int = 0  # that it was created in, or one before
    window_s: int = 86_400
    cache_s: float = 60.0  # who sells keeps its right at most so long

    def __post_init__(self) -> None:
        if self.window_s <= 0 or self.cache_s < 0:
            raise Invalid(
                f"a window of {self.window_s} s and a cache of {self.cache_s} s: expected above 0, and from 0"
            )


@dataclass(frozen=True, slots=True)
class Holding:
    """What an account may count on in a window. Shares in their smallest unit."""

    shares: int
    supply: int  # of all shares, when the window began
    window: int  # its number: it begins at `window · window_s`


class Holdings:
    """Reads holdings, and remembers them for as long as they may be believed."""

    def __init__(self, config: HoldingsConfig, chain: HoldingsChain, clock: Clock) -> None:
        self._config, self._chain, self._clock = config, chain, clock
        self._start: tuple[int, int, int] | None = None  # the window, its block and the supply then
        self._then: OrderedDict[Account, tuple[int, int]] = OrderedDict()  # the window, and what was held
        self._now: OrderedDict[Account, tuple[float, int]] = OrderedDict()  # when it was asked, and what is held

    async def of(self, account: Account) -> Holding:
        """Raises: Unavailable or Late when the chain cannot be asked.

        Cost: nothing while it is remembered; else one call, and in a new window two queries of events.
        """
        window, block, supply = await self._window()
        known = self._then.get(account)
        then = known[1] if known is not None and known[0] == window else await self._held_at(account, block)
        _remember(self._then, account, (window, then))
        return Holding(min(then, await self._held_now(account)), supply, window)

    def ends(self, holding: Holding) -> float:
        """When its window is over, in seconds since 1970."""
        return float((holding.window + 1) * self._config.window_s)

    async def _window(self) -> tuple[int, int, int]:
        window = int(self._clock.time() // self._config.window_s)
        if self._start is None or self._start[0] != window:
            block = await self._block_before(window * self._config.window_s)
            posted = await self._events([POSTED], block)
            supply = sum(int.from_bytes(log.data[-32:], "big") for log in posted)
            self._start = (window, block, supply)
        return self._start

    async def _block_before(self, time: int) -> int:
        """The last block that is not younger than `time`; the first of all when there is none.

        Cost: one request for each halving of the chain.
        """
        head = await self._header(None)
        low, high = 0, head.number
        while low < high:
            middle = (low + high + 1) // 2
            if (await self._header(middle)).timestamp <= time:
                low = middle
            else:
                high = middle - 1
        return low

    async def _header(self, number: int | None) -> Any:
        header = await self._chain.header(number)
        if header is None:
            raise Unavailable(f"the chain's node does not tell of block {number}")
        return header

    async def _held_at(self, account: Account, block: int) -> int:
        """What arrived until that block, less what left."""
        word = bytes.fromhex(account[2:]).rjust(32, b"\0")
        arrived = await self._events([TRANSFER, None, word], block)
        left = await self._events([TRANSFER, word], block)
        return sum(_value(log) for log in arrived) - sum(_value(log) for log in left)

    async def _held_now(self, account: Account) -> int:
        now = self._clock.time()
        known = self._now.get(account)
        if known is not None and now - known[0] < self._config.cache_s:
            return known[1]
        asked = keccak(b"balanceOf(address)")[:4] + abi_encode(["address"], [account])
        held = int.from_bytes((await self._chain.call(self._config.share, asked))[:32], "big")
        _remember(self._now, account, (now, held))
        return held

    async def _events(self, topics: Sequence[bytes | None], block: int) -> Sequence[Any]:
        return await self._chain.logs(self._config.share, topics, self._config.since_block, block)


def _value(log: Any) -> int:
    return int.from_bytes(log.data[:32], "big")


def _remember(memory: OrderedDict[Account, Any], account: Account, value: Any) -> None:
    memory[account] = value
    memory.move_to_end(account)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
