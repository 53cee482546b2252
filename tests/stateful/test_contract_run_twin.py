"""The run contract beside its twin, through any sequence of actions: sixteen accounts come, work, cheat and go.

Both refuse the same things for the same reason. Invariants, after every action:
- the coins of all accounts and both contracts are what was minted; the run holds the sum of all bonds, to the unit;
- whoever is slashed has lost his bond for good, and nobody gets more than his bond and the rewards he earned;
- statuses only move forward; one account and one peer have one seat;
- `served`, `workers` and `bonded` are what the members say; the draw is the beacon's, among the least served stages;
- shares are those of posted epochs, under the roots that were proposed: none struck, early, too large or by too few.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chain_support import CHAIN_ID, RUN_ID, TERMS, ascending, key, split
from contract_vm import Deployed, Reverted, Vm
from fuzzing import FUZZ, explore
from tessera.chain import abi
from tessera.chain.consent import NOBODY, Consent
from tessera.core.errors import Refused
from tessera.core.hashing import keccak
from tessera.core.signing import AccountKey
from tessera.incentives.run_twin import Member, RunTwin, Status

ACTORS = [key(f"actor {i}") for i in range(16)]
BY_NAME = {actor.account: actor for actor in ACTORS}
FOUNDERS = 6
STAKE, PURSE = 1_001, 5_000  # an odd stake: the reward is rounded
RULES = {
    "stages": 3, "most": 3, "stake": STAKE, "window_s": 600, "delay_s": 3_600, "reward_bps": 3_333, "epochs": 4,
    "early_bps": 25_000, "epoch_shares": 1_001,
}  # fmt: skip
NOTHING = int.from_bytes(keccak(b"nothing waits"), "big")
EVIDENCE, ONE, OTHER = b"\x09" * 32, b"\x01" * 32, b"\x02" * 32
STATUS, STAGE, BOND, SINCE, BEACON = 0, 1, 3, 4, 5  # fields of a member

actors = st.integers(0, len(ACTORS) - 1).map(ACTORS.__getitem__)
consents = st.sampled_from(["enough", "enough", "enough", "all", "too few", "a stranger"])


class Base:
    """A run that six of the actors have begun, kept as a state to start from."""

    def __init__(self) -> None:
        self.vm = vm = Vm()
        terms = TERMS._replace(**RULES)
        self.coin = Deployed.new(vm, "coin")
        self.run = Deployed.new(vm, "run", self.coin.address, bytes.fromhex(RUN_ID), terms)
        self.share = Deployed.new(
            vm, "model_share", "M", "M", self.coin.address, bytes.fromhex(RUN_ID), self.run.address
        )
        self.domain = self.coin("DOMAIN_SEPARATOR")
        self.consent = Consent(CHAIN_ID, self.run.address, RUN_ID)
        self.twin = RunTwin(**RULES)
        for actor in ACTORS:
            self.coin("mint", actor.account, PURSE)
        for founder in ACTORS[:FOUNDERS]:
            self.run("bond", *self.bond_of(founder, peer_of(founder)))
            self.run("draw", founder.account)
            self.twin.bond(founder.account, peer_of(founder).hex(), vm.timestamp)
            self.twin.draw(founder.account, self.run.read("members", founder.account, field=STAGE), vm.timestamp)
        founders = [founder.account for founder in ACTORS[:FOUNDERS]]
        self.run("begin", self.share.address, founders)
        self.twin.begin(founders)
        self.world, self.number = vm.freeze(), vm.number

    def bond_of(self, worker: AccountKey, peer: bytes) -> tuple[Any, ...]:
        """What `bond` takes, with the worker's EIP-3009 signature."""
        kind = keccak(
            b"ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
            b"bytes32 nonce)"
        )
        nonce = self.consent.bond_nonce(worker.account, peer)
        types = ("bytes32", "address", "address", "uint256", "uint256", "uint256", "bytes32")
        struct = keccak(abi.encode(types, (kind, worker.account, self.run.address, STAKE, 0, 2**40, nonce)))
        return worker.account, peer, 0, 2**40, *split(worker.sign_digest(keccak(b"\x19\x01" + self.domain + struct)))


base = cache(Base)


def peer_of(actor: AccountKey) -> bytes:
    return keccak(actor.account.encode())


