"""The share contract beside its exact twin, through any sequence of actions.

Invariants, after every action:
- supply = balances + unredeemed;
- the contract never owes more than it holds;
- nobody is ever overpaid, and nobody is ever short by a unit or more;
- the books balance exactly, dust is less than one unit for each rounding.
"""

from __future__ import annotations

from typing import Any

import boa
import pytest
from boa.environment import Env
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chain_support import ROOT, RUN_ID, WORKERS, key
from tessera.chain.settle import NOBODY
from tessera.core.errors import TesseraError
from tessera.core.ids import Account
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.incentives.share_twin import Leaf, ShareTwin

SCALE = 2**128
shares = st.one_of(st.integers(1, 10), st.integers(1, 10**24))
_compiled: dict[str, Any] = {}


def deployer(name: str) -> Any:
    if name not in _compiled:
        _compiled[name] = boa.load_partial(str(ROOT / "contracts" / f"{name}.vy"))
    return _compiled[name]


class Shares(RuleBasedStateMachine):
    """Five holders, four workers, one coin."""

    def __init__(self) -> None:
        super().__init__()
        self._anchor = boa.env.anchor()
        self._anchor.__enter__()

    def teardown(self) -> None:
        self._anchor.__exit__(None, None, None)

    @initialize()
    def deploy(self) -> None:
        self.coin = deployer("coin").deploy()
        accounts = [k.account for k in WORKERS]
        self.share = deployer("model_share").deploy("M", "M", self.coin, bytes.fromhex(RUN_ID), accounts)
        self.workers = list(WORKERS)
        self.joined = 0
        self.who = [Account(boa.env.generate_address(f"holder {i}")) for i in range(5)]
        self.twin = ShareTwin(workers=set(accounts))
        self.proofs: dict[int, list[bytes]] = {}
        self.revenue = 0

    @rule(amounts=st.lists(shares, min_size=1, max_size=5))
    def post(self, amounts: list[int]) -> None:
        epoch = self.twin.epochs
        posted = self.twin.post(dict(zip(self.who, amounts, strict=False)))
        tree = MerkleTree([share_leaf(epoch, Account(leaf.holder), leaf.shares) for leaf in posted])
        digest = self.share.digest(epoch, tree.root, sum(amounts))
        self.share.post(epoch, tree.root, sum(amounts), self.signatures(digest))
        for index, leaf in enumerate(posted):
            self.proofs[id(leaf)] = tree.proof(index)

    def signatures(self, digest: bytes) -> list[bytes]:
        """Of just more than two thirds of the present workers."""
        signers = sorted(self.workers, key=lambda k: int(k.account, 16))[: 2 * len(self.workers) // 3 + 1]
        return [k.sign_digest(digest) for k in signers]

    @rule(joins=st.booleans(), leaves=st.booleans(), who=st.integers(0, 100))
    def change(self, joins: bool, leaves: bool, who: int) -> None:
        joiner = key(f"joiner {self.joined}") if joins else None
        leaver = self.workers[who % len(self.workers)] if leaves else None
        number = self.share.change_count()
        named = [NOBODY if one is None else one.account for one in (joiner, leaver)]
        signatures = self.signatures(self.share.change_digest(number, *named))
        try:
            self.twin.change(joiner and joiner.account, leaver and leaver.account)
        except TesseraError:
            with boa.reverts():
                self.share.change(number, *named, signatures)
            return
        self.share.change(number, *named, signatures)
        with boa.reverts("model_share: not the next change"):
            self.share.change(number, *named, signatures)
        self.joined += joins
        self.workers = [k for k in self.workers if k is not leaver] + ([joiner] if joiner else [])

    @invariant()
    def the_workers_are_who_came_and_has_not_gone(self) -> None:
        present = [self.share.workers(place) for place in range(self.share.worker_count())]
        assert len(present) == len(set(present))
        assert set(present) == self.twin.workers == {k.account for k in self.workers}
        assert all(self.share.is_worker(k.account) == (k.account in self.twin.workers) for k in WORKERS)

    @precondition(lambda self: self.twin.leaves)
    @rule(data=st.data())
    def redeem(self, data: st.DataObject) -> None:
        leaf: Leaf = self.twin.leaves[data.draw(st.integers(0, len(self.twin.leaves) - 1))]
        self.share.redeem(leaf.epoch, leaf.holder, leaf.shares, self.proofs[id(leaf)])
        self.twin.redeem(leaf)
        with boa.reverts("model_share: already redeemed"):
            self.share.redeem(leaf.epoch, leaf.holder, leaf.shares, self.proofs[id(leaf)])

    @rule(amount=st.one_of(st.integers(0, 20), st.integers(0, 10**15)))
    def receive(self, amount: int) -> None:
        self.coin.mint(self.share, amount)
        self.twin.receive(amount)
        self.revenue += amount

    @rule()
    def distribute(self) -> None:
        assert self.share.distribute() == self.twin.distribute()

    @rule(sender=st.integers(0, 4), receiver=st.integers(0, 4), part=st.fractions(0, 1))
    def transfer(self, sender: int, receiver: int, part: Any) -> None:
        source, target = self.who[sender], self.who[receiver]
        amount = int(self.twin.balances.get(source, 0) * part)
        self.share.transfer(target, amount, sender=source)
        self.twin.transfer(source, target, amount)

    @rule(holder=st.integers(0, 4), for_other=st.booleans())
    def claim(self, holder: int, for_other: bool) -> None:
        account = self.who[holder]
        before = self.coin.balanceOf(account)
        paid = self.share.claim(account) if for_other else self.share.claim(sender=account)
        assert self.coin.balanceOf(account) == before + paid
        self.twin.claim(account, paid)  # refuses to overpay

    @invariant()
    def supply_is_balances_and_unredeemed(self) -> None:
        balances = [self.share.balanceOf(account) for account in self.who]
        assert balances == [self.twin.balances.get(account, 0) for account in self.who]
        assert self.share.totalSupply() == sum(balances) + self.twin.unredeemed == self.twin.supply

    @invariant()
    def everybody_is_owed_their_exact_part(self) -> None:
        """Never above it, and short by less than a millionth of a unit, which the remainder holds."""
        for account in self.who:
            short = self.twin.due.get(account, 0) * SCALE - self.share.accrued(account)
            assert 0 <= short / SCALE < 10**-6
            assert self.twin.owed_down(account) - 1 <= self.share.claimable(account) <= self.twin.owed_down(account)

    @invariant()
    def the_books_balance(self) -> None:
        held, balance = self.share.held(), self.coin.balanceOf(self.share)
        parts = [self.share.accrued(account) for account in self.who]
        parts += [self.share.pending(epoch) for epoch in range(self.twin.epochs)]
        assert sum(parts) + self.share.remainder() == held * SCALE
        unclaimed = sum(part // SCALE for part in parts)
        dust = held - unclaimed
        assert balance >= held >= unclaimed
        assert 0 <= dust <= sum(part % SCALE > 0 for part in parts)  # the remainder is far below one unit
        assert self.twin.paid + unclaimed + (balance - held) + dust == self.revenue
        assert held == self.twin.held


def run(examples: int, steps: int) -> None:
    with boa.swap_env(Env()):
        limits = settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        )
        run_state_machine_as_test(Shares, settings=limits)


def test_the_contract_agrees_with_its_twin() -> None:
    run(examples=8, steps=20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_contract_agrees_with_its_twin_for_long() -> None:
    run(examples=60, steps=40)
