"""All the ways to pay of one gateway, put together: what they share, their order, and their routes.

A request is paid by the first of these that it comes by: the operator's key; the tokens that come with shares; prepaid
credit; an x402 payment. One that comes by none is told what to pay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import anyio.to_thread
from fastapi import FastAPI

from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.signing import AccountKey
from tessera.serving.income.vouchers import Purchase
from tessera.serving.paying.accounts import credit_routes, sign_in_routes
from tessera.serving.paying.allowances import OperatorAllowance
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.charging import Payments
from tessera.serving.paying.credit import Credit, CreditConfig, CreditDesk
from tessera.serving.paying.facilitator import PaymentChain
from tessera.serving.paying.holdings import Holdings, HoldingsChain, HoldingsConfig
from tessera.serving.paying.keys import ApiKeys, KeyedWay, KeyRing, Kind
from tessera.serving.paying.owners import OwnersTokens, Tokens
from tessera.serving.paying.payments import PaymentConfig, Settlement, X402Payments
from tessera.serving.paying.sign_in import SignIn, SignInConfig
from tessera.storage.location import MEMORY

__all__ = ["Tables", "Till", "TillChain", "TillConfig", "in_memory"]

Tables = Callable[[str], tuple[str | Path, str]]  # where the tables of a kind are, and their name-space


class TillChain(PaymentChain, HoldingsChain, Protocol):
    """A chain that payments and holdings are asked of; `tessera.chain.RpcChain` is one."""


@dataclass(frozen=True, slots=True)
class TillConfig:
    """What is sold, and to whom more is given."""

    payment: PaymentConfig
    credit: CreditConfig = field(default_factory=CreditConfig)
    origin: str = ""  # scheme and host as users see them; empty: nobody can sign in
    holdings: HoldingsConfig | None = None  # whose shares count
    rights: Sequence[Tokens] = ()  # what they are good for, in the order in which it is used


def in_memory(kind: str) -> tuple[str | Path, str]:
    return MEMORY, ""


class Till:
    """Made by `open`; `close` it.

    Attributes:
        ways: for `create_app`.
    """

    def __init__(
        self,
        config: TillConfig,
        payments: X402Payments,
        chain: TillChain,
        clock: Clock,
        tables: Tables,
        balances: Balances,
        on_bought: Callable[[Purchase], None] | None = None,
    ) -> None:
        tokens = config.payment.tokens
        if tokens is None:
            raise Invalid("a till needs a price for tokens")
        self.payments, self.balances = payments, balances
        where, schema = tables("keys")
        self.keys = KeyRing(clock, where=where, schema=schema)
        self.credit = Credit(balances, tokens, payments.offer.network, payments.offer.asset, payments.offers)
        self.desk = CreditDesk(config.credit, payments, self.credit, balances, self.keys, on_bought)
        self.sign_in: SignIn | None = None
        self._owners: OwnersTokens | None = None
        if config.origin:
            chain_id = int(payments.offer.network.partition(":")[2])
            where, schema = tables("sign_ins")
            terms = SignInConfig(config.origin.rstrip("/"), chain_id)
            self.sign_in = SignIn(terms, self.keys, chain, clock, where=where, schema=schema)
        if config.holdings is not None:
            self._owners = OwnersTokens(Holdings(config.holdings, chain, clock), balances, config.rights)
        keyed: dict[Kind, Sequence[KeyedWay]] = {
            "operator": [OperatorAllowance(balances, clock)],
            "session": [self.credit] if self._owners is None else [self._owners, self.credit],
            "credit": [self.credit],
        }
        self.ways: list[Payments] = [ApiKeys(self.keys, keyed), payments]
        self._config = config

    @classmethod
    async def open(
        cls,
        config: TillConfig,
        chain: TillChain,
        key: AccountKey,
        clock: Clock,
        *,
        tables: Tables = in_memory,
        on_settled: Callable[[Settlement], None] | None = None,
        on_bought: Callable[[Purchase], None] | None = None,
    ) -> Till:
        """Raises: Invalid when the asset is no contract; Unavailable when chain or database cannot be reached.

        Args:
            key: sends the settlements and pays their gas.
            on_bought: see `CreditDesk`.
        """
        where, schema = tables("balances")
        balances = await anyio.to_thread.run_sync(lambda: Balances(clock, where=where, schema=schema))
        at, space = tables("payments")
        payments = await X402Payments.open(
            config.payment, chain, key,
            balances=balances, database=at, schema=space, clock=clock, on_settled=on_settled,
        )  # fmt: skip
        return await anyio.to_thread.run_sync(lambda: cls(config, payments, chain, clock, tables, balances, on_bought))

    def mount(self, app: FastAPI) -> None:
        """Puts the routes about money on a gateway."""
        app.include_router(credit_routes(self.desk, self.balances, public_url=self._config.origin))
        if self.sign_in is not None:
            app.include_router(sign_in_routes(self.sign_in, self.desk, self._owners))

    def close(self) -> None:
        """Let go of the databases. Payments in flight stay leased until their leases end."""
        self.payments.close()
        self.balances.close()
        self.keys.close()
        if self.sign_in is not None:
            self.sign_in.close()
