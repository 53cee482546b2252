"""The seam to the EVM: `State.apply(transaction, block) -> Outcome` by the rules of Ethereum's Prague fork.

Everything that knows py-evm is here and in `world`, so that another engine can take its place. A world is never
changed: whoever holds one can read it, or run a call on it, while others write.

Not carried: blob and set-code transactions, the beacon's system calls, withdrawals. What is carried costs exactly the
gas that other implementations charge; a test compares receipts with anvil's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eth.exceptions import PyEVMError
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.prague import PragueVM
from eth.vm.forks.prague.state import PragueState, PragueTransactionExecutor
from eth.vm.spoof import SpoofTransaction
from eth_keys.exceptions import BadSignature
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException

from tessera.chain.world import Accounts, World
from tessera.core.errors import Invalid, Refused

__all__ = ["GAS_LIMIT", "BlockEnv", "Message", "Outcome", "SignedTx", "State", "decode_transaction"]

# py-evm needs 10,240 frames for calls nested 1,024 deep. Its library py_ecc raises the limit to 100,000 for the whole
# process, with which a peer's deeply nested JSON overflows the C stack and kills us: taken back here.
RECURSION_LIMIT = 10_240
sys.setrecursionlimit(RECURSION_LIMIT)

# Of a block, hence of a transaction and of a call. A third of Ethereum's: the worst that one call can do is then about
# 5 s of work (an endless loop), while the dearest thing that we deploy takes 3 million.
GAS_LIMIT = 10_000_000
MAX_TRANSACTION = 128 * 1024  # bytes, as other nodes limit it
MAX_INIT_CODE = 49_152  # bytes, EIP-3860
FLOOR_BASE, FLOOR_PER_TOKEN = 21_000, 10  # EIP-7623: what calldata costs at least

_HALF_ORDER = 0x7FFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFF_5D576E73_57A4501D_DFE92F46_681B20A0  # of secp256k1
_BUILDER = PragueVM.get_transaction_builder()
_MALFORMED = (
    RLPException, ValidationError, BadSignature, PyEVMError,
    ValueError, TypeError, IndexError, OverflowError, AttributeError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockEnv:
    """What a transaction can learn about its block. `ancestors` are block hashes, the parent's first."""

    chain_id: int
    number: int
    timestamp: int
    ancestors: Iterable[bytes] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """A call without a signature. `to` is None to try a contract's creation."""

    sender: bytes
    to: bytes | None
    data: bytes
    value: int = 0
    gas: int = GAS_LIMIT


