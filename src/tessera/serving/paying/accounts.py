"""The gateway's routes about money and who one is: buying credit, what is left, signing in.

POST /v1/credit     one x402 payment of any amount within limits; tells an API key once
GET  /v1/credit     what is left, and the last entries; with the API key
GET  /v1/sign-in    the text to sign, for an account
POST /v1/sign-in    text and signature; tells a session's API key
GET  /v1/rights     the tokens of this window that come with shares; with a session's API key
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.serving import envelope, streams
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import API_KEY_HEADER, PAYMENT_HEADER, PaidRequest
from tessera.serving.paying.credit import CreditDesk
from tessera.serving.paying.owners import OwnersTokens
from tessera.serving.paying.sign_in import SIGNATURE_LIMIT, TEXT_LIMIT, SignIn

__all__ = ["credit_routes", "sign_in_routes"]

BODY_LIMIT = 16_384  # bytes
BODY_S = 10.0
ENTRIES = 20  # the last ones, that a buyer sees

BodyT = TypeVar("BodyT", bound=BaseModel)
Units = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,17}$")]


class _Purchase(BaseModel):
    """`units` of the coin's smallest unit. With a `retry_secret` of yours, a lost answer can be asked for again."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    units: Units
    retry_secret: Annotated[str, Field(min_length=16, max_length=128)] | None = None


class _Signed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    text: Annotated[str, Field(min_length=1, max_length=TEXT_LIMIT)]
    signature: Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]*$", max_length=2 + 2 * SIGNATURE_LIMIT)]


def credit_routes(desk: CreditDesk, balances: Balances, *, public_url: str = "") -> APIRouter:
    """`public_url`: scheme and host that buyers see; empty = as requested."""
    router = APIRouter()

    async def buy(request: Request) -> Response:
        body = await _body(request)
        wanted = _read(_Purchase, body)
        url = (public_url.rstrip("/") or str(request.base_url).rstrip("/")) + request.url.path
        headers = {name: request.headers[name] for name in (PAYMENT_HEADER, API_KEY_HEADER) if name in request.headers}
        paid = PaidRequest(url, sha256(request.url.path.encode(), b"\0", body), headers)
        bought, told = await desk.buy(paid, int(wanted.units), wanted.retry_secret or "")
        answer = {"object": "credit", "account": bought.account, "units": str(bought.units), "unit": desk.unit}
        if bought.api_key is not None:
            answer["api_key"] = bought.api_key
        return JSONResponse(answer, headers=told | {"cache-control": "no-store"})

    async def read(request: Request) -> dict[str, Any]:
        theirs = await desk.read(dict(request.headers))
        if theirs is None:
            raise envelope.Unauthorized("credit is told to who has its API key")
        key, name = theirs
        balance = await balances.read(name)
        entries = [
            {"kind": entry.kind, "units": str(entry.units), "time": int(entry.time), "reference": entry.reference}
            for entry in await balances.last(name, ENTRIES)
        ]
        amounts = {"units": str(balance.units), "held": str(balance.held), "unit": desk.unit}
        return {"object": "credit", "account": key.owner, **amounts, "entries": entries}

    _add(router, "POST", "/v1/credit", buy, (400, 402, 408, 413, 503, 504), _Purchase)
    _add(router, "GET", "/v1/credit", read, (401, 503))
    return router


def sign_in_routes(sign_in: SignIn, desk: CreditDesk, owners: OwnersTokens | None) -> APIRouter:
    """`owners`: whose shares give tokens; None when nobody's do."""
    router = APIRouter()

    async def text(account: str) -> dict[str, str]:
        return {"text": sign_in.text(account)}

    async def open_session(request: Request) -> Response:
        signed = _read(_Signed, await _body(request))
        session = await sign_in.open(signed.text, signed.signature)
        answer = {"object": "session", "account": session.account, "api_key": session.api_key}
        return JSONResponse(answer | {"until": int(session.until)}, headers={"cache-control": "no-store"})

    async def rights(request: Request) -> dict[str, Any]:
        theirs = await desk.read(dict(request.headers))
        if theirs is None or theirs[0].kind != "session":
            raise envelope.Unauthorized("rights are told to who has signed in")
        account = theirs[0].owner
        return {"object": "rights", "account": account, "rights": [] if owners is None else await owners.left(account)}

    _add(router, "GET", "/v1/sign-in", text, (400,))
    _add(router, "POST", "/v1/sign-in", open_session, (400, 403, 408, 413, 503, 504), _Signed)
    _add(router, "GET", "/v1/rights", rights, (401, 503, 504))
    return router


async def _body(request: Request) -> bytes:
    try:
        return await streams.read_body(request, limit=BODY_LIMIT, timeout_s=BODY_S)
    except streams.ClientGone:
        raise envelope.SlowBody("the client left before its body was here") from None


def _read(kind: type[BodyT], body: bytes) -> BodyT:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in problem["loc"]) or None
        raise Invalid(f"{param or 'the body'}: {problem['msg']}"[:300], param=param, reason="invalid_value") from None


def _add(
    router: APIRouter,
    method: str,
    path: str,
    route: Callable[..., Any],
    errors: Sequence[int],
    body: type[BaseModel] | None = None,
) -> None:
    """A route, told in the OpenAPI document with its body and the errors that it answers with."""
    told: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase} for status in (*errors, 405)
    }
    content = {} if body is None else {"application/json": {"schema": body.model_json_schema()}}
    extra = {"requestBody": {"required": True, "content": content}} if content else None
    router.add_api_route(
        path, route, methods=[method], response_model=None, responses=told, openapi_extra=extra
    )  # fmt: skip
