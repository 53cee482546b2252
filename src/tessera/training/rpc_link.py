"""The run's chain over the peer link: a worker needs no other address than its ticket's.

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
REPLY_LIMIT = 16 << 20  # bytes of a reply: logs can be long
OPEN_METHODS = frozenset(
    {
        "eth_blockNumber", "eth_call", "eth_chainId", "eth_estimateGas", "eth_feeHistory", "eth_gasPrice",
        "eth_getBalance", "eth_getBlockByHash", "eth_getBlockByNumber", "eth_getCode", "eth_getLogs",
        "eth_getStorageAt", "eth_getTransactionByHash", "eth_getTransactionCount", "eth_getTransactionReceipt",
        "eth_maxPriorityFeePerGas", "eth_sendRawTransaction", "eth_syncing", "net_version", "web3_clientVersion",
    }
)  # fmt: skip


def serve_rpc(transport: Transport, exchange: Callable[[bytes], Awaitable[bytes]]) -> None:
    """Answer peers' JSON-RPC with `exchange`, the chain's own text in, text out."""

    async def handle(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        _check_methods(body)
        return {}, await exchange(body)

    serve_calls(transport, RPC, handle, request_limit=RPC_LIMIT)


def peer_rpc(transport: Transport, host: Callable[[], PeerRecord], *, timeout_s: float = 30.0) -> BytesRpc:
    """JSON-RPC through whoever `host` names at the time of the call."""

    async def exchange(body: bytes) -> bytes:
        _, reply = await call(transport, host(), RPC, {}, body, timeout_s=timeout_s, reply_limit=REPLY_LIMIT)
        return reply

    return BytesRpc(exchange)


def _check_methods(body: bytes) -> None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not JSON-RPC: {error}") from error
    for item in value if isinstance(value, list) else [value]:
        method = item.get("method") if isinstance(item, dict) else None
        if method not in OPEN_METHODS:
            raise Refused(f"peers may not call {str(method)[:60]!r}", rule="rpc_open_methods")
