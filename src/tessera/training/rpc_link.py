"""The run's chain over the peer link: a worker needs no other address than its invitation's.

The host forwards JSON-RPC text to its chain, and only methods that a stranger may use: reading, and sending what the
caller signed himself. Unlocked accounts and a node's own switches stay out of reach.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from tessera.chain.rpc import BytesRpc
from tessera.core.errors import Invalid, Refused
from tessera.core.ids import PeerId
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.protocols import RPC

__all__ = ["OPEN_METHODS", "peer_rpc", "serve_rpc"]

RPC_LIMIT = 1 << 20  # bytes of a request
MAX_BATCH = 100  # calls in one request
MAX_STREAMS = 16  # requests of one peer at once
REPLY_LIMIT = 16 << 20  # bytes of a reply: logs can be long
OPEN_METHODS = frozenset(
    {
        "eth_blockNumber", "eth_call", "eth_chainId", "eth_estimateGas", "eth_feeHistory", "eth_gasPrice",
        "eth_getBalance", "eth_getBlockByHash", "eth_getBlockByNumber", "eth_getCode", "eth_getLogs",
        "eth_getStorageAt", "eth_getTransactionByHash", "eth_getTransactionCount", "eth_getTransactionReceipt",
        "eth_maxPriorityFeePerGas", "eth_sendRawTransaction", "eth_syncing", "net_version",
        "tessera_genesis", "tessera_head", "tessera_journal", "tessera_stateRoot", "web3_clientVersion",
    }
)  # fmt: skip


def serve_rpc(transport: Transport, exchange: Callable[[bytes], Awaitable[bytes]]) -> None:
    """Answer peers' JSON-RPC with `exchange`, the chain's own text in, text out."""

    async def handle(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        return {}, await exchange(_checked(body))

    serve_calls(transport, RPC, handle, request_limit=RPC_LIMIT, max_streams=MAX_STREAMS)


def peer_rpc(transport: Transport, host: Callable[[], PeerRecord], *, timeout_s: float = 30.0) -> BytesRpc:
    """JSON-RPC through whoever `host` names at the time of the call."""

    async def exchange(body: bytes) -> bytes:
        _, reply = await call(transport, host(), RPC, {}, body, timeout_s=timeout_s, reply_limit=REPLY_LIMIT)
        return reply

    return BytesRpc(exchange)


def _checked(body: bytes) -> bytes:
    """The same calls, written anew: what we have checked and what the node reads must be one thing, whatever a text
    with duplicate keys or another encoding means to its parser."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not JSON-RPC: {error}") from error
    calls = value if isinstance(value, list) else [value]
    if not 1 <= len(calls) <= MAX_BATCH:
        raise Invalid(f"a batch has 1 to {MAX_BATCH} calls, this one {len(calls)}")
    for item in calls:
        method = item.get("method") if isinstance(item, dict) else None
        if not isinstance(method, str) or method not in OPEN_METHODS:
            raise Refused(f"peers may not call {str(method)[:60]!r}", rule="rpc_open_methods")
    return json.dumps(value).encode()
