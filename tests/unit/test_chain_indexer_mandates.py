"""What the index tells of spending mandates is what the contract allows and has paid."""

from __future__ import annotations

import pytest

from spend_world import AGENT, CHILD, COSIGNER, DAY, OPERATOR, OTHER_PAYEE, OWNER, PAYEE, Spending, spending_world
from tessera.chain.face import decode_events
from tessera.chain.faces import SpendPolicy
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.spend_policy import SPEND_POLICY, MandateView

pytestmark = pytest.mark.anyio


async def told_of(world: Spending) -> tuple[Indexer, MandateView]:
    index = Indexer(None, world.policy.chain, [SPEND_POLICY.at(world.policy.address)])
    await index.update()
    return index, MandateView(index.queries)


async def test_a_mandate_is_told_as_the_contract_has_it() -> None:
    world = await spending_world()
    mandate = "0x" + world.mandate.hex()
    await world.policy.tighten(OPERATOR, world.mandate, world.limits(per_payment=80), [PAYEE])
    index, view = await told_of(world)
    told = view.mandate(mandate)
    assert told is not None
    stored, limits = await world.policy.mandates(world.mandate), await world.policy.limits(world.mandate)
    assert (told.owner, told.agent, told.operator, told.cosigner, told.asset) == (
        stored.owner,
        stored.agent,
        stored.operator,
        stored.cosigner,
        stored.asset,
    )
    assert (told.period_s, told.delay_s, told.parent) == (stored.period, stored.delay, "")
    assert (told.per_payment, told.per_period, told.cosign_above, told.expires_at, told.any_payee) == tuple(limits)
    assert (told.payees, told.revoked, told.spent.amount) == ((), False, 0)
    assert view.mandate("0x" + "77" * 32) is None
    index.close()


async def test_mandates_are_found_by_owner_and_agent_and_say_when_they_are_revoked() -> None:
    world = await spending_world()
    mandate = "0x" + world.mandate.hex()
    child = "0x" + (await world.delegate(world.mandate, AGENT, CHILD)).hex()
    await world.policy.revoke(OWNER, world.mandate)
    index, view = await told_of(world)
    assert [told.id for told in view.mandates(agent=AGENT.account)] == [mandate]
    assert [(told.id, told.parent) for told in view.mandates(agent=CHILD.account)] == [(child, mandate)]
    assert {told.id: told.revoked for told in view.mandates(owner=OWNER.account)} == {mandate: True, child: False}
    assert view.children(mandate) == [child]
    assert view.mandates(owner=COSIGNER.account) == []
    index.close()


async def test_spending_is_told_by_period_with_the_childrens() -> None:
    world = await spending_world()
    child = await world.delegate(world.mandate, AGENT, CHILD)
    world.wait(-world.now % DAY)
    await world.pay()
    await world.pay(CHILD, mandate=child, amount=30)
    world.wait(DAY)
    await world.pay(amount=70, cosigner=COSIGNER)
    index, view = await told_of(world)
    mandate = "0x" + world.mandate.hex()
    first, second = view.periods(mandate)
    assert (first.amount, second.amount, second.start - first.start) == (80, 70, DAY)
    assert [payment.amount for payment in view.payments(mandate)] == [70, 50]
    assert view.received(PAYEE).amount == await world.coin.balanceOf(PAYEE) == 150
    assert view.received(OTHER_PAYEE).count == 0
    receipt = await world.policy.chain.receipt(second.payments[0].tx_hash)  # type: ignore[attr-defined]
    (spent,) = decode_events(SpendPolicy.Spent, world.policy.address, receipt)
    assert "0x" + spent.intent.hex() == second.payments[0].intent
    told = view.mandate(mandate)
    assert told is not None
    assert (told.spent.amount, told.spent.count) == (120, 2)
    assert view.periods("0x" + "77" * 32) == []
    index.close()
