"""A coin that calls back while it pays: the locks hold, and nobody is paid twice.

Known from The DAO (2016) and every reward contract that paid before it booked. The coin swallows what its call back
answers, so that the outer call goes on: what matters is that the inner one has done nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from chain_support import CHAIN_ID, RUN_ID, TERMS, WORKERS, ascending, key, peer_of
from contract_vm import Deployed, Vm
from tessera.chain.consent import NOBODY, Consent
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.core.signing import AccountKey

EVIL_COIN = """
# pragma version 0.4.3
balanceOf: public(HashMap[address, uint256])
target: address
data: Bytes[2048]
calls: public(uint256)
answered: public(uint256)

@external
def arm(target: address, data: Bytes[2048]):
    self.target = target
    self.data = data

@external
def mint(receiver: address, amount: uint256):
    self.balanceOf[receiver] += amount

@external
def transfer(receiver: address, amount: uint256) -> bool:
    self._move(msg.sender, receiver, amount)
    return True

@external
def receiveWithAuthorization(
    sender: address, receiver: address, amount: uint256, valid_after: uint256, valid_before: uint256, nonce: bytes32,
    v: uint8, r: bytes32, s: bytes32
):
    self._move(sender, receiver, amount)

@internal
def _move(sender: address, receiver: address, amount: uint256):
    self._call_back()
    self.balanceOf[sender] -= amount
    self.balanceOf[receiver] += amount
    self._call_back()

@internal
def _call_back():
    if self.target == empty(address):
        return
    self.calls += 1
    done: bool = raw_call(self.target, self.data, revert_on_failure=False)
    if done:
        self.answered += 1
"""
LEAVER, LIAR, CHEAT, HOLDER = WORKERS
JOINER = key("joiner")
EVIDENCE, ONE, OTHER = b"\x09" * 32, b"\x01" * 32, b"\x02" * 32
Call = tuple[Any, ...]


class Trap:
    """A run in the evil coin: one worker has left and may withdraw, one has lied, one has cheated, one has income."""

    def __init__(self) -> None:
        self.vm = Vm()
        self.coin = Deployed.of_source(self.vm, "evil_coin", EVIL_COIN)
        terms, run_id = TERMS._replace(most=5), bytes.fromhex(RUN_ID)
        self.run = Deployed.new(self.vm, "run", self.coin.address, run_id, terms)
        self.share = Deployed.new(self.vm, "model_share", "M", "M", self.coin.address, run_id, self.run.address)
        self.consent = Consent(CHAIN_ID, self.run.address, RUN_ID)
        for person in (*WORKERS, JOINER):
            self.coin("mint", person.account, TERMS.stake)
        for worker in WORKERS:
            self.run(*bond_of(worker))
            self.run("draw", worker.account)
        self.run("begin", self.share.address, [worker.account for worker in WORKERS])
        tree = MerkleTree([share_leaf(0, HOLDER.account, 4)])
        self.run("propose", 0, tree.root, 4, signed(WORKERS, self.consent.epoch(0, 0, tree.root, 4)))
        self.run("post", 0, tree.root, 4, self.vm.timestamp)
        self.coin("mint", self.share.address, 100)
        self.share("distribute")
        self.share("redeem", 0, HOLDER.account, 4, [])
        leaves = self.consent.change(0, NOBODY, LEAVER.account)
        self.run("change", 0, NOBODY, LEAVER.account, signed(WORKERS, leaves))
        self.vm.timestamp += TERMS.delay_s
        self.calls = self.all_calls()
        self.kept = self.vm.freeze()

    def all_calls(self) -> dict[str, tuple[Deployed, Call]]:
        """What moves money, and two views, with everything that makes them pass."""
        one, other = (LIAR.sign_digest(self.consent.receipt(EVIDENCE, content)) for content in (ONE, OTHER))
        verdict = signed([LIAR, HOLDER], self.consent.slash(CHEAT.account, EVIDENCE, HOLDER.account))
        return {
            "bond": (self.run, bond_of(JOINER)),
            "withdraw": (self.run, ("withdraw", LEAVER.account)),
            "slash": (self.run, ("slash", CHEAT.account, EVIDENCE, HOLDER.account, verdict)),
            "contradict": (self.run, ("contradict", LIAR.account, EVIDENCE, ONE, one, OTHER, other)),
            "bonded": (self.run, ("bonded",)),
            "claim": (self.share, ("claim", HOLDER.account)),
            "distribute": (self.share, ("distribute",)),
            "claimable": (self.share, ("claimable", HOLDER.account)),
        }

    def balances_after(self, outer: str, inner: str | None = None) -> list[int]:
        """Everybody's coins after one call, from inside of which the coin tries another."""
        vm = Vm(self.kept)
        vm.timestamp = self.vm.timestamp
        coin, run, share = (Deployed(vm, it.name, it.address) for it in (self.coin, self.run, self.share))
        if inner:
            target, call = self.calls[inner]
            coin("arm", target.address, target.data(*call))
        contract, call = self.calls[outer]
        Deployed(vm, contract.name, contract.address)(*call)
        if inner:
            assert coin("calls") > 0
            assert coin("answered") == 0, f"{inner} was let in during {outer}"
        assert run("bonded") == coin("balanceOf", run.address)
        assert share("held") <= coin("balanceOf", share.address)
        people = [person.account for person in (*WORKERS, JOINER)]
        return [coin("balanceOf", account) for account in (*people, run.address, share.address)]


def bond_of(worker: AccountKey) -> Call:
    return "bond", worker.account, peer_of(worker), 0, 2**40, 27, bytes(32), bytes(32)


def signed(signers: Sequence[AccountKey], digest: bytes) -> list[bytes]:
    return [signer.sign_digest(digest) for signer in ascending(signers)]


trap = cache(Trap)


@pytest.mark.parametrize("outer", ["bond", "withdraw", "slash", "contradict", "claim"])
def test_a_coin_that_calls_back_is_let_in_nowhere_and_changes_nothing(outer: str) -> None:
    plain, kept = trap().balances_after(outer), trap()
    same_lock = [name for name, (contract, _) in kept.calls.items() if contract is kept.calls[outer][0]]
    assert outer in same_lock
    for inner in same_lock:
        assert kept.balances_after(outer, inner) == plain


def test_alone_each_of_these_calls_passes() -> None:
    """Otherwise the test above would show nothing."""
    assert len({tuple(trap().balances_after(name)) for name in trap().calls}) == 6  # two views, and one spreads nothing
