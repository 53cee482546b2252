"""`tessera gateway …`: the operator's desk: API keys, buyers' credit, refunds. Works while the gateway serves."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tessera.cli.options import AsJson, StateDir, choice, default_state_dir

if TYPE_CHECKING:
    from tessera.serving.paying.keys import KeyRing

__all__ = ["gateway_app"]

gateway_app = typer.Typer(help="The gateway's keys and money.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys: make, list, revoke.", no_args_is_help=True)
credit_app = typer.Typer(help="Buyers' prepaid credit: show it, pay it back.", no_args_is_help=True)
gateway_app.add_typer(keys_app, name="keys")
gateway_app.add_typer(credit_app, name="credit")

Database = Annotated[str, typer.Option(help="The gateway's --database, if it has one.")]
T = TypeVar("T")


@keys_app.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="Whose it is, for the list.")],
    tokens_per_day: Annotated[int, typer.Option(help="Tokens that it may use in a day (UTC); 0 = no limit.")] = 0,
    database: Database = "",
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Make an API key with which nothing is paid. Prints it once: it is kept as a hash only."""
    secret = _with_keys(
        state_dir, database, lambda ring: ring.issue("operator", name, tokens_per_day=tokens_per_day)
    )  # fmt: skip
    typer.echo(secret)
    typer.echo("This key is not shown again: clients send it as their API key.", err=True)


@keys_app.command("list")
def keys_list(
    kind: Annotated[str, typer.Option(help="operator, credit or session.")] = "operator",
    database: Database = "",
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """What keys there are, by their ids; nobody can show their secrets."""
    from dataclasses import asdict

    wanted = choice("--kind", kind, ("operator", "credit", "session"))
    found = _with_keys(state_dir, database, lambda ring: ring.list(wanted))
    if as_json:
        typer.echo(json.dumps([asdict(key) for key in found]))
        return
    for key in found:
        limit = f"{key.tokens_per_day:,} tokens a day" if key.tokens_per_day else "no limit"
        state = f"revoked {_when(key.revoked)}" if key.revoked else f"until {_when(key.until)}" if key.until else limit
        typer.echo(f"{key.id}  {_when(key.made)}  {key.owner}  {state}")


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, from the list.")],
    database: Database = "",
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """End a key, from the next request on."""
    key = _with_keys(state_dir, database, lambda ring: ring.revoke(key_id))
    typer.echo(f"{key.id} of {key.owner} is revoked")


@credit_app.command("show")
def credit_show(
    account: Annotated[str, typer.Argument(help="The buyer's account.")],
    entries: Annotated[int, typer.Option(help="How many of the last entries.")] = 20,
    database: Database = "",
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """What a buyer has left, and how it came to that."""
    from tessera.cli.gateway_credit import show_credit

    show_credit(state_dir, database, account, entries, as_json=as_json)


@credit_app.command("refund")
def credit_refund(
    account: Annotated[str, typer.Argument(help="The buyer's account, to which the coins go.")],
    units: Annotated[int, typer.Argument(help="How much, in the coin's smallest unit.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    database: Database = "",
    state_dir: StateDir = default_state_dir("up"),
) -> None:
    """Pay credit back, out of the operator's own account."""
    from tessera.cli.gateway_credit import pay_back

    if not yes:
        typer.confirm(f"Pay {units} units of credit back to {account}?", abort=True, err=True)
    pay_back(state_dir, database, account, units)


def _with_keys(state_dir: Path, database: str, work: Callable[[KeyRing], Awaitable[T]]) -> T:
    import anyio

    from tessera.core.clock import SystemClock
    from tessera.devnet.tills import known_tables
    from tessera.serving.paying.keys import KeyRing
    from tessera.training.home import Home

    where, schema = known_tables(Home.existing(state_dir), database)("keys")
    ring = KeyRing(SystemClock(), where=where, schema=schema)
    try:
        return anyio.run(work, ring)
    finally:
        ring.close()


def _when(time: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M")
