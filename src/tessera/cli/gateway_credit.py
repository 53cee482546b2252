"""What `tessera gateway credit` does: reads a buyer's balance, and pays it back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import anyio
import typer

from tessera.core.clock import SystemClock
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.devnet.access import open_run
from tessera.devnet.tills import known_tables
from tessera.serving.paying.balances import Balances
from tessera.serving.paying.credit import refund
from tessera.serving.paying.facilitator import PaymentChain
from tessera.serving.paying.payments import credit_name
from tessera.training.home import Home

__all__ = ["pay_back", "show_credit"]


@dataclass(frozen=True)
class _Desk:
    balances: Balances
    chain: PaymentChain
    coin: Account
    name: str
    operator: AccountKey


def show_credit(state_dir: Path, database: str, account: str, entries: int, *, as_json: bool) -> None:
    """Raises what `open_run` raises."""

    async def show() -> None:
        async with _desk(state_dir, database, account) as desk:
            balance = await desk.balances.read(desk.name)
            lines = await desk.balances.last(desk.name, entries)
        if as_json:
            typer.echo(json.dumps(asdict(balance) | {"entries": [asdict(line) for line in lines]}))
            return
        typer.echo(f"{balance.units} units, {balance.held} set aside for requests in flight")
        for line in lines:
            time = datetime.fromtimestamp(line.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
            typer.echo(f"{line.number:6}  {time}  {line.kind:14} {line.units:+14}  {line.balance:14}  {line.reference}")

    anyio.run(show)


def pay_back(state_dir: Path, database: str, account: str, units: int) -> None:
    """Raises: Invalid when there is not so much credit; PaymentRequired when the operator has too few coins."""

    async def pay() -> None:
        async with _desk(state_dir, database, account) as desk:
            buyer = parse_account(account)
            transaction = await refund(
                desk.balances, desk.chain, desk.operator, desk.coin, desk.name, buyer, units
            )  # fmt: skip
        typer.echo(f"{units} units are paid back: {transaction}")

    anyio.run(pay)


@asynccontextmanager
async def _desk(state_dir: Path, database: str, account: str) -> AsyncIterator[_Desk]:
    home = Home.existing(state_dir)
    where, schema = known_tables(home, database)("balances")
    async with open_run(state_dir) as run:
        network = f"eip155:{await run.chain.chain_id()}"
        coin = run.roster.coin
        balances = Balances(SystemClock(), where=where, schema=schema)
        try:
            name = credit_name(network, coin, parse_account(account))
            yield _Desk(balances, run.chain, coin, name, home.account_key)
        finally:
            balances.close()
