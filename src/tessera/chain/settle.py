"""The books of a share contract, computed beside the chain.

`income_table` reads everything at the chain and raises unless the books balance to the last unit:

    revenue = claimed + unclaimed + undistributed + dust
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tessera.chain.faces import Coin, ModelShare
from tessera.chain.types import Chain
from tessera.core.errors import Misbehaviour
from tessera.core.ids import Account

__all__ = ["IncomeTable", "income_table"]

SCALE = 2**128  # as in contracts/modules/accrual.vy


@dataclass(frozen=True, slots=True)
class IncomeTable:
    """The books of one share contract after one block. Money is in the coin's smallest unit, shares in theirs.

    `revenue` is what was paid in, `claimed` what holders have taken out, `claimable` what `claim` would pay each now,
    `pending` what belongs to shares that are not redeemed yet, `undistributed` what waits for `distribute`, and `dust`
    what the fractions of all of them add up to: at most one unit for each of `roundings`.
    """

    block_number: int
    revenue: int
    payers: Mapping[Account, int]  # revenue, by who paid it
    claimed: Mapping[Account, int]
    claimable: Mapping[Account, int]
    pending: int
    undistributed: int
    dust: int
    roundings: int  # holders and unredeemed epochs whose income is no whole number of units, and units that nobody owns
    shares: Mapping[Account, int]  # balances
    unredeemed: int
    total_shares: int

    @property
    def total_claimed(self) -> int:
        return sum(self.claimed.values())

    @property
    def unclaimed(self) -> int:
        return sum(self.claimable.values()) + self.pending


async def income_table(chain: Chain, share: Account, *, from_block: int = 0) -> IncomeTable:
    """Read the books at the chain, all of one block, and check them.

    Args:
        from_block: where to begin looking for events; the contract's own block saves a public node's patience.

    Raises: `Misbehaviour` when the node's answers do not balance: then it lies, or the coin is not a plain ERC-20.

    Cost: five log queries, and two calls for each holder and each epoch.
    """
    block = await chain.block_number()
    face = ModelShare(chain, share).at(block)
    coin = Coin(chain, await face.asset()).at(block)
    paid_in = await coin.events(Coin.Transfer, from_block, block, [None, _topic(share)])
    paid_out = await coin.events(Coin.Transfer, from_block, block, [_topic(share)])
    claims = await face.events(ModelShare.Claimed, from_block, block)
    moves = await face.events(ModelShare.Transfer, from_block, block)
    payers = _sums((event.sender, event.value) for event in paid_in)
    claimed = _sums((event.holder, event.amount) for event in claims)
    holders = sorted({event.receiver for event in moves})
    accrued = {holder: await face.accrued(holder) for holder in holders}
    shares = {holder: await face.balanceOf(holder) for holder in holders}
    epochs = range(await face.epoch_count())
    pending = [await face.pending(epoch) for epoch in epochs]
    unredeemed = sum([(await face.epochs(epoch)).unredeemed for epoch in epochs])
    balance, held, total = await coin.balanceOf(share), await face.held(), await face.totalSupply()
    parts, remainder = [*accrued.values(), *pending], await face.remainder()
    claimable = sum(part // SCALE for part in parts)
    checks = {
        "revenue - claimed = the coin's balance": sum(payers.values()) - sum(claimed.values()) == balance,
        "claims = payments out": sum(claimed.values()) == sum(event.value for event in paid_out),
        "accrued + pending + remainder = held": sum(parts) + remainder == held * SCALE,
        "balances + unredeemed = total shares": sum(shares.values()) + unredeemed == total,
        "balance >= held": balance >= held,
    }
    table = IncomeTable(
        block_number=block,
        revenue=sum(payers.values()),
        payers=payers,
        claimed=claimed,
        claimable={holder: amount // SCALE for holder, amount in accrued.items()},
        pending=sum(part // SCALE for part in pending),
        undistributed=balance - held,
        dust=held - claimable,
        roundings=sum(part % SCALE > 0 for part in parts) + remainder // SCALE,
        shares=shares,
        unredeemed=unredeemed,
        total_shares=total,
    )
    checks["0 <= dust <= roundings"] = 0 <= table.dust <= table.roundings
    wrong = [name for name, holds in checks.items() if not holds]
    if wrong:
        raise Misbehaviour(f"the books of {share} do not balance at block {block}: {'; '.join(wrong)}", evidence=wrong)
    return table


def _sums(pairs: Iterable[tuple[Account, int]]) -> dict[Account, int]:
    sums: dict[Account, int] = {}
    for account, amount in pairs:
        sums[account] = sums.get(account, 0) + amount
    return sums


def _topic(account: Account) -> bytes:
    return bytes(12) + bytes.fromhex(account[2:])
