"""JSON-RPC 2.0 from the answering side: bytes in, bytes out.

Whatever the bytes hold, the answer is well-formed JSON-RPC: malformed text, unknown methods, wrong parameters, batches
that are too long and bugs of ours each have their code. Nothing is answered to notifications.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import structlog

from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, TesseraError, Unavailable

__all__ = [
    "BODY_LIMIT", "INTERNAL", "INVALID_PARAMS", "INVALID_REQUEST", "LIMIT_EXCEEDED", "METHOD_NOT_FOUND", "PARSE_ERROR",
    "REVERTED", "SERVER_ERROR", "RpcFault", "answer", "error_text", "fault_of",
]  # fmt: skip

log = structlog.get_logger()

BODY_LIMIT = 1 << 20  # bytes of a request
BATCH_LIMIT = 100  # requests in a batch

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
SERVER_ERROR, LIMIT_EXCEEDED, REVERTED = -32000, -32005, 3


class RpcFault(Exception):
    """An error as JSON-RPC has it."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data

    def to_value(self) -> dict[str, Any]:
        value: dict[str, Any] = {"code": self.code, "message": self.message}
        return value if self.data is None else {**value, "data": self.data}


def fault_of(error: TesseraError) -> RpcFault:
    """The JSON-RPC form of an error of ours."""
    if isinstance(error, Refused) and error.rule == "rpc_limit":
        return RpcFault(LIMIT_EXCEEDED, error.message)
    if isinstance(error, Unavailable):
        return RpcFault(INTERNAL, error.message)
    if isinstance(error, (Invalid, Refused, Missing, Conflict, Misbehaviour)):
        return RpcFault(SERVER_ERROR, error.message)
    return RpcFault(INTERNAL, error.message)


def answer(call: Callable[[str, list[Any]], Any], body: bytes, limit: int = BODY_LIMIT) -> bytes:
    """Run one request, or a batch of them in order. Empty bytes when all were notifications."""
    if len(body) > limit:
        return error_text(RpcFault(INVALID_REQUEST, f"{len(body)} bytes, at most {limit} expected"))
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return error_text(RpcFault(PARSE_ERROR, "not JSON"))
    if not isinstance(value, list):
        return _text(_one(call, value))
    if not 1 <= len(value) <= BATCH_LIMIT:
        return error_text(RpcFault(INVALID_REQUEST, f"a batch of {len(value)} requests, 1 to {BATCH_LIMIT} expected"))
    answers = [found for item in value if (found := _one(call, item)) is not None]
    return _text(answers or None)


def error_text(fault: RpcFault) -> bytes:
    """The answer to a body that was not read."""
    return _text(_error(None, fault))


def _one(call: Callable[[str, list[Any]], Any], request: Any) -> dict[str, Any] | None:
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        return _error(None, RpcFault(INVALID_REQUEST, "a request is an object with a method"))
    request_id = request.get("id")
    if type(request_id) not in (int, float, str, type(None)):
        return _error(None, RpcFault(INVALID_REQUEST, "an id is a number or a string"))
    reply = _run(call, request_id, request["method"], request.get("params", []))
    return reply if "id" in request else None


def _run(call: Callable[[str, list[Any]], Any], request_id: Any, method: str, params: Any) -> dict[str, Any]:
    try:
        if not isinstance(params, list):
            raise RpcFault(INVALID_PARAMS, f"{method[:60]}: params are a list")
        return {"jsonrpc": "2.0", "id": request_id, "result": call(method, params)}
    except RpcFault as fault:
        return _error(request_id, fault)
    except Exception:  # the supervisor of a request: a bug of ours must not take the chain down with it
        log.exception("rpc_failed", method=method[:60])
        return _error(request_id, RpcFault(INTERNAL, "internal error: see the chain's log"))


def _error(request_id: Any, fault: RpcFault) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "error": fault.to_value()}


def _text(value: Any) -> bytes:
    return b"" if value is None else json.dumps(value, separators=(",", ":")).encode()
