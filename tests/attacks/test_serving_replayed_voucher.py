"""One voucher, shown again: for the same session, for another, by another gateway, or at other replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gate_world import GATEWAY, OTHER_GATEWAY, RUN_ID, TERMS, WORKER, GateWorld, bought, voucher
from tessera.core.errors import Refused
from tessera.serving.income.receipts import Receipt, credited, overdrawn

pytestmark = pytest.mark.anyio


async def test_a_session_that_was_signed_for_does_not_begin_again() -> None:
    world = GateWorld()
    await world.serve(voucher(1), 50)
    world.sign(1, 50)
    with pytest.raises(Refused, match="served already"):
        await world.serve(voucher(1), 50)


async def test_a_session_cannot_change_its_voucher() -> None:
    world = GateWorld()
    await world.serve(voucher(1, 10), 10)
    with pytest.raises(Refused, match="served already"):
        await world.serve(voucher(1, 90), 90)


async def test_another_gateway_cannot_use_what_it_saw() -> None:
    world = GateWorld()
    seen = voucher(1)
    with pytest.raises(Refused, match="another gateway's"):
        await world.gate.admit(OTHER_GATEWAY.id, seen.to_value())
    await world.serve(seen, 10)
    with pytest.raises(Refused, match="another gateway draws"):
        await world.serve(voucher(2, 10, by=OTHER_GATEWAY), 10)


async def test_at_two_replicas_a_purchase_serves_twice_and_the_vouchers_show_it() -> None:
    """Each replica counts for itself, so the second cannot know. Afterwards both vouchers are evidence, and together
    they are paid for no more than was bought."""
    here, there = GateWorld(), GateWorld()
    papers = [voucher(1), voucher(2)]
    await here.serve(papers[0], 100)
    await there.serve(papers[1], 100)
    assert overdrawn(TERMS, papers[:1]) == {}
    assert overdrawn(TERMS, papers) == {bought().name: papers}
    other = replace(WORKER, seed=bytes(32))
    receipts = [
        Receipt(RUN_ID, paper.session, worker.id, GATEWAY.id, 100).signed_by(GATEWAY)
        for paper, worker in zip(papers, (WORKER, other), strict=True)
    ]
    assert credited(TERMS, papers, receipts, {WORKER.id: 0, other.id: 0}, 1) == {WORKER.id: 50, other.id: 50}
