"""JSON-RPC from the asking side: one request, one answer, over HTTP or over any exchange of bytes.

Answers are untrusted: their size is limited, their shape checked, and their errors mapped to the core tree, so that
nobody above this file reads a node's prose. Every request has a deadline.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio
import httpx

from tessera.chain.reverts import revert_error, revert_reason
from tessera.core.errors import Conflict, Invalid, Late, Refused, TesseraError, Unavailable

__all__ = ["BytesRpc", "HttpRpc", "Rpc", "rpc_error"]

REPLY_LIMIT = 32 << 20  # bytes: room for the longest answer that a node gives to eth_getLogs
JSON = {"content-type": "application/json"}
LIMIT_EXCEEDED = -32005  # EIP-1474: ask for less

# A node's prose for "this nonce is taken". There is no code for it.
_NONCE_TAKEN = ("nonce too low", "already known", "already imported", "replacement transaction underpriced")


class Rpc(Protocol):
    """Something that answers JSON-RPC. Raises an error of the core tree; `fields["rpc_code"]` keeps the node's code."""

    async def request(self, method: str, params: list[Any]) -> Any: ...


class HttpRpc:
    """A node behind a URL. Keeps connections open; `aclose` ends them."""

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise Invalid(f"a node's URL starts with http:// or https://, not {url[:80]!r}")
        self.url = url
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(timeout=timeout_s)
        self._bytes = BytesRpc(self._exchange, timeout_s)

    async def request(self, method: str, params: list[Any]) -> Any:
        return await self._bytes.request(method, params)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _exchange(self, body: bytes) -> bytes:
        try:
            async with self._http.stream("POST", self.url, content=body, headers=JSON) as response:
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > REPLY_LIMIT:
                        raise _too_long(self.url)
                if response.status_code == 429 or response.status_code >= 500:
                    raise Unavailable(f"{self.url} answered {response.status_code}")
                return bytes(data)
        except httpx.TimeoutException as error:
            raise Late(f"{self.url} did not answer in {self._timeout_s:g} s") from error
        except (httpx.TransportError, httpx.DecodingError, httpx.InvalidURL) as error:
            raise Unavailable(f"{self.url} cannot be reached: {error!r}") from error


class BytesRpc:
    """JSON-RPC over an exchange of bytes: a peer link, a pipe, a chain in the same process."""

    def __init__(self, exchange: Callable[[bytes], Awaitable[bytes]], timeout_s: float = 60.0) -> None:
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)

    async def request(self, method: str, params: list[Any]) -> Any:
        request_id = next(self._ids)
        try:
            body = json.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}).encode()
        except (TypeError, ValueError) as error:
            raise Invalid(f"the parameters of {method} are not JSON: {error}") from error
        try:
            with anyio.fail_after(self._timeout_s):
                reply = await self._exchange(body)
        except TimeoutError as error:
            raise Late(f"no answer to {method} in {self._timeout_s:g} s") from error
        return _result(method, request_id, reply)


def _result(method: str, request_id: int, reply: bytes) -> Any:
    if len(reply) > REPLY_LIMIT:
        raise _too_long(f"the node, asked for {method},")
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise Unavailable(f"the answer to {method} is no JSON: {reply[:80]!r}") from error
    if not isinstance(value, dict):
        raise Unavailable(f"the answer to {method} is no JSON-RPC: {reply[:80]!r}")
    if value.get("error") is not None:
        raise rpc_error(method, value["error"])
    if value.get("id") != request_id or "result" not in value:
        raise Unavailable(f"the answer to {method} belongs to another request: {reply[:80]!r}")
    return value["result"]


def _too_long(who: str) -> Refused:
    return Refused(f"{who} answered with more than {REPLY_LIMIT} bytes: ask for less", rule="rpc_limit")


def rpc_error(method: str, error: Any) -> TesseraError:
    """The core error for a JSON-RPC error object."""
    if not isinstance(error, dict):
        return Unavailable(f"{method} failed: {str(error)[:200]}")
    code, message, data = error.get("code"), str(error.get("message", ""))[:500], error.get("data")
    revert = _revert_bytes(data)
    if code == 3 or "revert" in message.lower():
        return revert_error(_reason(message, revert), rpc_code=code)
    return _node_error(code, f"{method} failed: {message or error}", message.lower())


def _node_error(code: Any, text: str, lower: str) -> TesseraError:
    if any(phrase in lower for phrase in _NONCE_TAKEN):
        return Conflict(text, rpc_code=code)
    if code == LIMIT_EXCEEDED:
        return Refused(text, rule="rpc_limit", rpc_code=code)
    if "insufficient funds" in lower:
        return Refused(text, rule="insufficient_funds", rpc_code=code)
    if code in (-32700, -32600, -32601, -32602):
        return Invalid(text, rpc_code=code)
    if code == -32603:
        return Unavailable(text, rpc_code=code)
    return Refused(text, rule="node", rpc_code=code)


def _revert_bytes(data: Any) -> bytes | None:
    """Nodes put the revert's bytes in `data`, or one level deeper."""
    if isinstance(data, dict):
        data = data.get("data")
    if not isinstance(data, str) or not data.startswith("0x"):
        return None
    try:
        return bytes.fromhex(data[2:])
    except ValueError:
        return None


def _reason(message: str, revert: bytes | None) -> str:
    if revert:
        return revert_reason(revert)
    _, _, text = message.partition("execution reverted")
    return text.lstrip(": ") or "no reason given"