@dataclass(frozen=True, slots=True)
class SignedTx:
    """A transaction as it was signed. Addresses have 20 bytes; fees are wei per gas."""

    raw: bytes
    hash: bytes
    kind: int  # EIP-2718 type: 0, 1 or 2
    chain_id: int
    sender: bytes
    to: bytes | None
    nonce: int
    value: int
    data: bytes
    gas: int
    max_fee: int
    priority_fee: int
    access_list: tuple[tuple[bytes, tuple[int, ...]], ...]
    y_parity: int
    r: int
    s: int
    inner: Any  # py-evm's own object; None once the transaction is in a block, to save memory


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a transaction or call."""

    ok: bool
    gas_used: int
    gas_needed: int  # before refunds: no smaller limit can be enough
    reverted: bool  # ended by REVERT, so that `output` is the contract's own reason
    error: str  # empty when ok
    output: bytes
    logs: tuple[tuple[bytes, tuple[bytes, ...], bytes], ...]  # address, topics, data
    contract: bytes | None  # the account created


class _Prague(PragueState):  # type: ignore[misc]  # py-evm is untyped
    account_db_class = Accounts


class State:
    """A world to work on. `apply` puts another one in its place, which shares what stayed the same."""

    def __init__(self, world: World) -> None:
        self._state = _Prague(world, _context(BlockEnv(0, 0, 0)), b"")

    @property
    def world(self) -> World:
        """With all that was applied."""
        return self._state._account_db.world

    def apply(self, transaction: SignedTx, env: BlockEnv) -> Outcome:
        """Run it as the one transaction of its block. A transaction that fails by itself still pays and counts.

        Raises: `Invalid` or `Refused` for one that no block may hold; then nothing has changed.
        """
        self._check(transaction, env.chain_id)
        self._state.execution_context = _context(env)
        try:
            computation = self._state.apply_transaction(transaction.inner)
        except ValidationError as error:
            raise Invalid(f"no block may hold this transaction: {error}") from error
        self._state.lock_changes()
        return _outcome(computation, transaction.gas)

    def call(self, message: Message, env: BlockEnv) -> Outcome:
        """Run a message as a transaction without fee. Use a fresh State: this one is spoilt afterwards.

        Raises: `Refused` when the sender has less than `value`; `Invalid` for too little gas to begin.
        """
        self._state.execution_context = _context(env)
        unsigned = _BUILDER.new_unsigned_dynamic_fee_transaction(
            chain_id=env.chain_id, nonce=self.nonce(message.sender), max_priority_fee_per_gas=0, max_fee_per_gas=0,
            gas=message.gas, to=message.to or b"", value=message.value, data=message.data, access_list=(),
        )  # fmt: skip
        if self.balance(message.sender) < message.value:
            raise _insufficient(self.balance(message.sender), message.value)
        _check_gas(message.gas, unsigned.intrinsic_gas, message.data, message.to is None)
        transaction = SpoofTransaction(unsigned, from_=message.sender, y_parity=0, r=1, s=1)
        try:
            return _outcome(self._state.apply_transaction(transaction), message.gas)
        except ValidationError as error:
            raise Invalid(f"the call cannot run: {error}") from error

    def run(self, message: Message, env: BlockEnv) -> Outcome:
        """As `call`, but what it changes stays in this State, for the next message. Raises as `call`."""
        outcome = self.call(message, env)
        self._state.lock_changes()
        return outcome

    def balance(self, account: bytes) -> int:
        return int(self._state.get_balance(account))

    def nonce(self, account: bytes) -> int:
        return int(self._state.get_nonce(account))

    def code(self, account: bytes) -> bytes:
        return bytes(self._state.get_code(account))

    def storage(self, account: bytes, slot: int) -> int:
        return int(self._state.get_storage(account, slot))

    def allocate(self, balances: Mapping[bytes, int], contracts: Mapping[bytes, bytes]) -> None:
        """The first block's balances, in wei, and code."""
        for account, wei in balances.items():
            self._state.set_balance(account, wei)
        for account, code in contracts.items():
            self._state.set_code(account, code)
            self._state.set_nonce(account, 1)  # as every contract begins (EIP-161)
        self._state.lock_changes()

    def _check(self, transaction: SignedTx, chain_id: int) -> None:
        sender = transaction.sender
        expected = self.nonce(sender)
        if transaction.nonce != expected:
            word = "low" if transaction.nonce < expected else "high"
            raise Refused(f"nonce too {word}: next nonce {expected}, tx nonce {transaction.nonce}", rule="nonce")
        if self.code(sender):
            raise Invalid("the sender is a contract (EIP-3607)")
        if transaction.gas > GAS_LIMIT:
            raise Invalid(f"gas limit {transaction.gas} exceeds the block's {GAS_LIMIT}")
        if transaction.priority_fee > transaction.max_fee:
            raise Invalid("max priority fee per gas higher than max fee per gas")
        _check_gas(transaction.gas, transaction.inner.intrinsic_gas, transaction.data, transaction.to is None)
        most = transaction.value + transaction.gas * transaction.max_fee
        if self.balance(sender) < most:
            raise _insufficient(self.balance(sender), most)


