"""A client of an OpenAI-compatible endpoint, ours or anybody's: answers, whole or in pieces, and what each cost.

Invariants: what the endpoint refuses is raised as the error that says what to do; nothing is believed of an answer but
its text, and of its price nothing that is no number.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx

from tessera.core.errors import Invalid, PaymentRequired, TesseraError, Unavailable, from_dict

__all__ = ["Asker", "Paid", "ServedName"]

REQUEST_TIMEOUT_S = 330.0  # above the gateway's own deadline for an answer
LINE_LIMIT = 1 << 20  # characters of one event


@dataclass(frozen=True, slots=True)
class Paid:
    """What an endpoint says that an answer cost. `unit` is `tokens`, or a coin as `eip155:CHAIN/CONTRACT`."""

    units: int
    unit: str
    left: int | None = None  # of the credit or the tokens that paid
    transaction: str = ""  # of an x402 payment


@dataclass(frozen=True, slots=True)
class ServedName:
    """A model that an endpoint has. `context` in tokens; 0 where it does not say."""

    id: str
    context: int


class Asker:
    """Asks through `http`, whose base URL is the endpoint's without /v1 and whose transport may pay.

    Attributes:
        paid: for the last answer; None when nothing was said of a price.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.paid: Paid | None = None

    @classmethod
    def open(cls, url: str, *, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None) -> Self:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        base = url.rstrip("/").removesuffix("/v1")
        return cls(httpx.AsyncClient(transport=transport, base_url=base, timeout=REQUEST_TIMEOUT_S, headers=headers))

    async def models(self) -> list[ServedName]:
        """What can be asked."""
        with named_errors():
            response = await self._http.get("/v1/models", timeout=30)
        if response.status_code != 200:
            raise gateway_error(response)
        try:
            return [ServedName(str(card["id"]), _context(card)) for card in response.json()["data"]]
        except (ValueError, LookupError, TypeError) as error:
            raise Unavailable("the endpoint's list of models cannot be read") from error

    async def complete(self, prompt: str, *, model: str, **options: Any) -> dict[str, Any]:
        """One completion, as the endpoint answers it. Raises: its error."""
        return await self.post("/v1/completions", {"model": model, "prompt": prompt, **options})

    async def chat(self, messages: list[dict[str, str]], *, model: str, **options: Any) -> dict[str, Any]:
        """One chat completion, as the endpoint answers it."""
        return await self.post("/v1/chat/completions", {"model": model, "messages": messages, **options})

    async def stream_chat(
        self, messages: list[dict[str, str]], *, model: str, **options: Any
    ) -> AsyncGenerator[str, None]:
        """The pieces of a chat completion as they are made. Close it to stop early."""
        self.paid = None
        body = {"model": model, "messages": messages, "stream": True, **options}
        with named_errors():
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                self._note(response)
                async for line in response.aiter_lines():
                    if piece := self._piece(line):
                        yield piece

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Any route that takes a body and answers with an object."""
        self.paid = None
        with named_errors():
            response = await self._http.post(path, json=body)
        self._note(response)
        try:
            answer = response.json()
        except ValueError as error:
            raise Unavailable("the endpoint's answer cannot be read") from error
        if not isinstance(answer, dict):
            raise Unavailable("the endpoint's answer is no object")
        return answer

    async def aclose(self) -> None:
        await self._http.aclose()

    def _note(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            raise gateway_error(response)
        self.paid = read_price(response.headers)

    def _piece(self, line: str) -> str:
        """The text in one line of an event stream. Raises: what the endpoint says went wrong."""
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            return ""
        if len(data) > LINE_LIMIT:
            raise Unavailable(f"an event of {len(data)} characters, at most {LINE_LIMIT} expected")
        try:
            event = json.loads(data)
            if "error" in event:
                raise Unavailable(f"the stream broke: {str(event['error'].get('message'))[:500]}")
            if isinstance(event.get("payment"), dict):
                self.paid = read_price(event["payment"]) or self.paid
            return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unavailable("the endpoint's stream cannot be read") from error


@contextmanager
def named_errors() -> Iterator[None]:
    """httpx's errors as those of the core tree."""
    try:
        yield
    except httpx.InvalidURL as error:
        raise Invalid(f"that is no URL: {error}") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"the endpoint cannot be reached: {type(error).__name__}") from error


def gateway_error(response: httpx.Response) -> TesseraError:
    """OpenAI's envelope as an error of the core tree."""
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), str(error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = "the endpoint's answer cannot be read", "unreadable"
    fields: dict[str, Any] = {"reason": code[:200], "status": response.status_code}
    if response.status_code == 402:
        return PaymentRequired(message[:500], **fields)
    if response.status_code in (429, 503):
        return Unavailable(message[:500], **fields)
    named = {400: "invalid", 401: "refused", 403: "refused", 404: "missing", 504: "late"}
    return from_dict({"code": named.get(response.status_code, "error"), "message": message, "fields": fields})


def read_price(headers: Mapping[str, Any]) -> Paid | None:
    """The price in an answer's headers, or in the field `payment` of a stream's last chunk."""
    receipt = _receipt(headers.get("payment-response"))
    units, unit, left = (headers.get(f"tessera-{name}") for name in ("cost", "unit", "left"))
    units = units if units is not None else receipt.get("amount")
    if (cost := _whole(units)) is None:
        return None
    transaction = receipt.get("transaction")
    return Paid(cost, str(unit or receipt.get("network") or "")[:200], _whole(left), str(transaction or "")[:200])


def _receipt(header: Any) -> dict[str, Any]:
    try:
        receipt = json.loads(base64.b64decode(str(header or ""), validate=True))
    except (binascii.Error, ValueError, RecursionError):
        return {}
    return receipt if isinstance(receipt, dict) else {}


def _whole(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 40 else None


def _context(card: Mapping[str, Any]) -> int:
    """As we name it, or as vLLM does."""
    return next((card[name] for name in ("context_length", "max_model_len") if type(card.get(name)) is int), 0)
