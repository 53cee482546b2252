"""A voucher of another run, another chain or another time; and one whose words were changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chain_support import CHAIN_ID, NOW
from gate_world import GATEWAY, OTHER_GATEWAY, GateWorld, bought, voucher
from tessera.core.errors import Refused
from tessera.core.ids import RunId
from tessera.serving.income.vouchers import Voucher

pytestmark = pytest.mark.anyio
CHANGES = [
    ({"run_id": RunId("66" * 32)}, "not its gateway's"),  # what travels has no run: the worker checks for his own
    ({"chain_id": CHAIN_ID + 1}, "not its gateway's"),
    ({"expires": NOW}, "ends at"),
    ({"expires": NOW + 3_601}, "ends at"),
]


@pytest.mark.parametrize(("changes", "reason"), CHANGES)
async def test_it_opens_nothing_here(changes: dict[str, object], reason: str) -> None:
    world = GateWorld()
    with pytest.raises(Refused, match=reason):
        await world.serve(voucher(**changes), 1)
    assert world.book.session(voucher().session) is None


@pytest.mark.parametrize(
    "change", [{"tokens": 101}, {"expires": NOW + 301}, {"purchase": bought(2_000, 1)}, {"gateway": OTHER_GATEWAY.id}]
)
async def test_words_that_were_changed_after_signing_open_nothing(change: dict[str, object]) -> None:
    forged: Voucher = replace(voucher(), **change)
    with pytest.raises(Refused, match="not its gateway's"):
        await GateWorld().serve(forged, 1)


async def test_a_purchase_signed_on_another_chain_buys_nothing() -> None:
    world = GateWorld()
    elsewhere = bought(terms=replace(world.terms, chain_id=CHAIN_ID + 1))
    with pytest.raises(Refused, match="is not"):
        await world.serve(voucher(purchase=elsewhere), 1)
    assert GATEWAY.id in (world.gateways or ())