class Runs(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        kept = base()
        self.base, self.vm = kept, Vm(kept.world)
        self.vm.number = kept.number
        self.coin, self.run, self.share = (
            Deployed(self.vm, contract.name, contract.address) for contract in (kept.coin, kept.run, kept.share)
        )
        self.twin = deepcopy(kept.twin)
        self.statuses = {actor.account: self.twin.status(actor.account) for actor in ACTORS}
        self.seen: dict[str, Member] = {}
        self.proposed: tuple[Any, ...] = ()
        self.roots: list[bytes] = []

    def both(self, on_twin: Callable[[], Any], on_chain: Callable[[], Any]) -> bool:
        """Do it on both: they agree on whether, and on why not. Whether it was done."""
        reason = None
        try:
            on_twin()
        except Refused as refusal:
            reason = refusal.rule
        if reason is None:
            on_chain()
            return True
        with pytest.raises(Reverted) as caught:
            on_chain()
        assert str(caught.value) == reason
        return False

    def signers(self, consent: str, of: set[str], enough: int) -> list[AccountKey]:
        """Of these workers: as many as it takes, all, one too few, or enough with a stranger among them."""
        workers = ascending(BY_NAME[name] for name in of)
        count = {"all": len(workers), "too few": max(enough - 1, 0)}.get(consent, enough)
        return ascending([*workers[:count], *([key("stranger")] if consent == "a stranger" else [])])

    def majority(self, consent: str) -> list[AccountKey]:
        return self.signers(consent, self.twin.workers, 2 * len(self.twin.workers) // 3 + 1)

    @rule(seconds=st.sampled_from([1, 599, 601, 3_601, 7_201]), blocks=st.sampled_from([0, 0, 1, 300]))
    def wait(self, seconds: int, blocks: int) -> None:
        self.vm.timestamp += seconds
        self.vm.number += blocks

    # --- coming and going ---------------------------------------------------------------------------------------------

    @rule(actor=actors, other=actors, names_other=st.integers(0, 5))
    def bond(self, actor: AccountKey, other: AccountKey, names_other: int) -> None:
        peer = peer_of(other if names_other == 0 else actor)
        arguments = self.base.bond_of(actor, peer)
        self.both(
            lambda: self.twin.bond(actor.account, peer.hex(), self.vm.timestamp),
            lambda: self.run("bond", *arguments, sender=key("stranger").account),
        )

    @rule(actor=actors, comes_in=st.booleans())
    def draw(self, actor: AccountKey, comes_in: bool) -> None:
        if comes_in:
            self.bond(actor, actor, 1)
        beacon = self.run.read("members", actor.account, field=BEACON)
        if self.twin.status(actor.account) is Status.BONDED and self.vm.number + 1 - beacon > 256:
            self.run("draw", actor.account)
            assert self.run.read("members", actor.account, field=BEACON) == self.vm.number
            return
        stage, least = None, sorted(self.twin.least_served())
        if least:
            seed = keccak(keccak(beacon.to_bytes(8, "big")) + bytes.fromhex(actor.account[2:]))
            stage = least[int.from_bytes(seed, "big") % len(least)]
        self.both(
            lambda: self.twin.draw(actor.account, stage, self.vm.timestamp), lambda: self.run("draw", actor.account)
        )

    @rule(actor=actors)
    def expire(self, actor: AccountKey) -> None:
        self.both(lambda: self.twin.expire(actor.account, self.vm.timestamp), lambda: self.run("expire", actor.account))

    @rule(joiner=st.none() | actors, leaver=st.none() | actors, consent=consents)
    def change(self, joiner: AccountKey | None, leaver: AccountKey | None, consent: str) -> None:
        names = [who and who.account for who in (joiner, leaver)]
        digest = self.base.consent.change(self.twin.changes, *[name or NOBODY for name in names])
        signers, number = self.majority(consent), self.twin.changes
        signatures = [k.sign_digest(digest) for k in signers]
        if self.both(
            lambda: self.twin.change(*names, [k.account for k in signers], self.vm.timestamp),
            lambda: self.run("change", number, *[name or NOBODY for name in names], signatures),
        ):
            with pytest.raises(Reverted, match="run: not the next change"):
                self.run("change", number, *[name or NOBODY for name in names], signatures)

    @rule(consent=st.sampled_from(["enough", "all"]))
    def admit(self, consent: str) -> None:
        """Whoever has a stage is taken in: `change` alone would rarely name him."""
        drawn = [BY_NAME[name] for name in self.twin.members if self.twin.status(name) is Status.DRAWN]
        if drawn:
            self.change(drawn[0], None, consent)

    @rule(actor=actors)
    def leave(self, actor: AccountKey) -> None:
        self.both(
            lambda: self.twin.leave(actor.account, self.vm.timestamp), lambda: self.run("leave", sender=actor.account)
        )

    @rule(actor=actors)
    def exit(self, actor: AccountKey) -> None:
        self.both(
            lambda: self.twin.exit(actor.account, self.vm.timestamp), lambda: self.run("exit", sender=actor.account)
        )

    @rule(actor=actors)
    def withdraw(self, actor: AccountKey) -> None:
        self.both(
            lambda: self.twin.withdraw(actor.account, self.vm.timestamp), lambda: self.run("withdraw", actor.account)
        )

    @rule(status=st.sampled_from([Status.BONDED, Status.DRAWN, Status.LEAVING, Status.LEFT]), waits=st.booleans())
    def go_on(self, status: Status, waits: bool) -> None:
        """Somebody in this state takes the step that ends it: an actor at random is rarely in it for long enough."""
        names = [name for name in self.twin.members if self.twin.status(name) is status]
        if names:
            self.vm.timestamp += 3_601 if waits else 0
            step = {Status.LEAVING: self.exit, Status.LEFT: self.withdraw}.get(status, self.expire)
            step(BY_NAME[names[0]])

    # --- epochs -------------------------------------------------------------------------------------------------------

    @rule(part=st.sampled_from([0, 1, 10_000, 10_000, 10_001]), ahead=st.sampled_from([0, 0, 0, 1]), consent=consents)
    def propose(self, part: int, ahead: int, consent: str) -> None:
        epoch = len(self.twin.posted) + ahead
        shares = self.twin.cap(epoch) * part // 10_000 + (part > 10_000)
        root = keccak(f"{epoch} {self.twin.attempt} {shares}".encode())
        digest = self.base.consent.epoch(epoch, self.twin.attempt, root, shares)
        signers = self.majority(consent)
        signatures = [k.sign_digest(digest) for k in signers]
        if self.both(
            lambda: self.twin.propose(epoch, shares, [k.account for k in signers], self.vm.timestamp),
            lambda: self.run("propose", epoch, root, shares, signatures),
        ):
            assert self.twin.pending
            self.proposed = (epoch, root, shares, self.twin.pending.opens_at)

    @rule(consent=consents)
    def strike(self, consent: str) -> None:
        signers = self.signers(consent, self.twin.workers, -(-len(self.twin.workers) // 3))
        proposed = self.proposed or (0, ONE, 0, 0)
        digest = self.base.consent.strike(proposed[0], self.twin.attempt, EVIDENCE)
        signatures = [k.sign_digest(digest) for k in signers]
        self.both(
            lambda: self.twin.strike([k.account for k in signers], self.vm.timestamp),
            lambda: self.run("strike", *proposed, EVIDENCE, signatures),
        )

    @rule(waits=st.booleans())
    def post(self, waits: bool) -> None:
        self.vm.timestamp += 600 if waits else 0
        proposed = self.proposed or (0, ONE, 0, 0)
        if self.both(lambda: self.twin.post(self.vm.timestamp), lambda: self.run("post", *proposed)):
            self.roots.append(proposed[1])

    # --- disputes -----------------------------------------------------------------------------------------------------

    @rule(accused=actors, challenger=actors, consent=consents)
    def slash(self, accused: AccountKey, challenger: AccountKey, consent: str) -> None:
        others = self.twin.workers - {accused.account}
        signers = self.signers(consent, others, max(2 * len(others) // 3 + 1, 2))
        digest = self.base.consent.slash(accused.account, EVIDENCE, challenger.account)
        signatures = [k.sign_digest(digest) for k in signers]
        self.both(
            lambda: self.twin.slash(accused.account, challenger.account, [k.account for k in signers]),
            lambda: self.run("slash", accused.account, EVIDENCE, challenger.account, signatures),
        )

    @rule(liar=actors, challenger=actors)
    def contradict(self, liar: AccountKey, challenger: AccountKey) -> None:
        one, other = (liar.sign_digest(self.base.consent.receipt(EVIDENCE, content)) for content in (ONE, OTHER))
        self.both(
            lambda: self.twin.lose(liar.account, challenger.account),
            lambda: self.run("contradict", liar.account, EVIDENCE, ONE, one, OTHER, other, sender=challenger.account),
        )

    # --- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def members_are_what_the_twin_says_and_only_move_forward(self) -> None:
        for name, before in self.statuses.items():
            member = self.twin.members.get(name)
            status = Status(self.run.read("members", name, field=STATUS))
            assert status is self.twin.status(name)
            assert status >= before
            assert status is before or before < Status.WITHDRAWN  # the end is the end
            self.statuses[name] = status
            if member and member != self.seen.get(name):
                self.check(name, member)
                self.seen[name] = replace(member)

    def check(self, name: str, member: Member) -> None:
        fields = [self.run.read("members", name, field=field) for field in (STATUS, STAGE, BOND, SINCE)]
        assert fields == [member.status, member.stage, member.bond, member.since]

    @invariant()
    def what_is_counted_is_what_the_members_say(self) -> None:
        assert [self.run.read("served", stage) for stage in range(3)] == [self.twin.served(s) for s in range(3)]
        count = self.run.read("workers")
        present = [self.run.read("workers", field=1 + place) for place in range(count)]
        assert len(set(present)) == count
        assert set(present) == {int(name, 16) for name in self.twin.workers}
        peers = [self.twin.members[name].peer for name in self.twin.workers]
        assert len(set(peers)) == len(peers)

    @invariant()
    def money_is_conserved_and_nobody_has_anothers_bond(self) -> None:
        bonded = self.run.read("bonded")
        assert bonded == self.twin.bonded == self.coin.read("balanceOf", self.run.address)
        total = bonded
        for actor in ACTORS:
            money = self.coin.read("balanceOf", actor.account)
            risked = STAKE if actor.account in self.twin.members else 0
            assert money == PURSE - risked + self.twin.paid.get(actor.account, 0)
            total += money
        income = self.coin.read("balanceOf", self.share.address)
        assert income == self.twin.paid.get("share", 0)
        assert total + income == len(ACTORS) * PURSE == self.coin.read("totalSupply")

    @invariant()
    def shares_are_those_of_posted_epochs(self) -> None:
        epochs, shares = divmod(self.share.read("totals"), 2**128)
        assert (epochs, shares) == (len(self.roots), sum(self.twin.posted))
        assert len(self.roots) == len(self.twin.posted)
        for epoch, root in enumerate(self.roots):
            assert self.share.read("epochs", epoch) == int.from_bytes(root, "big")
            assert self.share.read("epochs", epoch, field=1) == self.twin.posted[epoch] <= self.twin.cap(epoch)
        kinds, waiting = ("uint256", "bytes32", "uint256", "uint256"), self.run.read("waiting")
        hashed = int.from_bytes(keccak(abi.encode(kinds, self.proposed)), "big") if self.proposed else 0
        assert waiting == (hashed if self.twin.pending else NOTHING)
        assert (self.run.read("attempt"), self.run.read("change_count")) == (self.twin.attempt, self.twin.changes)

    def teardown(self) -> None:
        """At the end nobody's seat has changed unseen, and the views say what the storage says."""
        if not hasattr(self, "run"):
            return
        for name, member in self.twin.members.items():
            self.check(name, member)
        assert all(self.run.read("peers", bytes.fromhex(peer)) == int(n, 16) for peer, n in self.twin.peers.items())
        assert self.run("worker_count") == len(self.twin.workers)
        assert all(self.run("is_worker", a.account) == (a.account in self.twin.workers) for a in ACTORS[:2])
        assert (self.run("pending") != bytes(32)) == (self.twin.pending is not None)
        assert self.run("cap", len(self.twin.posted)) == self.twin.cap(len(self.twin.posted))


def test_the_contract_agrees_with_its_twin() -> None:
    explore(Runs, examples=6, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(900 * FUZZ)
def test_the_contract_agrees_with_its_twin_for_long() -> None:
    explore(Runs, examples=200 * FUZZ, steps=50)
