"""Metered payments that are settled for less than was served, or never.

Only the gateway can settle them, and a buyer who is its friend asks for no more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from chain_support import NOW, WORKERS, key, local_world
from gate_world import BUYER, VALID_S, GateWorld, bought, voucher
from permit2_support import FACILITATOR, signed
from tessera.chain import genesis
from tessera.chain.faces import X402UptoProxy
from tessera.core.errors import Refused
from tessera.serving.income import vouchers
from tessera.serving.income.gate import GateLimits
from tessera.serving.income.purchases import ChainPurchases
from tessera.serving.income.vouchers import Purchase, Terms

pytestmark = pytest.mark.anyio


def metered(number: int, terms: Terms, value: int = 1_000) -> Purchase:
    plain = bought(value, number, terms=terms, facilitator=FACILITATOR.account, valid_before=NOW + 600)
    return plain.signed_by(BUYER, terms)


def limits() -> GateLimits:
    return GateLimits(unsigned_tokens=10_000, unpaid_tokens=250, grace_s=5)


async def test_what_was_settled_for_less_than_was_served_counts_as_unpaid() -> None:
    world = GateWorld(limits=limits())
    for number in range(3):
        purchase = metered(number, world.terms)
        await world.serve(voucher(number, purchase=purchase), 100)  # worth 1,000 units
        world.sign(number, 100)
        world.purchases.settled[BUYER.account] = number + 1  # one unit each
        world.clock.advance(6)
        await world.gate.collect()
    with pytest.raises(Refused, match="never paid"):
        await world.serve(voucher(9, purchase=metered(9, world.terms)), 1)
    world.purchases.settled[BUYER.account] = 3_000  # made good
    world.clock.advance(6)
    await world.gate.collect()
    await world.serve(voucher(9, purchase=metered(9, world.terms)), 1)


async def test_what_was_never_settled_is_lost_for_ever() -> None:
    world = GateWorld(limits=limits())
    for number in range(3):
        await world.serve(voucher(number, purchase=metered(number, world.terms)), 100)
        world.sign(number, 100)
    world.clock.advance(700)
    await world.gate.collect()
    fresh = replace(metered(9, world.terms), valid_before=NOW + 1_200).signed_by(BUYER, world.terms)
    with pytest.raises(Refused, match="never paid"):
        await world.serve(voucher(9, purchase=fresh, expires=NOW + 900), 1)


async def test_an_honest_meter_is_found_on_the_chain() -> None:
    """As the official client signs it, and x402's proxy settles it."""
    world = await local_world()
    coin, proxy = world.coin, X402UptoProxy(world.chain, genesis.UPTO_PROXY)
    await coin.mint(BUYER, BUYER.account, 10_000)
    here = replace(
        GateWorld().terms, asset=coin.address, asset_name=await coin.name(), asset_version=await coin.version(),
        pay_to=world.share.address,
    )  # fmt: skip
    paper = signed(coin.address, "upto", signer=BUYER, to=world.share.address, deadline=NOW + VALID_S)
    (_, most), nonce, deadline = paper.permit
    purchase = Purchase(
        BUYER.account, most, 0, deadline, nonce.to_bytes(32, "big"), paper.signature, FACILITATOR.account
    )
    market = GateWorld(ChainPurchases(world.chain, here, WORKERS[1]), here, limits=limits())
    with pytest.raises(Refused, match="not approved"):
        await market.serve(voucher(1, purchase=purchase), 1)
    await coin.approve(BUYER, genesis.PERMIT2, 2**256 - 1)
    await market.serve(voucher(2, purchase=purchase), 60)
    await proxy.settle(FACILITATOR, paper.permit, 600, paper.owner, paper.witness, paper.signature)
    await coin.transfer(BUYER, world.share.address, 99)  # some other payment is no settlement
    assert await market.purchases.metered(BUYER.account) == 600
    market.clock.advance(6)
    await market.gate.collect()
    assert not market.gate._open
    market.sign(2, 60)
    with pytest.raises(Refused, match="settled or crossed out"):
        await market.serve(voucher(3, 40, purchase=purchase), 1)


def test_permit2_and_its_proxy_are_where_every_chain_has_them() -> None:
    assert (vouchers.PERMIT2, vouchers.UPTO_PROXY) == (genesis.PERMIT2, genesis.UPTO_PROXY)


async def test_a_stranger_cannot_sign_for_the_payer() -> None:
    world = GateWorld()
    forged = replace(metered(1, world.terms), payer=key("rich").account)
    with pytest.raises(Refused, match="is not"):
        await world.serve(voucher(purchase=forged), 1)
