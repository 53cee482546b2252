"""The split of income beside its twin, through any sequence of income, tallies, strikes and claims of six workers.

Both refuse the same things for the same reason. Invariants, after every action:
- the coins that the split has, the shares got and the workers got are what came in, to the unit;
- the workers were never given more than their part, nor the shares less than theirs;
- nobody was paid twice, or by a tally that did not outlive its window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chain_support import CHAIN_ID, RUN_ID, TERMS, ascending, key, peer_of
from contract_vm import Deployed, Reverted, Vm
from fuzzing import FUZZ, explore
from tessera.chain.consent import TallyConsent
from tessera.chain.world import World
from tessera.core.errors import Refused
from tessera.core.hashing import keccak
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.core.signing import AccountKey
from tessera.incentives.split_twin import SplitTwin, TallyTwin

WORKERS = ascending(key(f"server {i}") for i in range(6))
WINDOW_S, BPS, EVIDENCE = 600, 3_333, b"\x09" * 32
NOTHING = int.from_bytes(keccak(b"nothing waits"), "big")
DONE: Counter[str] = Counter()  # what succeeded, over all examples: a walk in which nothing succeeds shows nothing

amounts = st.one_of(st.integers(1, 20), st.integers(1, 10**12))
workers = st.integers(0, len(WORKERS) - 1).map(WORKERS.__getitem__)
shares = st.dictionaries(workers, st.integers(1, 1_000), min_size=1, max_size=6)
rare = st.integers(0, 7).map(lambda number: int(number == 7))
signers = st.sampled_from([6, 6, 5, 5, 4, 2, 1, 0])


@cache
def base() -> tuple[World, dict[str, Deployed], int]:
    """A run of six without stakes that has begun, and its split."""
    vm = Vm()
    run_id, terms = bytes.fromhex(RUN_ID), TERMS._replace(window_s=WINDOW_S, stake=0, invited=True)
    coin = Deployed.new(vm, "coin")
    run = Deployed.new(vm, "run", coin.address, run_id, terms)
    share = Deployed.new(vm, "model_share", "M", "M", coin.address, run_id, run.address)
    split = Deployed.new(vm, "income_split", coin.address, BPS)
    for worker in WORKERS:
        run("bond", worker.account, peer_of(worker), 0, 0, 27, bytes(32), bytes(32))
        run("draw", worker.account)
    run("begin", share.address, [worker.account for worker in WORKERS])
    split("begin", run.address)
    return vm.freeze(), {"coin": coin, "share": share, "split": split}, vm.number


class Splits(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        world, contracts, number = base()
        self.vm = Vm(world)
        self.vm.number = number
        self.coin, self.share, self.split = (
            Deployed(self.vm, name, contracts[which].address)
            for which, name in (("coin", "coin"), ("share", "model_share"), ("split", "income_split"))
        )
        self.twin = SplitTwin(Fraction(BPS, 10_000), WINDOW_S, len(WORKERS))
        self.consent = TallyConsent(CHAIN_ID, self.split.address, RUN_ID)
        self.revenue = 0
        self.got: Counter[str] = Counter()

    def both(self, what: str, on_twin: Callable[[], Any], on_chain: Callable[[], Any]) -> bool:
        """Do it on both: they agree on whether, on why not, and on the answer. Whether it was done."""
        reason = None
        try:
            expected = on_twin()
        except Refused as refusal:
            reason = refusal.rule
        if reason is None:
            assert on_chain() == expected
            DONE[what] += 1
            return True
        with pytest.raises(Reverted) as caught:
            on_chain()
        assert str(caught.value) == reason
        return False

    @rule(amount=amounts)
    def receive(self, amount: int) -> None:
        self.coin("mint", self.split.address, amount)
        self.twin.arrived += amount
        self.revenue += amount

    @rule(amount=amounts)
    def earn(self, amount: int) -> None:
        self.receive(amount)
        self.distribute()

    @rule()
    def distribute(self) -> None:
        self.both("distribute", self.twin.distribute, lambda: self.split("distribute"))

    @precondition(lambda self: (self.twin.unassigned and not self.twin.waiting) or self.vm.number % 7 == 0)
    @rule(
        parts=shares,
        too_much=rare,
        ahead=rare,
        signed=signers,
    )
    def propose(self, parts: dict[AccountKey, int], too_much: int, ahead: int, signed: int) -> None:
        whole, number = max(0, self.twin.unassigned), len(self.twin.posted) + ahead
        leaves = {worker.account: part * whole // sum(parts.values()) for worker, part in parts.items()}
        leaves = {account: amount + too_much * (whole + 1) for account, amount in leaves.items()}
        leaves = {account: amount for account, amount in leaves.items() if amount}
        tree = _tree(number, leaves)
        root, amount = tree.root if tree else bytes(32), sum(leaves.values())
        signatures = _signed(self.consent.tally(number, self.twin.struck, root, amount), signed)
        self.both(
            "propose",
            lambda: self.twin.propose(number, leaves, signed, self.vm.timestamp),
            lambda: self.split("propose", number, root, amount, signatures),
        )

    @rule(parts=shares, amount=st.integers(100, 10**12), struck=st.integers(0, 3).map(lambda number: number == 3))
    def tally(self, parts: dict[AccountKey, int], amount: int, struck: bool) -> None:
        """What mostly happens: income comes, is given out, and outlives its window or is struck."""
        self.earn(amount)
        self.propose(parts, 0, 0, len(WORKERS))
        self.strike(4) if struck else self.post(True)

    @precondition(lambda self: self.twin.waiting or self.vm.number % 7 == 0)
    @rule(signed=signers)
    def strike(self, signed: int) -> None:
        fields = self.fields()
        signatures = _signed(self.consent.strike(fields[0], self.twin.struck, EVIDENCE), signed)
        self.both(
            "strike",
            lambda: self.twin.strike(signed, self.vm.timestamp),
            lambda: self.split("strike", *fields, EVIDENCE, signatures),
        )

    @precondition(lambda self: self.twin.waiting or self.vm.number % 7 == 0)
    @rule(patient=st.integers(0, 3).map(bool))
    def post(self, patient: bool) -> None:
        fields = self.fields()
        self.vm.timestamp += WINDOW_S if patient else 0
        self.both("post", lambda: self.twin.post(self.vm.timestamp), lambda: self.split("post", *fields))

    @precondition(lambda self: self.twin.posted or self.vm.number % 7 == 0)
    @rule(number=st.integers(0, 5), at=st.integers(0, 5), more=rare, stranger=rare)
    def claim(self, number: int, at: int, more: int, stranger: int) -> None:
        posted, worker = self.twin.posted, WORKERS[at]
        number = number % len(posted) if posted else number
        leaves = posted[number].leaves if posted else {}
        if leaves and not stranger:
            worker = next(w for w in WORKERS[at:] + WORKERS[:at] if w.account in leaves)
        amount = leaves.get(worker.account, 1) + more
        tree = _tree(number, leaves)
        proof = tree.proof(list(leaves).index(worker.account)) if tree and worker.account in leaves else []
        if more and self.twin.paid[number, worker.account]:
            return  # another leaf than the one that was paid: the contract finds no proof, the twin one payment
        done = self.both(
            "claim",
            lambda: self.twin.claim(number, worker.account, amount),
            lambda: self.split("claim", number, worker.account, amount, proof),
        )
        self.got[worker.account] += amount if done else 0

    @rule(seconds=st.sampled_from([1, WINDOW_S - 1, WINDOW_S]))
    def wait(self, seconds: int) -> None:
        self.vm.timestamp += seconds

    @invariant()
    def every_unit_is_somewhere(self) -> None:
        split, shares = (self.coin.read("balanceOf", c.address) for c in (self.split, self.share))
        paid = {worker.account: self.coin.read("balanceOf", worker.account) for worker in WORKERS}
        assert paid == {account: self.got[account] for account in paid}
        assert split + shares + sum(paid.values()) == self.revenue
        assert (split, shares) == (self.twin.held, self.twin.to_shares)

    @invariant()
    def the_sums_are_right(self) -> None:
        names = ("received", "passed", "assigned", "claimed", "attempt", "tally_count")
        twin = self.twin
        expected = (twin.received, twin.to_shares, twin.assigned, twin.claimed, twin.struck, len(twin.posted))
        assert tuple(self.split.read(name) for name in names) == expected
        assert twin.claimed <= twin.assigned <= twin.received * BPS // 10_000
        unclaimed = [self.split.read("tallies", number, field=1) for number in range(len(twin.posted))]
        assert sum(unclaimed) == twin.assigned - twin.claimed
        assert (self.split.read("waiting") == NOTHING) == (twin.waiting is None)

    def fields(self) -> tuple[Any, ...]:
        """Of the waiting tally; of one that nobody proposed when there is none."""
        tally = self.twin.waiting or TallyTwin(0, {}, 0)
        tree = _tree(tally.number, tally.leaves)
        return tally.number, tree.root if tree else bytes(32), tally.amount, tally.opens_at


def _tree(number: int, leaves: Any) -> MerkleTree | None:
    rows = [share_leaf(number, account, amount) for account, amount in leaves.items()]
    return MerkleTree(rows) if rows else None


def _signed(digest: bytes, count: int) -> list[bytes]:
    return [worker.sign_digest(digest) for worker in WORKERS[:count]]


def test_the_contract_agrees_with_its_twin() -> None:
    explore(Splits, examples=3, steps=20)


@pytest.mark.slow
@pytest.mark.timeout(900 * FUZZ)
def test_the_contract_agrees_with_its_twin_for_long() -> None:
    DONE.clear()
    explore(Splits, examples=150 * FUZZ, steps=50)
    assert min(DONE[what] for what in ("distribute", "propose", "strike", "post", "claim")) >= 50, DONE
