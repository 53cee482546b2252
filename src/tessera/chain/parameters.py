"""Reading JSON-RPC parameters: each function returns a value of the right type, or faults with what was wrong."""

from __future__ import annotations

import re
from typing import Any

from tessera.chain.engine import GAS_LIMIT, MAX_TRANSACTION, Message
from tessera.chain.jsonrpc import INVALID_PARAMS, RpcFault
from tessera.core.errors import Invalid
from tessera.core.ids import parse_account

__all__ = ["address", "block_number", "boolean", "data", "hash32", "log_query", "message", "quantity", "simulation"]

MAX_SIMULATED = 256  # calls; they share one block's gas
MAX_ALTERNATIVES = 1_000  # addresses or topics in one query
_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,64}")
_TAGS = frozenset({"latest", "pending", "safe", "finalized"})  # a block is final at once
_CALL_FIELDS = frozenset(
    {
        "from", "to", "data", "input", "value", "gas", "gasPrice", "maxFeePerGas", "maxPriorityFeePerGas", "nonce",
        "type", "chainId", "accessList",
    }
)  # fmt: skip


def quantity(value: Any, what: str, most: int = 2**256 - 1) -> int:
    """0x-hex, or an int for callers who cannot help it."""
    if type(value) is int:
        number = value
    elif isinstance(value, str) and _QUANTITY.fullmatch(value):
        number = int(value, 16)
    else:
        raise _wrong(what, "0x and up to 64 hex digits", value)
    if not 0 <= number <= most:
        raise _wrong(what, f"a number up to {most}", value)
    return number


def data(value: Any, what: str, limit: int = MAX_TRANSACTION) -> bytes:
    """0x-hex of any even length."""
    if not isinstance(value, str) or not value.startswith("0x") or len(value) > 2 + 2 * limit:
        raise _wrong(what, f"0x and hex of up to {limit} bytes", value)
    try:
        return bytes.fromhex(value[2:])
    except ValueError as error:
        raise _wrong(what, "an even number of hex digits", value) from error


def hash32(value: Any, what: str) -> bytes:
    found = data(value, what, 32)
    if len(found) != 32:
        raise _wrong(what, "0x and 64 hex digits", value)
    return found


def address(value: Any, what: str = "address") -> bytes:
    try:
        return bytes.fromhex(parse_account(value)[2:])
    except Invalid as error:
        raise _wrong(what, "an address", value) from error


def boolean(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(what, "true or false", value)
    return value


def block_number(value: Any) -> int | None:
    """None for the newest block; EIP-1898's `{"blockNumber": ...}` counts too."""
    if isinstance(value, dict) and set(value) == {"blockNumber"}:
        value = value["blockNumber"]
    if value is None or (isinstance(value, str) and value in _TAGS):
        return None
    return 0 if value == "earliest" else quantity(value, "block", 2**63 - 1)


def message(value: Any) -> Message:
    """The object of eth_call and eth_estimateGas. Fees and nonce are checked for form and not used: calls are free."""
    if not isinstance(value, dict) or not set(value) <= _CALL_FIELDS:
        raise _wrong("call", f"an object with {', '.join(sorted(_CALL_FIELDS))}", value)
    if value.get("data") is not None and value.get("input") not in (None, value["data"]):
        raise _wrong("call", "data and input to be the same", value)
    body = value.get("data") or value.get("input") or "0x"
    gas = value.get("gas")
    return Message(
        sender=bytes(20) if value.get("from") is None else address(value["from"], "from"),
        to=None if value.get("to") is None else address(value["to"], "to"),
        data=data(body, "data"),
        value=quantity(value.get("value") or 0, "value"),
        gas=GAS_LIMIT if gas is None else min(quantity(gas, "gas"), GAS_LIMIT),
    )


def simulation(value: Any) -> list[Message]:
    """The object of eth_simulateV1: one block of calls, without overrides."""
    blocks = value.get("blockStateCalls") if isinstance(value, dict) else None
    if not isinstance(blocks, list) or len(blocks) != 1 or not isinstance(blocks[0], dict):
        raise _wrong("simulation", "blockStateCalls with one block", value)
    if not set(value) <= {"blockStateCalls", "traceTransfers", "validation"} or value.get("validation"):
        raise _wrong("simulation", "blockStateCalls, and no validation", value)
    calls = blocks[0].get("calls")
    if set(blocks[0]) != {"calls"} or not isinstance(calls, list) or not 0 < len(calls) <= MAX_SIMULATED:
        raise _wrong("simulation", f"a block with 1 to {MAX_SIMULATED} calls and nothing else", blocks[0])
    return [message(call) for call in calls]


def log_query(value: Any) -> tuple[Any, Any, frozenset[bytes] | None, list[frozenset[bytes] | None]]:
    """First and last block as they came, addresses, topics."""
    if not isinstance(value, dict) or not set(value) <= {"fromBlock", "toBlock", "address", "topics", "blockHash"}:
        raise _wrong("filter", "an object with fromBlock, toBlock, address, topics, blockHash", value)
    wanted = value.get("topics") or []
    if not isinstance(wanted, list) or len(wanted) > 4:
        raise _wrong("topics", "a list of up to four", wanted)
    found = value.get("address")
    addresses = None if found is None else frozenset(address(item) for item in _alternatives(found, "address"))
    topics = [
        None if item is None or item == [] else frozenset(hash32(one, "topic") for one in _alternatives(item, "topic"))
        for item in wanted
    ]
    return value.get("fromBlock", "latest"), value.get("toBlock", "latest"), addresses, topics


def _alternatives(value: Any, what: str) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_ALTERNATIVES:
        raise _wrong(what, f"up to {MAX_ALTERNATIVES} alternatives", f"{len(items)} of them")
    return items


def _wrong(what: str, expected: str, value: Any) -> RpcFault:
    return RpcFault(INVALID_PARAMS, f"{what}: expected {expected}, not {str(value)[:80]!r}")
