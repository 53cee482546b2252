"""Keys are stolen: the agent's, the operator's session, the co-signer's, and all of them at once.

Known from AIXBT (March 2025): the thief was in the operators' dashboard, not in the agent, and nothing bound the
operators. What he gets here is what the mandate allows to whom it allows, and nothing for himself.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from spend_world import (
    AGENT,
    CHILD,
    COSIGNER,
    DAY,
    FUNDS,
    HOUR,
    LABEL,
    OPERATOR,
    OTHER_PAYEE,
    OWNER,
    PAYEE,
    THIEF,
    Spending,
    spending_world,
)
from tessera.chain.spending import child_id, mandate_id
from tessera.core.errors import Conflict, Missing, Refused, TesseraError
from tessera.core.signing import AccountKey
from tessera.incentives.spend_twin import NO_ONE

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world() -> Spending:
    return await spending_world()


async def drain(world: Spending, hours: Sequence[int], cosigner: AccountKey | None = None) -> list[tuple[int, int]]:
    """What a thief with the agent's key gets out, taking all he can at these hours: (hour, amount)."""
    taken, start = [], world.now
    for hour in hours:
        world.wait(start + hour * HOUR - world.now)
        for amount in (100, 60, 40, 10):
            try:
                await world.pay(AGENT, cosigner=cosigner, amount=amount)
            except Refused:
                continue
            taken.append((hour, amount))
    return taken


def most_within(taken: list[tuple[int, int]], hours: int) -> int:
    return max(sum(amount for when, amount in taken if start <= when <= start + hours) for start, _ in taken)


@pytest.mark.parametrize("cosigner", [None, COSIGNER])
async def test_with_the_agents_key_no_day_is_worse_than_the_cap(world: Spending, cosigner: AccountKey | None) -> None:
    taken = await drain(world, [0, 23, 24, 27, 28, 52], cosigner)
    assert 250 < sum(amount for _, amount in taken) == FUNDS - await world.left()
    assert most_within(taken, 24) <= 250
    assert await world.coin.balanceOf(THIEF.account) == 0


async def test_with_the_agents_key_nothing_reaches_the_thief(world: Spending) -> None:
    with pytest.raises(Refused, match="payee is not listed"):
        await world.pay(payee=THIEF.account)
    child = await world.delegate(world.mandate, AGENT, THIEF, world.limits(any_payee=True, per_period=10**6))
    with pytest.raises(Refused, match="payee is not listed"):
        await world.pay(THIEF, mandate=child, payee=THIEF.account)
    with pytest.raises(Refused, match="not owner or operator"):
        await world.policy.propose(AGENT, world.mandate, world.limits(any_payee=True), [])


async def test_many_children_get_no_more_than_their_parent(world: Spending) -> None:
    for number in range(4):
        label = bytes([number]) * 32
        await world.policy.delegate(AGENT, world.mandate, label, CHILD.account, DAY, world.limits(), [PAYEE])
    for number in [0, 1, 2, 3, 0]:
        await world.pay(CHILD, mandate=child_id(world.mandate, bytes([number]) * 32))
    for number in range(4):
        with pytest.raises(Refused, match="above the cap per period"):
            await world.pay(CHILD, mandate=child_id(world.mandate, bytes([number]) * 32), amount=1)
    assert await world.left() == FUNDS - 250


async def test_with_the_operators_session_nothing_moves_at_all(world: Spending) -> None:
    with pytest.raises(TesseraError, match="not the agent's signature"):
        await world.pay(OPERATOR)
    with pytest.raises(Refused, match="not the agent"):
        await world.delegate(world.mandate, OPERATOR, THIEF)
    await world.policy.open(OPERATOR, LABEL, world.terms(agent=THIEF.account, operator=NO_ONE), world.limits(), [PAYEE])
    with pytest.raises(
        Refused, match="amount exceeds allowance"
    ):  # over the operator's own money, of which there is none
        await world.pay(THIEF, mandate=mandate_id(OPERATOR.account, LABEL))
    assert await world.left() == FUNDS


async def test_with_every_key_but_the_owners_the_limits_hold_through_the_delay(world: Spending) -> None:
    """The owner sees the proposal, and has two days to end it all."""
    anything = world.limits(per_payment=FUNDS, per_period=FUNDS, cosign_above=FUNDS, any_payee=True)
    await world.policy.propose(OPERATOR, world.mandate, anything, [THIEF.account])
    taken = await drain(world, [0, 24, 47], COSIGNER)
    with pytest.raises(Refused, match="proposal is not yet due"):
        await world.policy.loosen(THIEF, world.mandate, anything, [THIEF.account])
    with pytest.raises(Refused, match="payee is not listed"):
        await world.pay(payee=THIEF.account, cosigner=COSIGNER)
    assert most_within(taken, 24) <= 250
    await world.policy.revoke(OWNER, world.mandate)
    world.wait(2 * DAY)
    await world.policy.loosen(THIEF, world.mandate, anything, [THIEF.account])
    with pytest.raises(Refused, match="mandate is revoked"):
        await world.pay(payee=THIEF.account)
    assert await world.coin.balanceOf(THIEF.account) == 0


async def test_even_a_delay_that_nobody_watched_ends_at_the_owners_allowance(world: Spending) -> None:
    await world.coin.approve(OWNER, world.policy.address, 300)
    anything = world.limits(per_payment=FUNDS, per_period=FUNDS, cosign_above=FUNDS, any_payee=True)
    await world.policy.propose(OPERATOR, world.mandate, anything, [])
    world.wait(2 * DAY)
    await world.policy.loosen(THIEF, world.mandate, anything, [])
    with pytest.raises(Refused, match="amount exceeds allowance"):
        await world.pay(payee=OTHER_PAYEE, amount=301)
    await world.pay(payee=OTHER_PAYEE, amount=300)
    assert await world.left() == FUNDS - 300


async def test_the_owner_drops_a_thiefs_proposal_without_ending_the_mandate(world: Spending) -> None:
    anything = world.limits(any_payee=True)
    await world.policy.propose(OPERATOR, world.mandate, anything, [])
    await world.policy.tighten(OWNER, world.mandate, world.limits(), [])
    world.wait(2 * DAY)
    with pytest.raises(Missing, match="no such proposal"):
        await world.policy.loosen(THIEF, world.mandate, anything, [])
    await world.pay()


async def test_an_ended_mandate_does_not_come_back_under_its_id(world: Spending) -> None:
    await world.policy.open(OWNER, LABEL, world.terms(), world.limits(), [PAYEE])
    await world.policy.revoke(OWNER, mandate_id(OWNER.account, LABEL))
    with pytest.raises(Conflict, match="label is taken"):
        await world.policy.open(OWNER, LABEL, world.terms(), world.limits(), [PAYEE])


async def test_payments_signed_before_the_end_do_not_outlive_it(world: Spending) -> None:
    """A thief may keep signatures and send them later."""
    kept = [world.payment(valid_before=2**40) for _ in range(3)]
    await world.policy.revoke(AGENT, world.mandate)
    for payment in kept:
        with pytest.raises(Refused, match="mandate is revoked"):
            await world.send(payment, world.sign(payment))
    assert await world.left() == FUNDS
