"""A synchronous JSON-RPC function as an `Rpc`: each call runs in a thread, so that the event loop goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread

from tessera.chain.jsonrpc import RpcFault
from tessera.chain.rpc import rpc_error

__all__ = ["ThreadRpc"]

THREADS = 4  # the chain's writers queue anyway, and readers share Python's one core


class ThreadRpc:
    """Errors come back exactly as they would over a wire."""

    def __init__(self, call: Callable[[str, list[Any]], Any]) -> None:
        self._call = call
        self._limiter = anyio.CapacityLimiter(THREADS)

    async def request(self, method: str, params: list[Any]) -> Any:
        try:
            return await anyio.to_thread.run_sync(self._call, method, params, limiter=self._limiter)
        except RpcFault as fault:
            raise rpc_error(method, fault.to_value()) from fault
