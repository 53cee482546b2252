"""Blocks, transactions, receipts and logs as JSON-RPC shows them."""

from __future__ import annotations

from typing import Any

from tessera.chain.blocks import EMPTY_LIST, EMPTY_REQUESTS, EMPTY_TRIE, EXTRA_DATA, Block
from tessera.chain.engine import GAS_LIMIT, Outcome, SignedTx
from tessera.core.ids import Account, account_from_bytes

__all__ = ["block_form", "data", "log_form", "receipt_form", "simulated_form", "transaction_form"]

ZERO_ACCOUNT = "0x" + "00" * 20


def data(value: bytes) -> str:
    return "0x" + value.hex()


def block_form(block: Block, full: bool) -> dict[str, Any]:
    """`full` tells the whole transaction instead of its hash."""
    transactions: list[Any] = []
    if block.tx_hash is not None:
        transactions = [transaction_form(block) if full else data(block.tx_hash)]
    return {
        "number": hex(block.number),
        "hash": data(block.hash),
        "parentHash": data(block.parent),
        "timestamp": hex(block.timestamp),
        "stateRoot": data(block.state_root),
        "transactionsRoot": data(block.transactions_root),
        "receiptsRoot": data(block.receipts_root),
        "logsBloom": data(block.bloom),
        "gasUsed": hex(block.gas_used),
        "gasLimit": hex(GAS_LIMIT),
        "baseFeePerGas": "0x0",
        "size": hex(block.size),
        "transactions": transactions,
        "extraData": data(EXTRA_DATA),
        "miner": ZERO_ACCOUNT,
        "difficulty": "0x0",
        "nonce": data(bytes(8)),
        "mixHash": data(bytes(32)),
        "sha3Uncles": data(EMPTY_LIST),
        "uncles": [],
        "withdrawals": [],
        "withdrawalsRoot": data(EMPTY_TRIE),
        "blobGasUsed": "0x0",
        "excessBlobGas": "0x0",
        "parentBeaconBlockRoot": data(bytes(32)),
        "requestsHash": data(EMPTY_REQUESTS),
    }


def transaction_form(block: Block) -> dict[str, Any]:
    """Of the block's one transaction."""
    transaction = _included(block)
    form: dict[str, Any] = {
        "hash": data(transaction.hash),
        "type": hex(transaction.kind),
        "chainId": hex(transaction.chain_id),
        "from": _account(transaction.sender),
        "to": _account(transaction.to),
        "nonce": hex(transaction.nonce),
        "value": hex(transaction.value),
        "input": data(transaction.data),
        "gas": hex(transaction.gas),
        "gasPrice": hex(_price(transaction)),
        "v": hex(transaction.y_parity if transaction.kind else 35 + 2 * transaction.chain_id + transaction.y_parity),
        "r": hex(transaction.r),
        "s": hex(transaction.s),
        "blockHash": data(block.hash),
        "blockNumber": hex(block.number),
        "transactionIndex": "0x0",
    }
    if transaction.kind > 0:
        form |= {"yParity": hex(transaction.y_parity), "accessList": _access_list(transaction)}
    if transaction.kind == 2:
        form |= {"maxFeePerGas": hex(transaction.max_fee), "maxPriorityFeePerGas": hex(transaction.priority_fee)}
    return form


def receipt_form(block: Block) -> dict[str, Any]:
    """Of the block's one transaction."""
    transaction = _included(block)
    return {
        "transactionHash": data(transaction.hash),
        "transactionIndex": "0x0",
        "blockHash": data(block.hash),
        "blockNumber": hex(block.number),
        "from": _account(transaction.sender),
        "to": _account(transaction.to),
        "contractAddress": _account(block.contract),
        "status": hex(int(block.ok)),
        "gasUsed": hex(block.gas_used),
        "cumulativeGasUsed": hex(block.gas_used),
        "effectiveGasPrice": hex(_price(transaction)),
        "type": hex(transaction.kind),
        "logs": [log_form(block, index) for index in range(len(block.logs))],
        "logsBloom": data(block.bloom),
    }


def log_form(block: Block, index: int) -> dict[str, Any]:
    address, topics, body = block.logs[index]
    return {
        "address": _account(address),
        "topics": [data(topic) for topic in topics],
        "data": data(body),
        "blockNumber": hex(block.number),
        "blockHash": data(block.hash),
        "blockTimestamp": hex(block.timestamp),
        "transactionHash": data(block.tx_hash or b""),
        "transactionIndex": "0x0",
        "logIndex": hex(index),
        "removed": False,
    }


def simulated_form(outcome: Outcome) -> dict[str, Any]:
    """Of one call of eth_simulateV1."""
    form: dict[str, Any] = {
        "returnData": data(outcome.output),
        "gasUsed": hex(outcome.gas_used),
        "status": hex(int(outcome.ok)),
        "logs": [
            {"address": _account(address), "topics": [data(topic) for topic in topics], "data": data(body)}
            for address, topics, body in outcome.logs
        ],
    }
    if not outcome.ok:
        form["error"] = {"code": 3 if outcome.reverted else -32015, "message": outcome.error}
    return form


def _included(block: Block) -> SignedTx:
    if block.transaction is None:
        raise LookupError(f"block {block.number} holds no transaction")
    return block.transaction


def _price(transaction: SignedTx) -> int:
    """What it paid per gas: the base fee is zero."""
    return min(transaction.max_fee, transaction.priority_fee)


def _access_list(transaction: SignedTx) -> list[dict[str, Any]]:
    return [
        {"address": _account(address), "storageKeys": [data(slot.to_bytes(32, "big")) for slot in slots]}
        for address, slots in transaction.access_list
    ]


def _account(address: bytes | None) -> Account | None:
    return account_from_bytes(address) if address else None
