"""OpenAI's error envelope for every failure, and the responses that carry it.

`{"error": {"message", "type", "param", "code"}}`, with the status of the core tree's class. An unexpected exception
becomes a 500 without details: what broke inside is for the operator's log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.core.errors import Invalid, Late, PaymentRequired, TesseraError, Unavailable

__all__ = ["CutOff", "SlowBody", "TooLarge", "Unauthorized", "error_body", "error_response", "install"]

log = structlog.get_logger()


class TooLarge(Invalid):
    """The body is larger than the gateway reads."""

    code, status = "request_too_large", 413


class SlowBody(Late):
    """The body did not arrive in time."""

    code, status = "request_timeout", 408


class CutOff(Exception):
    """An answer broke after it had begun. Says no more, since the server logs it and a message could quote a prompt."""


class Unauthorized(TesseraError):
    """The gateway takes no payment and the API key is missing or wrong."""

    code: ClassVar[str] = "invalid_api_key"
    status: ClassVar[int] = 401


def error_body(error: TesseraError) -> dict[str, Any]:
    """The envelope for `error`. `fields["param"]` and `fields["reason"]` become `param` and `code`."""
    param = error.fields.get("param")
    return _envelope(error.status, error.message, param and str(param), str(error.fields.get("reason") or error.code))


def error_response(error: TesseraError) -> JSONResponse:
    """The envelope with its status and headers; a 402 also carries the offer, in the header and in the body."""
    body = error_body(error)
    headers: dict[str, str] = dict(error.fields.get("headers") or {})
    if isinstance(error, PaymentRequired):
        body |= error.fields.get("offer") or {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status_code=error.status, headers=headers)


def install(app: FastAPI) -> None:
    """Makes every error of `app`, its routing included, speak the envelope."""

    @app.exception_handler(TesseraError)
    async def _named(request: Request, error: TesseraError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _routing(request: Request, error: HTTPException) -> JSONResponse:
        return _http_response(error, request)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(Invalid(f"the request does not fit the route: {error.errors()[0]['msg']}"))

    app.add_middleware(_LastResort)


class _LastResort:
    """Answers what nobody caught with a plain 500. A response that has begun is cut off instead."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001
            # The supervisor of one request: names the class only, since a message could quote a prompt.
            log.error("request_failed", path=scope["path"], error=type(error).__name__)
            if begun:
                raise CutOff from None
            await _plain(500, "the server had an error while answering")(scope, receive, send)


def _http_response(error: HTTPException, request: Request) -> JSONResponse:
    messages = {
        404: f"no route {request.url.path[:200]}",
        405: f"{request.method} is not allowed on {request.url.path[:200]}",
    }
    message = messages.get(error.status_code, HTTPStatus(error.status_code).phrase)
    return _plain(error.status_code, message, error.headers)


def _plain(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed", 500: "internal_error"}.get(status, "http_error")
    return JSONResponse(_envelope(status, message, None, code), status_code=status, headers=dict(headers or {}))


def _envelope(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    texts = {"message": message, "type": _type(status), "param": param, "code": code}
    # What the caller sent may be quoted here, and need not be text that UTF-8 can carry.
    return {"error": {name: text and text.encode(errors="replace").decode() for name, text in texts.items()}}


def _type(status: int) -> str:
    named = {
        401: "authentication_error",
        402: "payment_required",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")
