"""A gateway's operator who takes cash, and lets the workers decode for it without income to their run."""

from __future__ import annotations

import pytest

from chain_support import key
from gate_world import BUYER, GATEWAY, TERMS, GateWorld, bought, voucher
from tessera.core.errors import PaymentRequired, Refused
from tessera.core.signing import PeerKey

pytestmark = pytest.mark.anyio


async def test_a_session_without_a_voucher_is_not_served() -> None:
    with pytest.raises(PaymentRequired):
        await GateWorld().gate.admit(GATEWAY.id, None)


async def test_a_payment_to_the_operator_himself_buys_nothing() -> None:
    his = bought(terms=type(TERMS)(**{**_fields(), "pay_to": key("operator").account}))
    with pytest.raises(Refused, match="is not"):
        await GateWorld().serve(voucher(purchase=his), 1)


async def test_a_payment_in_another_coin_buys_nothing() -> None:
    worthless = bought(terms=type(TERMS)(**{**_fields(), "asset": key("own coin").account}))
    with pytest.raises(Refused, match="is not"):
        await GateWorld().serve(voucher(purchase=worthless), 1)


async def test_a_payment_below_the_price_buys_less() -> None:
    world = GateWorld()
    with pytest.raises(Refused, match="99 units, 10 more asked for"):
        await world.serve(voucher(1, 10, purchase=bought(99)), 1)
    await world.serve(voucher(2, 9, purchase=bought(99)), 9)


async def test_what_is_never_settled_is_settled_by_the_worker_or_lost_once() -> None:
    """The operator shows each buyer's payment to the workers, takes cash, and never settles."""
    world = GateWorld()
    await world.serve(voucher(1, purchase=bought(number=1)), 100)
    world.clock.advance(10)
    await world.gate.collect()
    assert world.purchases.on_chain == {bought(number=1).name}
    for number in (2, 3, 4):  # his buyers move their money away while they are served
        await world.serve(voucher(number, purchase=bought(number=number)), 100)
        world.sign(number, 100)
        world.purchases.poor = frozenset({BUYER.account})
        world.clock.advance(10)
        await world.gate.collect()
        world.purchases.poor = frozenset()
    with pytest.raises(Refused, match="never paid"):
        await world.serve(voucher(5, purchase=bought(number=5)), 1)


async def test_a_stranger_who_is_no_gateway_of_the_run_is_not_served() -> None:
    stranger = PeerKey.generate()
    with pytest.raises(Refused, match="none of this run's"):
        await GateWorld().serve(voucher(by=stranger), 1)


def _fields() -> dict[str, object]:
    return {name: getattr(TERMS, name) for name in TERMS.__dataclass_fields__}
