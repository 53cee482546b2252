"""The JSON-RPC methods of a LocalChain: what wallets and web3.py ask of a node, and no more.

One function a method; its signature is the method's. There are no unlocked accounts: whoever sends, signs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tessera import __version__
from tessera.chain import parameters as read
from tessera.chain.engine import GAS_LIMIT, Outcome
from tessera.chain.filters import Filter, Filters
from tessera.chain.forms import block_form, data, log_form, receipt_form, simulated_form, transaction_form
from tessera.chain.jsonrpc import INVALID_PARAMS, METHOD_NOT_FOUND, REVERTED, SERVER_ERROR, RpcFault, fault_of
from tessera.chain.reverts import revert_reason
from tessera.core.errors import TesseraError

if TYPE_CHECKING:
    from tessera.chain.blocks import Block
    from tessera.chain.engine import State
    from tessera.chain.local import LocalChain

__all__ = ["Methods"]

MAX_LOGS = 20_000  # in one answer, 14 MB of JSON: whoever wants more asks for fewer blocks
MAX_ENTRIES = 1_000  # of the journal in one answer
MAX_ENTRIES_BYTES = 150_000  # of transactions in them, 600 kB of JSON at most: peers take 1 MB
MAX_FEE_HISTORY = 1_024


class Methods:
    """`call("eth_chainId", [])`. Raises `RpcFault` and nothing else that a caller could cause."""

    def __init__(self, chain: LocalChain) -> None:
        self._chain = chain
        self._filters = Filters()
        self._table: dict[str, tuple[Callable[..., Any], inspect.Signature]] = {}
        groups = (_READING, _SENDING, _FILTERS, _JOURNAL, *((_DEVELOPMENT,) if chain.dev else ()))
        for name in (name for group in groups for name in group):
            function = getattr(self, f"_{name}")
            self._table[name] = (function, inspect.signature(function))

    def call(self, method: str, params: list[Any]) -> Any:
        function, signature = self._table.get(method, (None, None))
        if function is None or signature is None:
            raise RpcFault(METHOD_NOT_FOUND, f"there is no method {method[:60]!r} here")
        try:
            signature.bind(*params)
        except TypeError as error:
            raise RpcFault(INVALID_PARAMS, f"{method}{signature}: {error}") from error
        try:
            return function(*params)
        except TesseraError as error:
            raise fault_of(error) from error

    # --- reading ----------------------------------------------------------------------------------------------------

    def _web3_clientVersion(self) -> str:
        return f"tessera/{__version__}"

    def _net_version(self) -> str:
        return str(self._chain.chain_id)

    def _net_listening(self) -> bool:
        return True

    def _net_peerCount(self) -> str:
        return "0x0"

    def _eth_chainId(self) -> str:
        return hex(self._chain.chain_id)

    def _eth_syncing(self) -> bool:
        return False

    def _eth_accounts(self) -> list[str]:
        return []

    def _eth_blockNumber(self) -> str:
        return hex(self._chain.head.number)

    def _eth_gasPrice(self) -> str:
        return "0x0"

    def _eth_maxPriorityFeePerGas(self) -> str:
        return "0x0"

    def _eth_feeHistory(self, count: Any, newest: Any, percentiles: Any = None) -> dict[str, Any]:
        last = self._block(newest).number
        wanted = min(read.quantity(count, "blockCount"), MAX_FEE_HISTORY, last + 1)
        if not isinstance(percentiles or [], list) or len(percentiles or []) > 100:
            raise RpcFault(INVALID_PARAMS, "rewardPercentiles: expected a list of up to 100 numbers")
        blocks = [self._block(hex(number)) for number in range(last - wanted + 1, last + 1)]
        history = {
            "oldestBlock": hex(last - wanted + 1),
            "baseFeePerGas": ["0x0"] * (wanted + 1),
            "gasUsedRatio": [block.gas_used / GAS_LIMIT for block in blocks],
        }
        return {**history, "reward": [["0x0"] * len(percentiles)] * wanted} if percentiles else history

    def _eth_getBalance(self, account: Any, block: Any = None) -> str:
        return hex(self._state(block).balance(read.address(account)))

    def _eth_getTransactionCount(self, account: Any, block: Any = None) -> str:
        return hex(self._state(block).nonce(read.address(account)))

    def _eth_getCode(self, account: Any, block: Any = None) -> str:
        return data(self._state(block).code(read.address(account)))

    def _eth_getStorageAt(self, account: Any, slot: Any, block: Any = None) -> str:
        value = self._state(block).storage(read.address(account), read.quantity(slot, "slot"))
        return data(value.to_bytes(32, "big"))

    def _eth_call(self, call: Any, block: Any = None, overrides: Any = None) -> str:
        if overrides:
            raise RpcFault(INVALID_PARAMS, "state overrides are not supported")
        outcome = self._chain.call(read.message(call), self._height(block))
        if not outcome.ok:
            raise _failed(outcome)
        return data(outcome.output)

    def _eth_estimateGas(self, call: Any, block: Any = None) -> str:
        gas, outcome = self._chain.estimate(read.message(call), self._height(block))
        if not outcome.ok:
            raise _failed(outcome)
        return hex(gas)

    def _eth_simulateV1(self, wanted: Any, block: Any = None) -> list[dict[str, Any]]:
        """One block of calls, each upon what the ones before it did."""
        calls = read.simulation(wanted)
        outcomes = self._chain.simulate(calls, self._height(block))
        return [{"number": hex(self._chain.head.number + 1), "calls": [simulated_form(one) for one in outcomes]}]

    def _eth_getBlockByNumber(self, block: Any, full: Any = False) -> dict[str, Any] | None:
        number = read.block_number(block)
        found = self._chain.head if number is None else self._chain.block(number)
        return block_form(found, read.boolean(full, "full")) if found else None

    def _eth_getBlockByHash(self, block_hash: Any, full: Any = False) -> dict[str, Any] | None:
        found = self._chain.block_by_hash(read.hash32(block_hash, "hash"))
        return block_form(found, read.boolean(full, "full")) if found else None

    def _eth_getBlockTransactionCountByNumber(self, block: Any) -> str | None:
        return _count(self._chain.block(self._number(block)))

    def _eth_getBlockTransactionCountByHash(self, block_hash: Any) -> str | None:
        return _count(self._chain.block_by_hash(read.hash32(block_hash, "hash")))

    def _eth_getTransactionByBlockNumberAndIndex(self, block: Any, index: Any) -> dict[str, Any] | None:
        return _transaction_at(self._chain.block(self._number(block)), index)

    def _eth_getTransactionByBlockHashAndIndex(self, block_hash: Any, index: Any) -> dict[str, Any] | None:
        return _transaction_at(self._chain.block_by_hash(read.hash32(block_hash, "hash")), index)

    def _eth_getUncleCountByBlockNumber(self, block: Any) -> str | None:
        return "0x0" if self._chain.block(self._number(block)) else None

    def _eth_getUncleCountByBlockHash(self, block_hash: Any) -> str | None:
        return "0x0" if self._chain.block_by_hash(read.hash32(block_hash, "hash")) else None

    def _eth_getTransactionByHash(self, tx_hash: Any) -> dict[str, Any] | None:
        block = self._chain.block_of(read.hash32(tx_hash, "hash"))
        return transaction_form(block) if block else None

    def _eth_getTransactionReceipt(self, tx_hash: Any) -> dict[str, Any] | None:
        block = self._chain.block_of(read.hash32(tx_hash, "hash"))
        return receipt_form(block) if block else None

    def _eth_getBlockReceipts(self, block: Any) -> list[dict[str, Any]]:
        found = self._block(block)
        return [receipt_form(found)] if found.raw else []

    def _eth_getLogs(self, query: Any) -> list[dict[str, Any]]:
        first, last, _, _ = read.log_query(query)
        if "blockHash" in query:
            block = self._chain.block_by_hash(read.hash32(query["blockHash"], "blockHash"))
            if block is None or "fromBlock" in query or "toBlock" in query:
                raise RpcFault(INVALID_PARAMS, "blockHash: expected a known block's, and no fromBlock or toBlock")
            return self._logs(query, block.number, block.number)
        return self._logs(query, self._number(first), self._number(last))

    # --- sending ----------------------------------------------------------------------------------------------------

    def _eth_sendRawTransaction(self, raw: Any) -> str:
        return data(self._chain.submit(read.data(raw, "transaction")).hash)

    # --- filters ----------------------------------------------------------------------------------------------------

    def _eth_newFilter(self, query: Any) -> str:
        first, _, _, _ = read.log_query(query)
        number = read.block_number(first)
        return hex(self._filters.add(query, self._chain.head.number + 1 if number is None else number))

    def _eth_newBlockFilter(self) -> str:
        return hex(self._filters.add(None, self._chain.head.number + 1))

    def _eth_newPendingTransactionFilter(self) -> str:
        raise RpcFault(SERVER_ERROR, "no transaction is ever pending here: each gets its block at once")

    def _eth_getFilterChanges(self, name: Any) -> list[Any]:
        found = self._filters.advance(read.quantity(name, "filter"), self._chain.head.number)
        if found is None:
            raise RpcFault(SERVER_ERROR, "filter not found")
        filter_, first, last = found
        if filter_.query is None:
            return [data(self._block(hex(number)).hash) for number in range(first, last + 1)]
        return self._logs(filter_.query, first, last)

    def _eth_getFilterLogs(self, name: Any) -> list[dict[str, Any]]:
        found: Filter | None = self._filters.get(read.quantity(name, "filter"))
        if found is None or found.query is None:
            raise RpcFault(SERVER_ERROR, "filter not found")
        return self._eth_getLogs(found.query)

    def _eth_uninstallFilter(self, name: Any) -> bool:
        return self._filters.remove(read.quantity(name, "filter"))

    # --- the operator's journal -------------------------------------------------------------------------------------

    def _tessera_journal(self, first: Any = 0, count: Any = MAX_ENTRIES) -> list[dict[str, Any]]:
        """Entries from block `first` on, for members who replay them; fewer than `count` where they are long."""
        limit = min(read.quantity(count, "count"), MAX_ENTRIES)
        page: list[dict[str, Any]] = []
        size = 0
        for entry in self._chain.entries(read.quantity(first, "first", 2**62), limit):
            size += len(entry.raw or b"")
            if page and size > MAX_ENTRIES_BYTES:
                break
            page.append(entry.to_value())
        return page

    def _tessera_genesis(self) -> dict[str, Any]:
        """What block 0 holds; whoever replays the journal needs it."""
        return self._chain.genesis.to_value()

    def _tessera_head(self, block: Any = None) -> dict[str, Any]:
        """The operator's signature over a block's height and hash, for members who compare."""
        return self._chain.signed_head(self._height(block)).to_value()

    def _tessera_stateRoot(self) -> str:
        return data(self._chain.state_root())

    # --- development ------------------------------------------------------------------------------------------------

    def _evm_mine(self, timestamp: Any = None) -> str:
        if timestamp is not None:
            self._evm_setNextBlockTimestamp(timestamp)
        self._chain.mine()
        return "0x0"

    def _evm_setNextBlockTimestamp(self, timestamp: Any) -> str:
        seconds = read.quantity(timestamp, "timestamp")
        self._chain.set_next_timestamp(seconds)
        return hex(seconds)

    def _evm_increaseTime(self, seconds: Any) -> str:
        return hex(self._chain.increase_time(read.quantity(seconds, "seconds")))

    def _evm_snapshot(self) -> str:
        return hex(self._chain.snapshot())

    def _evm_revert(self, snapshot: Any) -> bool:
        return self._chain.revert(read.quantity(snapshot, "snapshot"))

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _state(self, block: Any) -> State:
        return self._chain.state(self._height(block))

    def _height(self, block: Any) -> int | None:
        """None for the newest block. A block may be named by its hash too (EIP-1898)."""
        if isinstance(block, dict) and "blockHash" in block and set(block) <= {"blockHash", "requireCanonical"}:
            found = self._chain.block_by_hash(read.hash32(block["blockHash"], "blockHash"))
            if found is None:
                raise RpcFault(SERVER_ERROR, f"no block {str(block['blockHash'])[:80]}")
            return found.number
        return read.block_number(block)

    def _number(self, block: Any) -> int:
        number = self._height(block)
        return self._chain.head.number if number is None else number

    def _block(self, tag: Any) -> Block:
        found = self._chain.block(self._number(tag))
        if found is None:
            raise RpcFault(SERVER_ERROR, f"no block {str(tag)[:80]}")
        return found

    def _logs(self, query: Any, first: int, last: int) -> list[dict[str, Any]]:
        _, _, addresses, topics = read.log_query(query)
        found = self._chain.logs(first, last, addresses, topics, MAX_LOGS)
        return [log_form(entry.block, entry.position) for entry in found]


def _count(block: Block | None) -> str | None:
    return None if block is None else hex(int(block.raw is not None))


def _transaction_at(block: Block | None, index: Any) -> dict[str, Any] | None:
    """A block holds one transaction at most, at index 0."""
    first = read.quantity(index, "index") == 0
    return transaction_form(block) if first and block and block.raw else None


def _failed(outcome: Outcome) -> RpcFault:
    if not outcome.reverted:
        return RpcFault(SERVER_ERROR, outcome.error)
    reason = f": {revert_reason(outcome.output)}" if outcome.output else ""
    return RpcFault(REVERTED, f"execution reverted{reason}", data(outcome.output))


_READING = (
    "web3_clientVersion", "net_version", "net_listening", "eth_chainId", "eth_syncing", "eth_accounts",
    "eth_blockNumber", "eth_simulateV1", "eth_gasPrice", "eth_maxPriorityFeePerGas", "eth_feeHistory", "eth_getBalance",
    "eth_getTransactionCount", "eth_getCode", "eth_getStorageAt", "eth_call", "eth_estimateGas",
    "eth_getBlockByNumber", "eth_getBlockByHash", "eth_getTransactionByHash", "eth_getTransactionReceipt",
    "eth_getBlockReceipts", "eth_getLogs", "eth_getBlockTransactionCountByNumber", "eth_getBlockTransactionCountByHash",
    "eth_getTransactionByBlockNumberAndIndex", "eth_getTransactionByBlockHashAndIndex", "net_peerCount",
    "eth_getUncleCountByBlockNumber", "eth_getUncleCountByBlockHash",
)  # fmt: skip
_SENDING = ("eth_sendRawTransaction",)
_FILTERS = (
    "eth_newFilter", "eth_newBlockFilter", "eth_newPendingTransactionFilter", "eth_getFilterChanges",
    "eth_getFilterLogs", "eth_uninstallFilter",
)  # fmt: skip
_JOURNAL = ("tessera_journal", "tessera_genesis", "tessera_head", "tessera_stateRoot")
_DEVELOPMENT = ("evm_mine", "evm_increaseTime", "evm_setNextBlockTimestamp", "evm_snapshot", "evm_revert")
