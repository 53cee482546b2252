"""Purchases that never paid the run: cancelled, spent elsewhere under the same nonce, or signed by nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chain_support import NOW, WORKERS, World, in_one_transaction, key, local_world, sign_payment
from gate_world import BUYER, GateWorld, bought, voucher
from tessera.chain import abi
from tessera.core.errors import Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.typed_data import typed_digest
from tessera.serving.income.purchases import ChainPurchases
from tessera.serving.income.vouchers import Purchase, Terms

pytestmark = pytest.mark.anyio
ATTACKER = key("attacker")


class Market:
    """A worker's gate on a real chain, where the share contract is paid."""

    def __init__(self, world: World, terms: Terms) -> None:
        self.world, self.terms = world, terms
        self.purchases = ChainPurchases(world.chain, terms, WORKERS[1])
        self.gate = GateWorld(self.purchases, terms)

    async def serve(self, purchase: Purchase, number: int = 1) -> None:
        await self.gate.serve(voucher(number, purchase=purchase), 100)

    async def pay(self, purchase: Purchase, to: Account) -> None:
        """The buyer spends the purchase's nonce on a payment to `to`."""
        values = (purchase.payer, to, purchase.value, 0, purchase.valid_before, purchase.nonce)
        signature = await sign_payment(self.world.coin, BUYER, "TransferWithAuthorization", values)
        vrs = signature[64], signature[:32], signature[32:64]
        await self.world.coin.transferWithAuthorization(ATTACKER, *values, *vrs)


@pytest.fixture
async def market() -> Market:
    world = await local_world()
    await world.coin.mint(BUYER, BUYER.account, 10_000)
    coin = world.coin
    here = replace(
        GateWorld().terms, asset=coin.address, asset_name=await coin.name(), asset_version=await coin.version(),
        pay_to=world.share.address,
    )  # fmt: skip
    return Market(world, here)


async def test_a_good_purchase_is_served_before_and_after_it_is_settled(market: Market) -> None:
    open_one, paid_one = (bought(number=number, terms=market.terms) for number in (1, 2))
    await market.serve(open_one, 1)
    await market.pay(paid_one, market.terms.pay_to)
    assert await market.purchases.paid(paid_one, NOW)
    await market.serve(paid_one, 2)


async def test_a_worker_settles_what_nobody_settled(market: Market) -> None:
    purchase = bought(terms=market.terms)
    await market.serve(purchase)
    market.gate.clock.advance(10)
    await market.gate.gate.collect()
    assert await market.world.coin.balanceOf(market.terms.pay_to) == 1_000
    await market.purchases.collect(purchase)  # somebody was first: nothing happens, and nothing is paid twice
    assert await market.world.coin.balanceOf(market.terms.pay_to) == 1_000


async def test_a_cancelled_one_buys_nothing(market: Market) -> None:
    purchase = bought(terms=market.terms)
    digest_values = (BUYER.account, purchase.nonce)
    separator = await market.world.coin.DOMAIN_SEPARATOR()
    digest = typed_digest(separator, "CancelAuthorization(address authorizer,bytes32 nonce)", digest_values)
    signature = BUYER.sign_digest(digest)
    await market.world.coin.cancelAuthorization(
        ATTACKER, BUYER.account, purchase.nonce, signature[64], signature[:32], signature[32:64]
    )
    with pytest.raises(Refused, match="did not pay"):
        await market.serve(purchase)


async def test_a_nonce_that_paid_somebody_else_buys_nothing(market: Market) -> None:
    """The buyer signs the run one payment, and spends its nonce on another: to himself, beside an honest transfer."""
    purchase = bought(terms=market.terms)
    await market.world.coin.transfer(BUYER, market.terms.pay_to, purchase.value)
    await market.pay(purchase, ATTACKER.account)
    with pytest.raises(Refused, match="did not pay"):
        await market.serve(purchase)


async def test_a_nonce_and_a_payment_in_one_transaction_do_not_pass_for_each_other(market: Market) -> None:
    coin, purchase, other = market.world.coin, bought(terms=market.terms), bought(number=9, terms=market.terms)
    kinds = ("address", "address", "uint256", "uint256", "uint256", "bytes32", "uint8", "bytes32", "bytes32")
    selector = keccak(f"transferWithAuthorization({','.join(kinds)})".encode())[:4]
    calls = []
    for to, spent in ((ATTACKER.account, purchase), (market.terms.pay_to, other)):
        values = (BUYER.account, to, spent.value, 0, spent.valid_before, spent.nonce)
        signature = await sign_payment(coin, BUYER, "TransferWithAuthorization", values)
        vrs = (signature[64], signature[:32], signature[32:64])
        calls.append((coin.address, selector + abi.encode(kinds, (*values, *vrs))))
    await in_one_transaction(market.world.chain, ATTACKER, calls)
    with pytest.raises(Refused, match="did not pay"):
        await market.purchases.paid(purchase, NOW)
    assert await market.purchases.paid(other, NOW)


async def test_who_does_not_have_the_money_buys_nothing(market: Market) -> None:
    with pytest.raises(Refused, match="does not have"):
        await market.serve(bought(10_001, terms=market.terms))


async def test_what_is_signed_by_somebody_else_buys_nothing(market: Market) -> None:
    forged = replace(bought(payer=ATTACKER, terms=market.terms), payer=BUYER.account)
    with pytest.raises(Refused, match="is not"):
        await market.serve(forged)


async def test_what_ends_before_it_can_be_settled_buys_nothing(market: Market) -> None:
    market.gate.clock.advance(595)
    short = replace(bought(terms=market.terms), valid_before=NOW + 600).signed_by(BUYER, market.terms)
    paper = voucher(1, purchase=short, expires=NOW + 700)
    with pytest.raises(Refused, match="not valid now"):
        await market.gate.serve(paper, 1)
