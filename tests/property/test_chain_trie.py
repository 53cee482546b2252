"""The trie and the account database agree with py-evm's, operation by operation, and leave old states as they were."""

from __future__ import annotations

from typing import Any

import rlp
from eth.constants import BLANK_ROOT_HASH
from eth.db.account import AccountDB
from eth.db.atomic import AtomicDB
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from trie import HexaryTrie

from tessera.chain import trie
from tessera.chain.world import Accounts, World
from tessera.core.hashing import keccak

KEYS = [bytes([n]) for n in range(40)]
changes = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 2**80)), max_size=60)


@given(changes)
def test_the_root_is_that_of_another_implementation(steps: list[tuple[bytes, int]]) -> None:
    ours: trie.Node | None = None
    theirs = HexaryTrie({})
    for key, value in steps:
        if value:
            ours = trie.put(ours, trie.path_of(key), value)
            theirs[keccak(key)] = rlp.encode(value)
        else:
            ours = trie.remove(ours, trie.path_of(key))
            del theirs[keccak(key)]
        assert trie.root_hash(ours) == theirs.root_hash


@given(changes)
def test_it_holds_what_was_put_last_and_old_roots_what_they_held(steps: list[tuple[bytes, int]]) -> None:
    node: trie.Node | None = None
    expected: dict[bytes, int] = {}
    history = []
    for key, value in steps:
        history.append((node, trie.root_hash(node), dict(expected)))
        if value:
            node = trie.put(node, trie.path_of(key), value)
            expected[key] = value
        else:
            node = trie.remove(node, trie.path_of(key))
            expected.pop(key, None)
    for old, root, held in [*history, (node, trie.root_hash(node), expected)]:
        assert {key: trie.get(old, trie.path_of(key)) for key in KEYS} == {key: held.get(key) for key in KEYS}
        assert list(trie.leaves(old)) == sorted((trie.path_of(key), value) for key, value in held.items())
        assert trie.root_hash(old) == root


@given(changes)
def test_order_does_not_matter(steps: list[tuple[bytes, int]]) -> None:
    final = {key: value for key, value in steps if value}
    one: trie.Node | None = None
    other: trie.Node | None = None
    for key in sorted(final):
        one = trie.put(one, trie.path_of(key), final[key])
    for key in sorted(final, reverse=True):
        other = trie.put(other, trie.path_of(key), final[key])
    assert trie.root_hash(one) == trie.root_hash(other)


ADDRESSES = [bytes([n]) * 20 for n in range(1, 5)]
addresses, slots = st.sampled_from(ADDRESSES), st.integers(0, 3)


class TwoDatabases(RuleBasedStateMachine):
    """Ours beside py-evm's: every answer is the same, every root too."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = Accounts(World.empty())
        self.theirs: Any = AccountDB(AtomicDB(), BLANK_ROOT_HASH)
        self.open: list[tuple[Any, Any]] = []
        self.deleted: set[bytes] = set()  # in this transaction: deletion is its end, nobody asks what was there before

    def both(self, name: str, *arguments: Any) -> None:
        assert getattr(self.ours, name)(*arguments) == getattr(self.theirs, name)(*arguments)

    @rule(address=addresses, value=st.integers(0, 2**70))
    def set_balance(self, address: bytes, value: int) -> None:
        self.both("set_balance", address, value)

    @rule(address=addresses)
    def increment_nonce(self, address: bytes) -> None:
        self.both("increment_nonce", address)

    @rule(address=addresses, code=st.binary(min_size=1, max_size=4))
    def set_code(self, address: bytes, code: bytes) -> None:
        self.both("set_code", address, code)

    @rule(address=addresses)
    def delete_code(self, address: bytes) -> None:
        self.both("delete_code", address)

    @rule(address=addresses, slot=slots, value=st.integers(0, 3))
    def set_storage(self, address: bytes, slot: int, value: int) -> None:
        self.both("touch_account", address)  # the EVM touches an account before it runs its code
        self.both("increment_nonce", address)  # and a contract's nonce is above zero
        self.both("set_storage", address, slot, value)

    @rule(address=addresses)
    def touch(self, address: bytes) -> None:
        self.both("touch_account", address)

    @rule(address=addresses)
    def delete_account(self, address: bytes) -> None:
        self.both("delete_account", address)
        self.deleted.add(address)

    @rule(address=addresses, slot=slots)
    def warm(self, address: bytes, slot: int) -> None:
        self.both("mark_address_warm", address)
        self.both("mark_storage_warm", address, slot)

    @rule()
    def record(self) -> None:
        self.open.append((self.ours.record(), self.theirs.record()))

    @precondition(lambda self: self.open)
    @rule(keep=st.booleans())
    def close(self, keep: bool) -> None:
        ours, theirs = self.open.pop()
        if keep:
            self.ours.commit(ours)
            self.theirs.commit(theirs)
        else:
            self.ours.discard(ours)
            self.theirs.discard(theirs)

    @precondition(lambda self: not self.open)
    @rule()
    def end_of_transaction(self) -> None:
        """Nothing is left open there; empty accounts that were touched are cleared by the EVM itself."""
        self.deleted.clear()
        before = self.ours.world
        root = before.root
        assert self.ours.make_state_root() == self.theirs.make_state_root()
        self.theirs.persist()
        self.theirs.lock_changes()
        assert before.root == root

    @invariant()
    def every_answer_is_the_same(self) -> None:
        for address in ADDRESSES:
            for question in (
                "get_balance", "get_nonce", "get_code", "get_code_hash", "account_exists", "account_is_empty",
                "account_has_code_or_nonce", "is_address_warm",
            ):  # fmt: skip
                self.both(question, address)
            for slot in range(4):
                self.both("get_storage", address, slot)
                if address not in self.deleted:
                    self.both("get_storage", address, slot, False)
                self.both("is_storage_warm", address, slot)


TestTwoDatabases = TwoDatabases.TestCase
TestTwoDatabases.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
