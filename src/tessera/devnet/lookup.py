"""What the page shows behind a number: the transaction or the account that proves it, read from the chain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tessera.chain.faces import Coin, ModelShare
from tessera.core.errors import TesseraError
from tessera.core.ids import parse_account
from tessera.devnet.economy import Economy
from tessera.devnet.figures import money, shares_down
from tessera.devnet.snapshot import Income

__all__ = ["make_lookup"]

Lookup = Callable[[str, str], Awaitable[dict[str, Any] | None]]


def make_lookup(economy: Economy) -> Lookup:
    """`await lookup("tx", hash)` or `("account", address)`; None for what the chain does not know."""

    async def lookup(kind: str, name: str) -> dict[str, Any] | None:
        if kind == "tx":
            return await _transaction(economy, name)
        if kind == "account":
            return await _account(economy, name)
        return None

    return lookup


async def _transaction(economy: Economy, name: str) -> dict[str, Any] | None:
    run = economy.run
    if run is None:
        return None
    try:
        receipt = await run.ledger.chain.request("eth_getTransactionReceipt", [name])
    except TesseraError:
        return None  # not a transaction hash
    if receipt is None:
        return None
    return {
        "block": int(receipt["blockNumber"], 16),
        "from": receipt["from"],
        "to": receipt["to"] or receipt["contractAddress"],
        "gas": int(receipt["gasUsed"], 16),
        "status": "succeeded" if receipt["status"] == "0x1" else "reverted",
        "events": len(receipt["logs"]),
    }


async def _account(economy: Economy, name: str) -> dict[str, Any] | None:
    run = economy.run
    if run is None:
        return None
    try:
        account = parse_account(name)
    except TesseraError:
        return None
    chain = run.ledger.chain
    facts: dict[str, Any] = {
        "balance": money(await Coin(chain, run.coin).balanceOf(account), Income()),
        "contract": bool(await chain.code(account)),
    }
    if run.seated:
        share = ModelShare(chain, run.roster.share)
        facts["shares"] = shares_down(await share.balanceOf(account), 18)
        facts["claimable"] = money(await share.claimable(account), Income())
    return facts
