"""A buyer that asks and pays by itself, within a budget: httpx with x402's own transport.

Invariants: it pays one asset on one network, at most `max_units_each` for a request and `max_units` in all; the budget
counts a payment when it is signed, since a signed authorization is money in the hands of the gateway.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from tessera.core.errors import Invalid, PaymentRequired, Refused, TesseraError, Unavailable, from_dict
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

__all__ = ["Buyer"]

REQUEST_TIMEOUT_S = 330.0  # above the gateway's own deadline for an answer


class Buyer:
    """Buys completions from one gateway.

    Args:
        url: the gateway's, without /v1.
        key: signs the payments; its account holds the coins.
        max_units_each, max_units: the spending limits, in the asset's smallest unit.
        pay_to: the only account that may be paid, such as the model's share contract; None = whoever the gateway names.
        api_key: the gateway's operator's own key, with which nothing is to be paid.
        transport: how to reach the gateway; None = over the network.
    """

    def __init__(
        self,
        url: str,
        key: AccountKey,
        *,
        chain_id: int,
        asset: Account,
        max_units_each: int,
        max_units: int,
        pay_to: Account | None = None,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        from x402.http.clients.httpx import x402AsyncTransport

        if max_units_each <= 0 or max_units < max_units_each:
            raise Invalid(f"a budget needs 0 < max_units_each ≤ max_units, not {max_units_each} and {max_units}")
        self.account = key.account
        self.signed_units = 0  # authorized so far, settled or not
        self.paid_requests = 0
        self._max_units = max_units
        self._asset = parse_account(asset)
        self._pay_to = None if pay_to is None else parse_account(pay_to)
        self._client = self._paying_client(key, f"eip155:{chain_id}", max_units_each)
        paying = x402AsyncTransport(self._client, transport)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(transport=paying, base_url=url, timeout=REQUEST_TIMEOUT_S, headers=headers)

    async def complete(self, prompt: str, *, model: str, **options: Any) -> dict[str, Any]:
        """One completion, as the gateway answers it. Raises: the gateway's error; Refused beyond the budget."""
        return await self._post("/v1/completions", {"model": model, "prompt": prompt, **options})

    async def chat(self, messages: list[dict[str, str]], *, model: str, **options: Any) -> dict[str, Any]:
        """One chat completion, as the gateway answers it."""
        return await self._post("/v1/chat/completions", {"model": model, "messages": messages, **options})

    async def stream_chat(
        self, messages: list[dict[str, str]], *, model: str, **options: Any
    ) -> AsyncGenerator[str, None]:
        """The pieces of a chat completion as they are made. Close it to stop early."""
        body = {"model": model, "messages": messages, "stream": True, **options}
        with _named_errors():
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                self._note(response)
                async for line in response.aiter_lines():
                    if piece := _piece(line):
                        yield piece

    async def buy(self, count: int, prompt: str, *, model: str, **options: Any) -> list[dict[str, Any]]:
        """`count` completions of one prompt, one after the other."""
        return [await self.complete(prompt, model=model, **options) for _ in range(count)]

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _named_errors():
            response = await self._http.post(path, json=body)
        self._note(response)
        answer: dict[str, Any] = response.json()
        return answer

    def _note(self, response: httpx.Response) -> None:
        """Raises what the gateway refused; counts what was paid."""
        if response.status_code != 200:
            raise _gateway_error(response)
        if "payment-response" in response.headers:
            self.paid_requests += 1

    def _paying_client(self, key: AccountKey, network: str, max_units_each: int) -> Any:
        from eth_account import Account as EthAccount
        from x402 import x402Client
        from x402.mechanisms.evm.exact import ExactEvmClientScheme
        from x402.mechanisms.evm.signers import EthAccountSigner

        client = x402Client()
        client.register(network, ExactEvmClientScheme(EthAccountSigner(EthAccount.from_key(key.secret))))
        cap = {"network": network, "asset": self._asset, "max_amount_per_payment": str(max_units_each)}
        client.set_spend_controls({"allowed_assets": [cap]})
        client.on_before_payment_creation(self._within_budget)
        return client

    def _within_budget(self, context: Any) -> None:
        asked = context.selected_requirements
        if parse_account(asked.asset) != self._asset:  # x402 allows well-known coins beside the one that we name
            raise Refused(f"the gateway asks for {asked.asset}, this buyer pays {self._asset}", rule="asset")
        if self._pay_to is not None and parse_account(asked.pay_to) != self._pay_to:
            raise Refused(f"the gateway's payee is {asked.pay_to}, this buyer pays {self._pay_to}", rule="pay_to")
        units = int(asked.amount)
        if self.signed_units + units > self._max_units:
            left = self._max_units - self.signed_units
            raise Refused(f"the price is {units} units, the budget has {left} left", rule="budget")
        self.signed_units += units


@contextmanager
def _named_errors() -> Iterator[None]:
    """x402's and httpx's errors as those of the core tree."""
    from x402.http.clients.httpx import PaymentError

    try:
        yield
    except PaymentError as error:  # x402 wraps what its hooks and limits raise
        raise _cause(error) or Refused(f"the payment was not made: {error}", rule="spend_controls") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"the gateway cannot be reached: {type(error).__name__}") from error


def _piece(line: str) -> str:
    """The text in one line of an event stream. Raises: what the gateway says went wrong."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return ""
    try:
        event = json.loads(data)
        if "error" in event:
            raise Unavailable(f"the stream broke: {str(event['error'].get('message'))[:500]}")
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable("the gateway's stream cannot be read") from error


def _cause(error: BaseException) -> TesseraError | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TesseraError):
            return cause
        cause = cause.__cause__
    return None


def _gateway_error(response: httpx.Response) -> TesseraError:
    """The gateway's envelope as an error of the core tree."""
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), str(error["code"])
    except (ValueError, KeyError, TypeError):
        message, code = "the gateway's answer cannot be read", "unreadable"
    fields: dict[str, Any] = {"reason": code[:200], "status": response.status_code}
    if response.status_code == 402:
        return PaymentRequired(message[:500], **fields)
    if response.status_code in (429, 503):
        return Unavailable(message[:500], **fields)
    named = {400: "invalid", 403: "refused", 404: "missing", 504: "late"}
    return from_dict({"code": named.get(response.status_code, "error"), "message": message, "fields": fields})