def decode_transaction(raw: bytes, chain_id: int | None = None) -> SignedTx:
    """Read and authenticate a signed transaction. None for any chain: of one that a block holds already.

    Raises: `Invalid` for bytes that are none, another spelling of one, another chain's, or a type that is not carried.
    """
    if len(raw) > MAX_TRANSACTION:
        raise Invalid(f"a transaction of {len(raw)} bytes, at most {MAX_TRANSACTION} expected")
    if not raw or (raw[0] < 0xC0 and raw[0] not in (1, 2)):
        raise Invalid(f"a transaction of type 0x{raw[:1].hex()}: only types 0, 1 and 2 are carried here")
    try:
        inner = _BUILDER.decode(raw)
        inner.validate()
        sender = bytes(inner.sender)
        canonical = inner.encode()
        kind = 0 if raw[0] >= 0xC0 else raw[0]
        tx_chain = inner.chain_id
    except _MALFORMED as error:
        raise Invalid(f"not a signed transaction: {error}") from error
    if canonical != raw or not 0 < inner.s <= _HALF_ORDER:
        raise Invalid("not a signed transaction in its one canonical form")
    if tx_chain is None or chain_id not in (None, tx_chain):
        raise Invalid(f"signed for chain {tx_chain}, this is chain {chain_id}")
    return _signed(raw, kind, tx_chain, sender, inner)


def _signed(raw: bytes, kind: int, chain_id: int, sender: bytes, inner: Any) -> SignedTx:
    return SignedTx(
        raw=raw, hash=bytes(inner.hash), kind=kind, chain_id=chain_id, sender=sender, to=bytes(inner.to) or None,
        nonce=inner.nonce,
        value=inner.value, data=bytes(inner.data), gas=inner.gas, max_fee=inner.max_fee_per_gas,
        priority_fee=inner.max_priority_fee_per_gas,
        access_list=tuple((bytes(address), tuple(slots)) for address, slots in inner.access_list) if kind else (),
        y_parity=inner.y_parity, r=inner.r, s=inner.s, inner=inner,
    )  # fmt: skip


def _context(env: BlockEnv) -> ExecutionContext:
    return ExecutionContext(
        coinbase=bytes(20), timestamp=env.timestamp, block_number=env.number, difficulty=0, mix_hash=bytes(32),
        gas_limit=GAS_LIMIT, prev_hashes=env.ancestors, chain_id=env.chain_id, base_fee_per_gas=0, excess_blob_gas=0,
    )  # fmt: skip


def _outcome(computation: Any, gas_limit: int) -> Outcome:
    spent = gas_limit - computation.get_gas_remaining()
    refund = PragueTransactionExecutor.calculate_gas_refund(computation, spent)
    ok = bool(computation.is_success)
    reverted = not ok and type(computation.error).__name__ == "Revert"
    created = computation.msg.storage_address if computation.msg.is_create and ok else None
    return Outcome(
        ok=ok,
        gas_used=spent - refund + computation.data_floor_gas,
        gas_needed=max(spent, spent - refund + computation.data_floor_gas),
        reverted=reverted,
        error="" if ok else "execution reverted" if reverted else _halt_text(computation.error),
        output=bytes(computation.output),
        logs=tuple(
            (bytes(address), tuple(topic.to_bytes(32, "big") for topic in topics), bytes(data))
            for address, topics, data in computation.get_log_entries()
        ),
        contract=bytes(created) if created else None,
    )


def _halt_text(error: Any) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _check_gas(gas: int, intrinsic: int, data: bytes, creates: bool) -> None:
    zeros = data.count(0)
    floor = FLOOR_BASE + FLOOR_PER_TOKEN * (zeros + 4 * (len(data) - zeros))
    if gas < max(intrinsic, floor):
        raise Invalid(f"intrinsic gas too low: {gas}, at least {max(intrinsic, floor)} expected")
    if creates and len(data) > MAX_INIT_CODE:
        raise Invalid(f"{len(data)} bytes of init code, at most {MAX_INIT_CODE} expected (EIP-3860)")


def _insufficient(have: int, want: int) -> Refused:
    return Refused(f"insufficient funds for gas * price + value: have {have}, want {want}", rule="insufficient_funds")
