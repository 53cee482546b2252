"""A buyer that asks and pays by itself, within a budget: httpx with x402's own transport.

Invariants: it pays one asset on one network, at most `max_units_each` for a request and `max_units` in all; the budget
counts a payment when it is signed, by the most that it can cost, since a signed authorization is money in the hands of
the gateway. By `upto` a gateway takes less than was signed, and nobody but the chain could say that it took no more.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from tessera.core.errors import Invalid, Refused, TesseraError, Unavailable
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.serving.asking import REQUEST_TIMEOUT_S, Asker, Paid, ServedName

__all__ = ["Buyer"]


class Buyer:
    """Buys completions from one gateway.

    Args:
        url: the gateway's, without /v1.
        key: signs the payments; its account holds the coins.
        max_units_each, max_units: the spending limits, in the asset's smallest unit.
        pay_to: the only account that may be paid, such as the model's share contract; None = whoever the gateway names.
        metered: pay by `upto` where it is offered; the account has approved Permit2 for its coins.
        api_key: of credit that was bought, or the operator's own; what it covers is not paid otherwise.
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
        metered: bool = False,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        from x402.http.clients.httpx import x402AsyncTransport

        if max_units_each <= 0 or max_units < max_units_each:
            raise Invalid(f"a budget needs 0 < max_units_each ≤ max_units, not {max_units_each} and {max_units}")
        self.account = key.account
        self.signed_units = 0  # authorized so far, settled or not
        self.paid_requests = 0
        self._prepaying = 0  # the one payment that may be above the limit for a request
        self._max_units_each, self._max_units = max_units_each, max_units
        self._asset = parse_account(asset)
        self._pay_to = None if pay_to is None else parse_account(pay_to)
        client = self._paying_client(key, f"eip155:{chain_id}", metered)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(
            transport=x402AsyncTransport(client, transport), base_url=url, timeout=REQUEST_TIMEOUT_S, headers=headers
        )
        self._asker = Asker(self._http)

    @property
    def paid(self) -> Paid | None:
        """What the last answer cost, as the gateway says."""
        return self._asker.paid

    async def models(self) -> list[ServedName]:
        """What the gateway serves."""
        return await self._asker.models()

    async def complete(self, prompt: str, *, model: str, **options: Any) -> dict[str, Any]:
        """One completion, as the gateway answers it. Raises: the gateway's error; Refused beyond the budget."""
        with self._paying():
            return await self._asker.complete(prompt, model=model, **options)

    async def chat(self, messages: list[dict[str, str]], *, model: str, **options: Any) -> dict[str, Any]:
        """One chat completion, as the gateway answers it."""
        with self._paying():
            return await self._asker.chat(messages, model=model, **options)

    async def stream_chat(
        self, messages: list[dict[str, str]], *, model: str, **options: Any
    ) -> AsyncGenerator[str, None]:
        """The pieces of a chat completion as they are made. Close it to stop early: what was made is paid."""
        with self._paying():
            async for piece in self._asker.stream_chat(messages, model=model, **options):
                yield piece

    async def buy(self, count: int, prompt: str, *, model: str, **options: Any) -> list[dict[str, Any]]:
        """`count` completions of one prompt, one after the other."""
        return [await self.complete(prompt, model=model, **options) for _ in range(count)]

    async def buy_credit(self, units: int) -> int:
        """Prepays `units`, once; what is asked from now on is paid with them. It counts as one payment of the budget.

        Returns: the credit.
        """
        self._prepaying = units
        try:
            with self._paying():
                bought = await self._asker.post("/v1/credit", {"units": str(units)})
        finally:
            self._prepaying = 0
        try:
            if "api_key" in bought:
                self._http.headers["Authorization"] = f"Bearer {bought['api_key']}"
            return int(bought["units"])
        except (KeyError, TypeError, ValueError) as error:
            raise Unavailable("the gateway's answer to a purchase of credit cannot be read") from error

    async def aclose(self) -> None:
        await self._asker.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @contextmanager
    def _paying(self) -> Iterator[None]:
        """x402's errors as those of the core tree; counts the answers that were paid."""
        from x402.http.clients.httpx import PaymentError

        try:
            yield
        except PaymentError as error:  # x402 wraps what its hooks and limits raise
            raise _cause(error) or Refused(f"the payment was not made: {error}", rule="spend_controls") from error
        if self.paid is not None and self.paid.transaction:
            self.paid_requests += 1

    def _paying_client(self, key: AccountKey, network: str, metered: bool) -> Any:
        from eth_account import Account as EthAccount
        from x402 import x402Client
        from x402.mechanisms.evm.exact import ExactEvmClientScheme
        from x402.mechanisms.evm.signers import EthAccountSigner
        from x402.mechanisms.evm.upto import UptoEvmClientScheme

        client = x402Client(_metered_first if metered else None)
        signer = EthAccountSigner(EthAccount.from_key(key.secret))
        client.register(network, ExactEvmClientScheme(signer))
        if metered:
            client.register(network, UptoEvmClientScheme(signer))
        cap = {"network": network, "asset": self._asset, "max_amount_per_payment": str(self._max_units)}
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
        if units > self._max_units_each and units != self._prepaying:
            raise Refused(f"the price is {units} units, at most {self._max_units_each} are allowed", rule="price")
        if self.signed_units + units > self._max_units:
            left = self._max_units - self.signed_units
            raise Refused(f"the price is {units} units, the budget has {left} left", rule="budget")
        self.signed_units += units


def _metered_first(version: int, offers: Sequence[Any]) -> Any:
    """Among what is offered and allowed."""
    return next((offer for offer in offers if offer.scheme == "upto"), offers[0])


def _cause(error: BaseException) -> TesseraError | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TesseraError):
            return cause
        cause = cause.__cause__
    return None
