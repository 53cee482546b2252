"""The share contract beside its exact twin, through any sequence of actions of ten holders.

Invariants, after every action:
- supply = balances + unredeemed;
- the contract never owes more than it holds;
- nobody is ever overpaid, and nobody is ever short by a unit or more;
- the books balance exactly, dust is less than one unit for each rounding; the coin's total is conserved.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from chain_support import RUN_ID, key
from contract_vm import Deployed, Reverted, Vm
from fuzzing import FUZZ, explore
from tessera.chain.world import World
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.incentives.share_twin import Leaf, ShareTwin

SCALE = 2**128
HOLDERS = [key(f"holder {i}").account for i in range(10)]
shares = st.one_of(st.integers(1, 10), st.integers(1, 10**24))
holders = st.integers(0, len(HOLDERS) - 1).map(HOLDERS.__getitem__)


@cache
def base() -> tuple[World, Deployed, Deployed]:
    """A state with a coin, and a share that this coin's account may issue: a contract, as an issuer must be."""
    vm = Vm()
    coin = Deployed.new(vm, "coin")
    share = Deployed.new(vm, "model_share", "M", "M", coin.address, bytes.fromhex(RUN_ID), coin.address)
    return vm.freeze(), coin, share


class Shares(RuleBasedStateMachine):
    """Ten holders, one coin, one issuer."""

    @initialize()
    def begin(self) -> None:
        world, coin, share = base()
        vm = Vm(world)
        self.coin, self.share = Deployed(vm, "coin", coin.address), Deployed(vm, "model_share", share.address)
        self.twin = ShareTwin()
        self.proofs: dict[int, list[bytes]] = {}
        self.revenue = 0

    @rule(amounts=st.dictionaries(holders, shares, max_size=6))
    def post(self, amounts: dict[str, int]) -> None:
        epoch = self.twin.epochs
        posted = self.twin.post(dict(amounts))
        root = bytes(32)
        if posted:
            tree = MerkleTree([share_leaf(epoch, leaf.holder, leaf.shares) for leaf in posted])
            root = tree.root
            self.proofs |= {id(leaf): tree.proof(index) for index, leaf in enumerate(posted)}
        self.share("post", epoch, root, sum(amounts.values()), sender=self.coin.address)
        with pytest.raises(Reverted, match="model_share: not the next epoch"):
            self.share("post", epoch, root, sum(amounts.values()), sender=self.coin.address)

    @rule(holder=holders)
    def post_by_another(self, holder: Any) -> None:
        with pytest.raises(Reverted, match="model_share: not the issuer"):
            self.share("post", self.twin.epochs, bytes(32), 1, sender=holder)

    @precondition(lambda self: self.twin.leaves)
    @rule(data=st.data())
    def redeem(self, data: st.DataObject) -> None:
        leaf: Leaf = self.twin.leaves[data.draw(st.integers(0, len(self.twin.leaves) - 1))]
        self.share("redeem", leaf.epoch, leaf.holder, leaf.shares, self.proofs[id(leaf)])
        self.twin.redeem(leaf)
        with pytest.raises(Reverted, match="model_share: already redeemed"):
            self.share("redeem", leaf.epoch, leaf.holder, leaf.shares, self.proofs[id(leaf)])

    @rule(amount=st.one_of(st.integers(0, 20), st.integers(0, 10**15)))
    def receive(self, amount: int) -> None:
        self.coin("mint", self.share.address, amount)
        self.twin.receive(amount)
        self.revenue += amount

    @rule()
    def distribute(self) -> None:
        assert self.share("distribute") == self.twin.distribute()

    @rule(sender=holders, receiver=holders, part=st.fractions(0, 1), too_much=st.booleans())
    def transfer(self, sender: Any, receiver: Any, part: Any, too_much: bool) -> None:
        balance = self.twin.balances.get(sender, 0)
        if too_much:
            with pytest.raises(Reverted, match="model_share: balance too small"):
                self.share("transfer", receiver, balance + 1, sender=sender)
        amount = int(balance * part)
        self.share("transfer", receiver, amount, sender=sender)
        self.twin.transfer(sender, receiver, amount)

    @rule(holder=holders, for_other=st.booleans())
    def claim(self, holder: Any, for_other: bool) -> None:
        before = self.coin.read("balanceOf", holder)
        paid = self.share("claim", holder) if for_other else self.share("claim", sender=holder)
        assert self.coin.read("balanceOf", holder) == before + paid
        self.twin.claim(holder, paid)  # refuses to overpay

    @invariant()
    def supply_is_balances_and_unredeemed(self) -> None:
        balances = [self.share.read("balanceOf", account) for account in HOLDERS]
        assert balances == [self.twin.balances.get(account, 0) for account in HOLDERS]
        assert self.share.read("totals") % SCALE == sum(balances) + self.twin.unredeemed == self.twin.supply

    @invariant()
    def everybody_is_owed_their_exact_part(self) -> None:
        """Never above it, and short by less than a millionth of a unit, which the remainder holds."""
        for account in HOLDERS:
            short = self.twin.due.get(account, 0) * SCALE - self.accrued(account)
            assert 0 <= short / SCALE < 10**-6

    @invariant()
    def the_books_balance(self) -> None:
        held, balance = self.share.read("held"), self.coin.read("balanceOf", self.share.address)
        parts = [self.accrued(account) for account in HOLDERS]
        parts += [self.pending(epoch) for epoch in range(self.twin.epochs)]
        assert sum(parts) + self.share.read("accrual.remainder") == held * SCALE
        unclaimed = sum(part // SCALE for part in parts)
        dust = held - unclaimed
        assert balance >= held >= unclaimed
        assert 0 <= dust <= sum(part % SCALE > 0 for part in parts)  # the remainder is far below one unit
        assert self.twin.paid + unclaimed + (balance - held) + dust == self.revenue
        assert held == self.twin.held
        assert balance + sum(self.coin.read("balanceOf", a) for a in HOLDERS) == self.coin.read("totalSupply")

    def accrued(self, holder: str) -> int:
        """From storage, as the view of that name computes it."""
        since = self.share.read("accrual.index") - self.share.read("accrual.at", holder)
        weight = self.share.read("balanceOf", holder)
        return self.share.read("accrual.owed", holder) + weight * since

    def pending(self, epoch: int) -> int:
        unredeemed, since = (self.share.read("epochs", epoch, field=field) for field in (1, 2))
        return unredeemed * (self.share.read("accrual.index") - since)

    def teardown(self) -> None:
        """At the end, the views say what the storage says."""
        if not hasattr(self, "share"):
            return
        for holder in HOLDERS[:3]:
            assert self.share("accrued", holder) == self.accrued(holder)
            owed = self.twin.owed_down(holder)
            assert owed - 1 <= self.share("claimable", holder) <= owed
        for epoch in range(self.twin.epochs)[:3]:
            assert self.share("pending", epoch) == self.pending(epoch)
        assert self.share("undistributed") == self.twin.arrived


def test_the_contract_agrees_with_its_twin() -> None:
    explore(Shares, examples=6, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(900 * FUZZ)
def test_the_contract_agrees_with_its_twin_for_long() -> None:
    explore(Shares, examples=200 * FUZZ, steps=50)
