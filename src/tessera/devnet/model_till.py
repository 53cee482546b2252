"""Who may use a gateway that serves a model of this directory, and what it costs.

Keys of `tessera gateway keys` always count. Beside them: keys of the configuration, a price through x402 with prepaid
credit and sign-in, or nothing at all for anybody.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from anyio import to_thread
from fastapi import FastAPI

from tessera.chain.faces import Coin
from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.ids import Account
from tessera.devnet.ledger import ensure_funded, open_ledger
from tessera.devnet.tills import own_tables
from tessera.serving.paying.allowances import OperatorAllowance
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import Free, Payments
from tessera.serving.paying.keys import ApiKeys, KeyRing, OperatorKeys
from tessera.serving.paying.payments import PaymentConfig
from tessera.serving.paying.prices import TokenPrice
from tessera.serving.paying.till import Till, TillConfig
from tessera.training.home import Home

__all__ = ["Access", "ModelTill", "Price", "open_model_till"]


@dataclass(frozen=True, slots=True)
class Price:
    """What is paid, on which chain, to whom."""

    units: int  # of the coin: for one request by `exact`; by the token, a whole context costs as much
    coin: Account  # must speak EIP-3009
    pay_to: Account
    chain_url: str


@dataclass(frozen=True, slots=True)
class Access:
    """Who is served."""

    api_keys: tuple[str, ...] = ()
    free: bool = False  # anybody, for nothing
    price: Price | None = None
    database: str = ""  # a URL that several gateways share; "" = files in the state directory
    public_url: str = ""  # scheme and host as users see them; "" = as requested, and nobody signs in


@dataclass(frozen=True, slots=True)
class ModelTill:
    """What `create_app` takes, and the routes about money."""

    ways: Sequence[Payments]
    till: Till | None
    first_key: str  # made just now, because nobody could have used the gateway; shown once

    def mount(self, app: FastAPI) -> None:
        if self.till is not None:
            self.till.mount(app)


@asynccontextmanager
async def open_model_till(home: Home, access: Access, context: int, clock: Clock) -> AsyncIterator[ModelTill]:
    """Open inside the block. Raises: Invalid: free and paid at once; Unavailable: the chain does not answer."""
    if access.free and access.price:
        raise Invalid("a gateway is free or paid, not both")
    ways: list[Payments] = [OperatorKeys(access.api_keys)] if access.api_keys else []
    async with AsyncExitStack() as stack:
        till: Till | None = None
        if access.price is not None:
            till = await _paid(home, access.price, access, context, stack, clock)
            keys, more = till.keys, till.ways
        else:
            keys, more = await _unpaid(home, access, stack, clock)
        first = ""
        if not (access.free or access.price or access.api_keys or await keys.list("operator")):
            first = await keys.issue("operator", "first")
        yield ModelTill([*ways, *more], till, first)


async def _paid(home: Home, price: Price, access: Access, context: int, stack: AsyncExitStack, clock: Clock) -> Till:
    operator = home.account("operator")
    ledger = await stack.enter_async_context(open_ledger(home.path / "chain", price.chain_url, clock))
    await ensure_funded(ledger, operator)
    coin = Coin(ledger.chain, price.coin)
    payment = PaymentConfig(
        asset=price.coin, asset_name=await coin.name(), asset_version=await coin.version(), price_units=price.units,
        pay_to=price.pay_to, tokens=TokenPrice.of_context(price.units, context),
    )  # fmt: skip
    config = TillConfig(payment, origin=access.public_url)
    tables = own_tables(home, access.database)
    till = await Till.open(config, ledger.chain, operator, clock, tables=tables)
    stack.callback(till.close)
    return till


async def _unpaid(home: Home, access: Access, stack: AsyncExitStack, clock: Clock) -> tuple[KeyRing, list[Payments]]:
    tables = own_tables(home, access.database)

    def make() -> tuple[KeyRing, Balances]:
        (keys, keys_schema), (balances, balances_schema) = tables("keys"), tables("balances")
        return KeyRing(clock, where=keys, schema=keys_schema), Balances(clock, where=balances, schema=balances_schema)

    ring, balances = await to_thread.run_sync(make)
    stack.callback(ring.close)
    stack.callback(balances.close)
    ways: list[Payments] = [ApiKeys(ring, {"operator": [OperatorAllowance(balances, clock)]})]
    return ring, [*ways, Free()] if access.free else ways
