"""First-depositor and donation games: money sent where nobody asked for it makes nobody richer but those it was due to.

Known from vaults that compute a price from their balance (ERC-4626 inflation, 2022), and from reward pools whose first
depositor took what had gathered before.
"""

from __future__ import annotations

import pytest

from chain_support import TERMS, WORKERS, World, key, local_world
from tessera.core.errors import Refused

pytestmark = pytest.mark.anyio
ATTACKER, VICTIM = key("attacker"), key("victim")


@pytest.fixture
async def world() -> World:
    return await local_world()


async def test_the_first_share_does_not_make_the_next_ones_worthless(world: World) -> None:
    """One unit of shares, then a donation that a vault would turn into a price: shares have none, each unit is one."""
    await world.give({ATTACKER.account: 1})
    await world.earn(10**12)
    await world.give({VICTIM.account: 10**18})
    assert await world.share.balanceOf(VICTIM.account) == 10**18
    await world.earn(10**18 + 1)
    assert await world.share.claimable(VICTIM.account) == 10**18
    assert await world.share.claimable(ATTACKER.account) == 10**12 + 1  # the donation went to whoever had shares


async def test_a_donation_just_before_an_epoch_is_shared_with_it_and_none_is_lost(world: World) -> None:
    """Undistributed money is spread over all shares that exist then: to keep others out, one distributes in time."""
    await world.give({ATTACKER.account: 1})
    await world.coin.mint(ATTACKER, world.share.address, 1_000)
    await world.share.distribute(key("anybody"))
    await world.give({VICTIM.account: 999})
    assert await world.share.claimable(ATTACKER.account) == 1_000
    assert await world.share.claimable(VICTIM.account) == 0
    await world.coin.mint(ATTACKER, world.share.address, 1_000)
    await world.share.distribute(key("anybody"))
    assert await world.share.claimable(VICTIM.account) == 999


async def test_shares_bought_for_one_moment_take_none_of_the_income_before_and_after(world: World) -> None:
    """Around a `distribute`, in and out: what was earned before stays with the sender, at both ends."""
    await world.give({VICTIM.account: 100})
    await world.earn(500)
    await world.share.transfer(VICTIM, ATTACKER.account, 100)
    await world.share.transfer(ATTACKER, VICTIM.account, 100)
    await world.earn(500)
    assert await world.share.claimable(ATTACKER.account) == 0
    assert await world.share.claimable(VICTIM.account) == 1_000


async def test_money_sent_to_the_run_is_nobodys_bond_and_moves_no_bond(world: World) -> None:
    """It cannot be told from a gift, and stays there for ever; the books do not count it."""
    await world.coin.mint(ATTACKER, world.run.address, 5 * TERMS.stake)
    assert await world.run.bonded() == 4 * TERMS.stake
    leaver = WORKERS[1]
    await world.change(leaver=leaver.account)
    await world.wait(TERMS.delay_s)
    await world.run.withdraw(ATTACKER, leaver.account)
    assert await world.coin.balanceOf(leaver.account) == TERMS.stake
    for stranger in (ATTACKER, leaver):
        with pytest.raises(Refused, match="nothing to withdraw"):
            await world.run.withdraw(stranger, stranger.account)
    await world.bond(key("joiner"))  # the gift in the balance does not disturb whoever bonds
    assert await world.coin.balanceOf(world.run.address) == 9 * TERMS.stake


async def test_an_epoch_without_shares_does_not_take_income(world: World) -> None:
    """All shares of an epoch nobody can redeem would earn for ever: an empty epoch has none."""
    signatures = [k.sign_digest((await world.consent()).epoch(0, 0, bytes(32), 0)) for k in WORKERS]
    receipt = await world.run.propose(ATTACKER, 0, bytes(32), 0, signatures)
    (proposed,) = [world.run.Proposed.decode(log) for log in receipt.logs]
    await world.run.post(ATTACKER, 0, bytes(32), 0, proposed.opens_at)
    await world.coin.mint(ATTACKER, world.share.address, 100)
    await world.share.distribute(ATTACKER)
    assert (await world.share.held(), await world.share.undistributed()) == (0, 100)
    await world.give({VICTIM.account: 7})
    await world.share.distribute(ATTACKER)
    assert await world.share.claimable(VICTIM.account) == 99  # 100, and a fraction stays in the remainder
