"""All accounts of a chain after a block, and how the EVM changes them.

A `World` is never changed: `Accounts` lays a transaction's changes over one, undoes what reverts, and `lock_changes`
folds the rest into a new `World`, which shares all that stayed the same. So old states cost what changed since, and a
state root is hashed when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import rlp
from eth.abc import AccountDatabaseAPI
from eth.db.journal import get_next_checkpoint

from tessera.chain import trie
from tessera.chain.rlp_forms import rlp_encode
from tessera.core.hashing import keccak

__all__ = ["Account", "Accounts", "World"]

NO_CODE = keccak(b"")


class Account(NamedTuple):
    """One account. `storage` is its own trie, from slots to numbers above zero."""

    nonce: int = 0
    balance: int = 0  # wei
    storage: trie.Node | None = None
    code_hash: bytes = NO_CODE

    def rlp(self) -> bytes:
        return rlp_encode([self.nonce, self.balance, trie.root_hash(self.storage), self.code_hash])


class World(NamedTuple):
    """Args:
    codes: of all contracts that ever were, by hash; shared by all worlds of a chain, and only ever added to.
    """

    accounts: trie.Node | None
    codes: dict[bytes, bytes]

    @classmethod
    def empty(cls) -> World:
        return cls(None, {})

    @property
    def root(self) -> bytes:
        """The state root, 32 bytes."""
        return trie.root_hash(self.accounts)

    def account(self, address: bytes) -> Account | None:
        found = trie.get(self.accounts, trie.path_of(address))
        return found if isinstance(found, Account) else None

    def storage(self, address: bytes, slot: int) -> int:
        account = self.account(address)
        found = None if account is None else trie.get(account.storage, _slot_path(slot))
        return found if isinstance(found, int) else 0

    def contents(self, known: Collection[bytes] = ()) -> Iterator[tuple[bytes, bytes]]:
        """Hash and content of all that makes up this world, trie nodes and code, without what `known` hashes lead to.

        Cost: about 20 µs each.
        """
        for name, encoded, values in trie.contents(self.accounts, known):
            yield name, encoded
            for account in values:
                assert isinstance(account, Account)
                if account.code_hash != NO_CODE and account.code_hash not in known:
                    yield account.code_hash, self.codes[account.code_hash]
                yield from ((inner, node) for inner, node, _ in trie.contents(account.storage, known))

    @classmethod
    def restored(cls, root: bytes, content: Mapping[bytes, bytes]) -> World:
        """The world of this state root, of what `contents` gave.

        Raises: KeyError for what is missing; ValueError or TypeError for what is not a part of any world.
        """
        codes: dict[bytes, bytes] = {}

        def account(encoded: bytes) -> Account:
            nonce, balance, storage, code_hash = rlp.decode(encoded)
            if code_hash != NO_CODE:
                codes[code_hash] = content[code_hash]
            slots = trie.restored(storage, content, lambda value: int.from_bytes(rlp.decode(value), "big"))
            return Account(int.from_bytes(nonce, "big"), int.from_bytes(balance, "big"), slots, code_hash)

        world = cls(trie.restored(root, content, account), codes)
        if world.root != root:
            raise ValueError(f"these nodes make a state with root 0x{world.root.hex()}")
        return world


_MISSING: Any = object()


class Accounts(AccountDatabaseAPI):  # type: ignore[misc]  # py-evm is untyped
    """py-evm's account database over a `World`.

    Every change is noted in one undo list, as (dictionary, key, what was there); a checkpoint is a place in it.
    """

    def __init__(self, db: Any, state_root: bytes = b"") -> None:
        """Args:
        db: a `World`; its root is the state's, whatever `state_root` says.
        """
        self.world: World = db
        self._accounts: dict[bytes, Account | None] = {}  # None: deleted
        self._slots: dict[tuple[bytes, int], int] = {}
        self._wiped: dict[bytes, bool] = {}  # accounts whose storage began anew
        self._warm: dict[bytes | tuple[bytes, int], bool] = {}
        self._undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self._marks: dict[int, int] = {}  # lengths of the undo list, by checkpoint

    # --- roots ------------------------------------------------------------------------------------------------------

    @property
    def state_root(self) -> bytes:
        """Of the world below: asked for at every call, and never looked at."""
        return b""

    @state_root.setter
    def state_root(self, value: bytes) -> None:
        """A revert sets back what it was told: the undo list does the work."""

    def has_root(self, state_root: bytes) -> bool:
        return self.world.root == state_root

    def make_state_root(self) -> bytes:
        self.lock_changes()
        return self.world.root

    def persist(self) -> Any:
        self.lock_changes()

    def lock_changes(self) -> None:
        """Fold all changes into a new world; from here on they are what storage was before."""
        accounts = self.world.accounts
        slots: dict[bytes, list[tuple[int, int]]] = {}
        for (address, slot), value in self._slots.items():
            slots.setdefault(address, []).append((slot, value))
        for address in {**self._accounts, **self._wiped, **slots}:
            account = self._account(address)
            path = trie.path_of(address)
            if account is None:
                accounts = trie.remove(accounts, path)
                continue
            storage = None if address in self._wiped else self._storage_before(address)
            for slot, value in slots.get(address, ()):
                where = _slot_path(slot)
                storage = trie.put(storage, where, value) if value else trie.remove(storage, where)
            accounts = trie.put(accounts, path, account._replace(storage=storage))
        self.world = World(accounts, self.world.codes)
        for changed in (self._accounts, self._slots, self._wiped, self._warm, self._undo, self._marks):
            changed.clear()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def record(self) -> Any:
        checkpoint = get_next_checkpoint()  # one count for all, since transient storage is given ours
        self._marks[checkpoint] = len(self._undo)
        return checkpoint

    def discard(self, checkpoint: Any) -> None:
        for changed, key, before in reversed(self._undo[self._marks[checkpoint] :]):
            if before is _MISSING:
                del changed[key]
            else:
                changed[key] = before
        del self._undo[self._marks[checkpoint] :]

    def commit(self, checkpoint: Any) -> None:
        """Nothing to do: what is not discarded stays."""

    # --- storage ----------------------------------------------------------------------------------------------------

    def get_storage(self, address: bytes, slot: int, from_journal: bool = True) -> int:
        if from_journal:
            value = self._slots.get((address, slot))
            if value is not None:
                return value
            if address in self._wiped:
                return 0
        return self.world.storage(address, slot)

    def set_storage(self, address: bytes, slot: int, value: int) -> None:
        self._set(self._slots, (address, slot), value)

    def delete_storage(self, address: bytes) -> None:
        for key in [key for key in self._slots if key[0] == address]:
            self._set(self._slots, key, 0)
        self._set(self._wiped, address, True)

    def is_storage_warm(self, address: bytes, slot: int) -> bool:
        return (address, slot) in self._warm

    def mark_storage_warm(self, address: bytes, slot: int) -> None:
        if (address, slot) not in self._warm:
            self._set(self._warm, (address, slot), True)

    # --- accounts ---------------------------------------------------------------------------------------------------

    def get_balance(self, address: bytes) -> int:
        return self._present(address).balance

    def set_balance(self, address: bytes, balance: int) -> None:
        self._set(self._accounts, address, self._present(address)._replace(balance=balance))

    def get_nonce(self, address: bytes) -> int:
        return self._present(address).nonce

    def set_nonce(self, address: bytes, nonce: int) -> None:
        self._set(self._accounts, address, self._present(address)._replace(nonce=nonce))

    def increment_nonce(self, address: bytes) -> None:
        self.set_nonce(address, self.get_nonce(address) + 1)

    def set_code(self, address: bytes, code: bytes) -> None:
        code_hash = keccak(code)
        self.world.codes[code_hash] = code
        self._set(self._accounts, address, self._present(address)._replace(code_hash=code_hash))

    def get_code(self, address: bytes) -> bytes:
        code_hash = self._present(address).code_hash
        return b"" if code_hash == NO_CODE else self.world.codes[code_hash]

    def get_code_hash(self, address: bytes) -> bytes:
        return self._present(address).code_hash

    def delete_code(self, address: bytes) -> None:
        self._set(self._accounts, address, self._present(address)._replace(code_hash=NO_CODE))

    def account_has_code_or_nonce(self, address: bytes) -> bool:
        account = self._present(address)
        return account.nonce != 0 or account.code_hash != NO_CODE

    def delete_account(self, address: bytes) -> None:
        self.delete_storage(address)
        self._set(self._accounts, address, None)

    def account_exists(self, address: bytes) -> bool:
        return self._account(address) is not None

    def touch_account(self, address: bytes) -> None:
        self._set(self._accounts, address, self._present(address))

    def account_is_empty(self, address: bytes) -> bool:
        account = self._present(address)
        return account.nonce == 0 and account.balance == 0 and account.code_hash == NO_CODE

    def is_address_warm(self, address: bytes) -> bool:
        return address in self._warm

    def mark_address_warm(self, address: bytes) -> None:
        if address not in self._warm:
            self._set(self._warm, address, True)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _account(self, address: bytes) -> Account | None:
        found = self._accounts.get(address, _MISSING)
        return self.world.account(address) if found is _MISSING else found

    def _present(self, address: bytes) -> Account:
        """An account that nobody has touched has nothing."""
        return self._account(address) or _NOBODY

    def _storage_before(self, address: bytes) -> trie.Node | None:
        account = self.world.account(address)
        return None if account is None else account.storage

    def _set(self, changed: dict[Any, Any], key: Any, value: Any) -> None:
        self._undo.append((changed, key, changed.get(key, _MISSING)))
        changed[key] = value


_NOBODY = Account()


def _slot_path(slot: int) -> bytes:
    return trie.path_of(slot.to_bytes(32, "big"))
