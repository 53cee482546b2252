"""Any EVM network through JSON-RPC: calls, signed transactions, receipts and logs.

Invariants: one `send` makes at most one transaction, whatever answer gets lost on the way; sends of one account through
one client go out in order, each with its own nonce; a receipt that says "reverted" is raised as an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import anyio
import structlog

from tessera.chain import artifact
from tessera.chain.rpc import Rpc
from tessera.chain.transactions import Transaction, sign
from tessera.chain.types import Header, Log, Receipt, Topic
from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

__all__ = ["RpcChain"]

log = structlog.get_logger()

GAS_MARGIN = 1.25  # on top of the estimate: state may move between estimate and block
NONCE_TRIES = 5  # another process may use the same account
FIRST_POLL_S, LONGEST_POLL_S = 0.02, 1.0


class RpcChain:
    """A `Chain` behind an `Rpc`.

    Args:
        receipt_timeout_s: how long `send` waits for its transaction to be in a block.
    """

    def __init__(self, rpc: Rpc, *, receipt_timeout_s: float = 120.0) -> None:
        self.rpc = rpc
        self._receipt_timeout_s = receipt_timeout_s
        self._chain_id: int | None = None
        # One send at a time for each account, from reading the nonce until the node has the transaction. This lock is
        # held over the network on purpose: order is what it is for, and each request inside has its own deadline.
        self._turns: defaultdict[Account, anyio.Lock] = defaultdict(anyio.Lock)

    async def request(self, method: str, params: list[Any]) -> Any:
        """Any JSON-RPC method, as it is: for a development network's own."""
        return await self.rpc.request(method, params)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def chain_id(self) -> int:
        """Asked once: a network does not change its id."""
        if self._chain_id is None:
            self._chain_id = await self._int("eth_chainId", [])
        return self._chain_id

    async def block_number(self) -> int:
        return await self._int("eth_blockNumber", [])

    async def gas_price(self) -> int:
        """Wei per gas; 0 where transactions are free."""
        return await self._int("eth_gasPrice", [])

    async def balance(self, account: Account) -> int:
        """Wei, the network's own coin."""
        return await self._int("eth_getBalance", [account, "latest"])

    async def code(self, account: Account) -> bytes:
        """Empty for an account that is no contract."""
        return await self._bytes("eth_getCode", [account, "latest"])

    async def call(self, to: Account, data: bytes, *, block: int | None = None, sender: Account | None = None) -> bytes:
        """What `to` answers to `data`, without a transaction. Raises the mapped error when it reverts.

        Args:
            block: answer from the state after this block, so that several calls fit together; nodes keep about the
                last hundred. None means the latest.
            sender: who asks, for contracts that care.
        """
        at = "latest" if block is None else hex(block)
        asking = {} if sender is None else {"from": sender}
        return await self._bytes("eth_call", [{"to": to, "data": _hex(data), **asking}, at])

    async def logs(
        self, address: Account | None, topics: Sequence[Topic], from_block: int, to_block: int | None = None
    ) -> list[Log]:
        """Events in order of emission, of one contract or of all.

        Args:
            topics: by position; None matches anything, a list any of its members.
            to_block: inclusive; None means the latest.

        Cost: one request, or more where the node limits how much it tells at once (the range is then halved).
        """
        last = await self.block_number() if to_block is None else to_block
        if last < from_block:
            return []
        try:
            return await self._logs(address, topics, {"fromBlock": hex(from_block), "toBlock": hex(last)})
        except Refused as error:
            if error.rule != "rpc_limit" or from_block == last:
                raise
            middle = (from_block + last) // 2
            first_half = await self.logs(address, topics, from_block, middle)
            return first_half + await self.logs(address, topics, middle + 1, last)

    async def block_logs(self, address: Account | None, topics: Sequence[Topic], block_hash: str) -> list[Log]:
        """Events of the one block with this hash (EIP-234), whichever history the node follows meanwhile."""
        return await self._logs(address, topics, {"blockHash": block_hash})

    async def header(self, number: int | None = None) -> Header | None:
        """A block's header; None where the node has no such block. Without `number`, the newest."""
        at = "latest" if number is None else hex(number)
        value = await self.rpc.request("eth_getBlockByNumber", [at, False])
        header = None if value is None else Header.from_rpc(value)
        if header is not None and number not in (None, header.number):
            raise Misbehaviour(f"asked for block {number}, the node sent {header.number}", evidence=header.number)
        return header

    async def receipt(self, tx_hash: str) -> Receipt | None:
        """None while no block has the transaction."""
        value = await self.rpc.request("eth_getTransactionReceipt", [tx_hash])
        return None if value is None else Receipt.from_rpc(value)

    # --- writing ----------------------------------------------------------------------------------------------------

    async def send(self, key: AccountKey, to: Account | None, data: bytes, *, value: int = 0) -> Receipt:
        """Sign, send, and wait until a block has it.

        Args:
            to: None creates a contract from `data`.
            value: wei.

        Raises: the mapped error when the contract reverts; `Refused` (rule "insufficient_funds") when the account
            cannot pay for gas; `Conflict` when other processes keep taking its nonces; `Late` when no block has it
            in time, with `tx_hash` in the fields: it may still come.
        """
        async with self._turns[key.account]:
            tx_hash = await self._send_once(key, to, data, value)
        receipt = await self._wait(tx_hash)
        if not receipt.ok:
            raise await self._why_reverted(receipt, to, data, value)
        return receipt

    async def deploy(self, key: AccountKey, artifact_name: str, *args: Any) -> Account:
        """Create one of the package's own contracts; `args` are its constructor's."""
        receipt = await self.send(key, None, artifact.load(artifact_name).init_code(*args))
        if receipt.contract is None:
            raise Invalid(f"the node's receipt for creating {artifact_name} names no contract")
        return receipt.contract

    async def fund(self, key: AccountKey, to: Account, wei: int) -> Receipt:
        """Send the network's own coin, with which gas is paid."""
        return await self.send(key, to, b"", value=wei)

    async def _send_once(self, key: AccountKey, to: Account | None, data: bytes, value: int) -> str:
        gas = await self._estimate(key.account, to, data, value)
        max_fee, priority_fee = await self._fees()
        chain_id = await self.chain_id()
        for _ in range(NONCE_TRIES):
            nonce = await self._int("eth_getTransactionCount", [key.account, "pending"])
            raw, tx_hash = sign(key, Transaction(chain_id, nonce, to, value, data, gas, max_fee, priority_fee))
            if await self._broadcast(raw, tx_hash):
                return tx_hash
        raise Conflict(f"another process keeps sending from {key.account}: {NONCE_TRIES} nonces were taken")

    async def _broadcast(self, raw: bytes, tx_hash: str) -> bool:
        """Hand it to the node. False when its nonce is taken by another transaction, so that it can never count."""
        try:
            await self.rpc.request("eth_sendRawTransaction", [_hex(raw)])
        except Conflict:
            return await self._known(tx_hash)
        except (Unavailable, Late):
            # The answer is lost, the transaction may not be: the same bytes can only ever count once.
            try:
                await self.rpc.request("eth_sendRawTransaction", [_hex(raw)])
            except Conflict:
                return await self._known(tx_hash)
        return True

    async def _known(self, tx_hash: str) -> bool:
        return await self.rpc.request("eth_getTransactionByHash", [tx_hash]) is not None

    async def _wait(self, tx_hash: str) -> Receipt:
        pause_s = FIRST_POLL_S
        with anyio.move_on_after(self._receipt_timeout_s):
            while True:
                try:
                    if (receipt := await self.receipt(tx_hash)) is not None:
                        return receipt
                except (Unavailable, Late) as error:  # the node blinks: the transaction does not go away
                    log.info("receipt_not_read", tx_hash=tx_hash, code=error.code)
                await anyio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_POLL_S)
        raise Late(f"no block has {tx_hash} after {self._receipt_timeout_s:g} s; it may still come", tx_hash=tx_hash)

    async def _why_reverted(self, receipt: Receipt, to: Account | None, data: bytes, value: int) -> TesseraError:
        """Run it again on the state before its block, to hear the reason."""
        call = _call_object(receipt.sender, to, data, value)
        try:
            await self.rpc.request("eth_call", [call, hex(receipt.block_number - 1)])
        except TesseraError as error:
            error.fields["tx_hash"] = receipt.tx_hash
            return error
        return Conflict(f"{receipt.tx_hash} reverted, and would not now: someone was first", tx_hash=receipt.tx_hash)

    async def _estimate(self, sender: Account, to: Account | None, data: bytes, value: int) -> int:
        return int(await self._int("eth_estimateGas", [_call_object(sender, to, data, value)]) * GAS_MARGIN)

    async def _fees(self) -> tuple[int, int]:
        """Wei per gas: the most we pay, and the tip. Twice the present base fee lasts for six full blocks."""
        price = await self.gas_price()
        if price == 0:
            return 0, 0
        priority_fee = await self._int("eth_maxPriorityFeePerGas", [])
        head = await self.rpc.request("eth_getBlockByNumber", ["latest", False])
        if not isinstance(head, dict) or not isinstance(head.get("baseFeePerGas"), str):
            raise Invalid("the network has no EIP-1559 fees, which we need")
        return 2 * int(head["baseFeePerGas"], 16) + priority_fee, priority_fee

    # --- helpers ----------------------------------------------------------------------------------------------------

    async def _logs(self, address: Account | None, topics: Sequence[Topic], where: dict[str, Any]) -> list[Log]:
        query = {**where, "topics": [_topic(topic) for topic in topics]}
        if address is not None:
            query["address"] = address
        found = await self.rpc.request("eth_getLogs", [query])
        if not isinstance(found, list):
            raise Invalid(f"eth_getLogs answered with a {type(found).__name__}, expected a list")
        return [Log.from_rpc(item) for item in found]

    async def _int(self, method: str, params: list[Any]) -> int:
        value = await self.rpc.request(method, params)
        try:
            return int(value, 16)
        except (TypeError, ValueError) as error:
            raise Invalid(f"{method} answered {str(value)[:80]!r}, expected 0x-hex") from error

    async def _bytes(self, method: str, params: list[Any]) -> bytes:
        value = await self.rpc.request(method, params)
        try:
            return bytes.fromhex(value.removeprefix("0x"))
        except (AttributeError, ValueError) as error:
            raise Invalid(f"{method} answered {str(value)[:80]!r}, expected 0x-hex") from error


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


def _topic(topic: Topic) -> Any:
    if topic is None or isinstance(topic, bytes):
        return None if topic is None else _hex(topic)
    return [_hex(item) for item in topic]


def _call_object(sender: Account, to: Account | None, data: bytes, value: int) -> dict[str, str]:
    call = {"from": sender, "data": _hex(data), "value": hex(value)}
    return call if to is None else {**call, "to": to}
