"""`tessera shares` and `tessera claim`: what the chain says about owners, pulling one's part, and one's bond."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from tessera.chain.faces import ModelShare, Run
from tessera.chain.settle import income_table
from tessera.core.amount import Amount
from tessera.core.errors import Missing
from tessera.core.ids import Account
from tessera.core.merkle import share_leaf
from tessera.devnet.access import OpenBond, OpenRun, open_bond, open_run
from tessera.devnet.served import claim_served
from tessera.training.bond import Status, bond_state
from tessera.training.host import CANDIDATE_S
from tessera.training.manifest import SHARE_WAD

__all__ = ["run_claim", "run_shares"]

COIN, DECIMALS = "tUSD", 6
NO_MEMBER = Run.Member(Status.NOBODY, 0, bytes(32), 0, 0, 0)


async def run_shares(state_dir: Path, as_json: bool) -> None:
    async with open_run(state_dir) as run:
        facts = await _shares(run)
    if as_json:
        print(json.dumps(facts))  # noqa: T201  the command's result
        return
    table = Table(
        Column("account", overflow="fold"),
        "role",
        "shares",
        "claimable",
        "claimed",
        title=f"{facts['name']} · {facts['share']}",
    )
    for row in facts["owners"]:
        cells = [_wad(row["shares"]), _money(row["claimable"]), _money(row["claimed"])]
        table.add_row(row["account"], row["role"], *cells)
    table.add_section()
    table.add_row("all", "", _wad(facts["total_shares"]), _money(facts["unclaimed"]), _money(facts["claimed"]))
    console = Console()
    console.print(table, highlight=False)
    console.print(
        f"revenue {_money(facts['revenue'])} = claimed {_money(facts['claimed'])} + unclaimed "
        f"{_money(facts['unclaimed'])} + undistributed {_money(facts['undistributed'])} + dust {facts['dust']} units",
        highlight=False,
        soft_wrap=True,
    )


async def run_claim(state_dir: Path, as_json: bool) -> None:
    """Redeem every epoch that this directory knows, spread what has arrived, and claim; take back a bond that is free.

    A joiner who never became a worker has no shares, and only his bond to take back.
    """
    async with open_bond(state_dir) as bond:
        try:
            redeemed, units = await _claim(bond.run())
        except Missing:
            redeemed = units = 0
        facts = {"account": bond.home.account_key.account, "redeemed": redeemed, "claimed": units}
        facts |= await _withdraw(bond, time.time())
    if as_json:
        print(json.dumps(facts))  # noqa: T201  the command's result
        return
    console = Console()
    pulled = f"redeemed {_wad(redeemed)} shares, claimed {_money(units)}"
    console.print(f"{facts['account']}: {pulled}", highlight=False, soft_wrap=True)
    if facts["withdrawn"]:
        console.print(f"stake: {facts['withdrawn']:,} units are back", highlight=False)
    elif facts["bonded"]:
        console.print(f"stake: {facts['bonded']:,} units {facts['bond']}", highlight=False, soft_wrap=True)


async def _claim(run: OpenRun) -> tuple[int, int]:
    """Shares redeemed, units claimed: income of shares, and of serving."""
    key, share = run.home.account_key, ModelShare(run.chain, run.roster.share)
    redeemed = await _redeem(run, share)
    income = await income_table(run.chain, run.roster.share)
    if income.undistributed > 0:
        await share.distribute(key)
    units = await share.claimable(key.account)
    if units > 0:
        await share.claim(key, key.account)
    return redeemed, units + await claim_served(run)


async def _withdraw(bond: OpenBond, now: float) -> dict[str, Any]:
    """Take back what is free. On the way, have the contract let go whom the workers never took in, or never let go."""
    if bond.contract is None:
        return {"withdrawn": 0, "bonded": 0, "bond": bond_state(NO_MEMBER, 0)}
    key, run, delay_s = bond.home.account_key, Run(bond.chain, bond.contract), bond.manifest.settlement.delay_s
    member = await run.members(key.account)
    if member.status in (Status.BONDED, Status.DRAWN) and now > member.since + CANDIDATE_S:
        await run.expire(key, key.account)
    elif member.status == Status.LEAVING and now >= member.since + delay_s:
        await run.exit(key)
    elif member.status == Status.LEFT and now >= member.since:
        await run.withdraw(key, key.account)
        return {"withdrawn": member.bond, "bonded": 0, "bond": "paid back"}
    member = await run.members(key.account)
    return {"withdrawn": 0, "bonded": member.bond, "bond": bond_state(member, delay_s)}


async def _redeem(run: OpenRun, share: ModelShare) -> int:
    account, total = run.home.account_key.account, 0
    for leaves in run.leaves:
        shares = leaves.shares_of(account)
        if shares and not await share.counted(share_leaf(leaves.epoch, account, shares)):
            await share.redeem(run.home.account_key, leaves.epoch, account, shares, leaves.proof(account))
            total += shares
    return total


async def _shares(run: OpenRun) -> dict[str, Any]:
    share = ModelShare(run.chain, run.roster.share)
    income = await income_table(run.chain, run.roster.share)
    roles: dict[Account, str] = {seat.account: f"stage {seat.stage}" for seat in run.roster.seats}
    roles |= {seat.account: f"left stage {seat.stage}" for seat in run.roster.past}
    for owner in run.manifest.owners:
        roles.setdefault(owner.account, owner.role)
    owners = []
    for account, role in roles.items():
        owners.append(
            {
                "account": account,
                "role": role,
                "shares": await share.balanceOf(account),
                "claimable": await share.claimable(account),
                "claimed": income.claimed.get(account, 0),
            }
        )
    return {
        "run_id": run.manifest.run_id,
        "name": run.manifest.name,
        "share": run.roster.share,
        "owners": owners,
        "total_shares": await share.totalSupply(),
        "revenue": income.revenue,
        "claimed": sum(income.claimed.values()),
        "unclaimed": income.unclaimed,
        "undistributed": income.undistributed,
        "dust": income.dust,
    }


def _money(units: int) -> str:
    return Amount(units, COIN).format(DECIMALS)


def _wad(shares: int) -> str:
    """Shares with four decimals, rounded down: enough to compare, never more than owned."""
    whole, rest = divmod(shares, SHARE_WAD)
    return f"{whole}.{rest * 10_000 // SHARE_WAD:04d}"
