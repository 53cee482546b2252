"""LocalChain: an Ethereum chain in this process, for one operator, with a journal on disk.

Each transaction gets a block of its own at once. The base fee is zero, so accounts without coins can use it. Blocks,
receipts and gas are Ethereum's (Prague); wallets and web3.py see a node. What it is not: a network. One process writes
it, and whoever does not trust that operator replays the journal and compares (`heads.check_operator`), or uses a
public chain.

Invariants: a block is in the journal before anybody hears of it; nothing a reader does changes a state; `submit` either
adds exactly one block or none. Any thread may call any method: one lock orders the writers, readers take none.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tessera.chain.blocks import Block, RawLog, make_block
from tessera.chain.checkpoint import Checkpoint
from tessera.chain.client import RpcChain
from tessera.chain.engine import GAS_LIMIT, BlockEnv, Message, Outcome, SignedTx, State, decode_transaction
from tessera.chain.genesis import Genesis
from tessera.chain.heads import SignedHead, sign_head
from tessera.chain.journal import Entry, Journal
from tessera.chain.jsonrpc import BODY_LIMIT, answer
from tessera.chain.methods import Methods
from tessera.chain.replay import ancestors, replay
from tessera.chain.threads import ThreadRpc
from tessera.chain.world import World
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, Unavailable
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

if TYPE_CHECKING:
    from tessera.chain.provider import LocalProvider

__all__ = ["LocalChain", "LogEntry"]

KEPT = 1_024  # blocks whose accounts can still be read: each costs what it changed, mostly a few KB
CHECKPOINT_EVERY = 4_096  # blocks between two checkpoints: what a start after a crash may have to replay, 3 s
CHECKPOINT_LEAST = 512  # blocks that are worth one when the chain opens or closes


class LogEntry(NamedTuple):
    """One event, where it happened."""

    block: Block
    position: int  # among the block's events
    log: RawLog


class _View(NamedTuple):
    """What readers see; replaced as a whole."""

    world: World
    head: Block


class LocalChain:
    """One chain.

    Args:
        path: the journal's file, made when it is missing; None keeps the chain in memory.
        chain_id: what transactions are signed for. An existing journal must have the same.
        alloc: wei that accounts hold in the first block. An existing journal must have the same.
        contracts: code that stands at accounts from the first block on. None means the standard ones (`genesis`) for a
            new journal, and its own for an existing one, which keeps what it began with.
        operator: signs heads for members, so that two histories are proved by its own hand; None signs none.
        dev: allow `evm_*`: time travel, empty blocks and, in memory, snapshots.

    Raises: as `Journal`; `Invalid`, naming the block, when the journal does not replay to what it says.

    Cost: opening takes about 0.1 ms for a block before the checkpoint and replays the others, about 0.7 ms each; a
        transaction takes about 3 ms and one fsync. One transaction in `CHECKPOINT_EVERY` waits for a checkpoint.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        chain_id: int,
        clock: Clock | None = None,
        alloc: Mapping[Account, int] | None = None,
        contracts: Mapping[Account, bytes] | None = None,
        operator: AccountKey | None = None,
        dev: bool = False,
    ) -> None:
        if not 0 < chain_id < 2**53:
            raise Invalid(f"a chain id is between 1 and 2^53, not {chain_id}")
        self.chain_id, self.dev = chain_id, dev
        self._clock = clock or SystemClock()
        self._operator = operator
        self._skew_s = 0
        self._next_timestamp: int | None = None  # what a developer asked for
        self._in_memory = path is None
        self._lock = threading.RLock()
        self._closed = False
        self._blocks: list[Block] = []
        self._heights: dict[bytes, int] = {}  # of blocks and of transactions, by hash
        self._emitters: dict[bytes, list[int]] = {}  # blocks with logs, by contract
        self._worlds: dict[int, World] = {}  # after the last `KEPT` blocks
        self._snapshots: list[tuple[int, World]] = []
        wanted = Genesis({parse_account(account): wei for account, wei in (alloc or {}).items()})
        if contracts is not None:
            wanted = replace(wanted, contracts={parse_account(account): code for account, code in contracts.items()})
        content = wanted.to_value()
        facts = {"chain_id": chain_id, "alloc": content["alloc"]}
        theirs = {"contracts": content["contracts"]}
        self._journal = Journal(path, facts if contracts is None else facts | theirs, theirs)
        self._checkpoint = Checkpoint(path.with_name(path.name + ".checkpoint")) if path else None
        try:
            # A journal that began before there were standard contracts names none, and has none.
            self.genesis = Genesis.from_value({**content, "contracts": self._journal.fact("contracts", {})})
            self._view = self._load()
        except BaseException:
            self._journal.close()
            raise
        self.methods = Methods(self)

    # --- ways in ----------------------------------------------------------------------------------------------------

    def request(self, method: str, params: list[Any]) -> Any:
        """One JSON-RPC call in Python values. Raises `jsonrpc.RpcFault`."""
        return self.methods.call(method, params)

    def handle(self, body: bytes, limit: int = BODY_LIMIT) -> bytes:
        """JSON-RPC text in, text out, batches too. Never raises for anything that `body` holds."""
        return answer(self.methods.call, body, limit)

    def client(self) -> RpcChain:
        """This chain as a `Chain`. Work happens in a thread."""
        return RpcChain(ThreadRpc(self.methods.call))

    def provider(self) -> LocalProvider:
        """This chain for web3.py: `Web3(chain.provider())`."""
        from tessera.chain.provider import LocalProvider  # web3 takes a second to import

        return LocalProvider(self)

    def close(self) -> None:
        """Let go of the file. Further writes are refused; reading goes on."""
        with self._lock:
            if self._checkpoint and not self._closed:
                self._checkpoint.save(self._blocks, self._view.world, CHECKPOINT_LEAST)
                self._checkpoint.close()
            self._closed = True
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- writing ----------------------------------------------------------------------------------------------------

    def submit(self, raw: bytes) -> SignedTx:
        """Put a signed transaction into a block of its own, now.

        Raises: `Invalid` or `Refused` for one that no block may hold; `Conflict` for one that a block already holds;
            `Unavailable` when the journal cannot be written. In each case nothing has changed.
        """
        transaction = decode_transaction(raw, self.chain_id)
        with self._lock:
            if transaction.hash in self._heights:
                raise Conflict(f"already known: 0x{transaction.hash.hex()}")
            world, parent = self._view
            state = State(world)
            env = self._next_env(parent)
            outcome = state.apply(transaction, env)
            root = state.world.root
            self._append(make_block(env.number, env.timestamp, parent.hash, root, transaction, outcome), state.world)
        return replace(transaction, inner=None)

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def head(self) -> Block:
        return self._view.head

    def block(self, number: int) -> Block | None:
        return self._blocks[number] if 0 <= number <= self._view.head.number else None

    def block_by_hash(self, block_hash: bytes) -> Block | None:
        block = self.block(self._heights.get(block_hash, -1))
        return block if block and block.hash == block_hash else None

    def block_of(self, tx_hash: bytes) -> Block | None:
        """The block that holds a transaction."""
        block = self.block(self._heights.get(tx_hash, -1))
        return block if block and block.tx_hash == tx_hash else None

    def state(self, number: int | None = None) -> State:
        """The accounts after a block; None means the newest. Yours alone: throw it away after use.

        Raises: `Missing` for a block that is not there, or whose state is no longer kept.
        """
        world, head = self._view
        if number is None or number == head.number:
            return State(world)
        if self.block(number) is None:
            raise Missing(f"no block {number}: the head is {head.number}")
        kept = self._worlds.get(number)
        if kept is None:
            raise Missing(f"the state of block {number} is no longer kept here: the last {KEPT} are")
        return State(kept)

    def call(self, message: Message, number: int | None = None) -> Outcome:
        """What a message would do after a block, without doing it. On the head it runs in the next block, now."""
        if number is None or number == self._view.head.number:
            return self.state().call(message, self._next_env(self._view.head))
        block = self.block(number)
        if block is None:
            raise Missing(f"no block {number}: the head is {self._view.head.number}")
        before = self._blocks[max(0, number - 256) : number]
        return self.state(number).call(message, BlockEnv(self.chain_id, number, block.timestamp, ancestors(before)))

    def simulate(self, messages: Sequence[Message], number: int | None = None) -> list[Outcome]:
        """What messages would do one after the other, on a copy of the state that is thrown away.

        Together they have the gas of one block. Raises: as `call`.
        """
        state, left = self.state(number), GAS_LIMIT
        env = self._next_env(self._view.head)
        outcomes = []
        for message in messages:
            outcomes.append(state.run(replace(message, gas=min(message.gas, left)), env))
            left -= outcomes[-1].gas_used
        return outcomes

    def estimate(self, message: Message, number: int | None = None) -> tuple[int, Outcome]:
        """The least gas with which the message succeeds, exactly; 0 when it fails even with `message.gas`.

        Cost: two runs mostly; some more where a contract calls another with little gas to spare.
        """
        best = self.call(message, number)
        if not best.ok:
            return 0, best
        low, high, step = best.gas_needed, best.gas_needed, best.gas_needed // 32
        while not (again := self.call(replace(message, gas=high), number)).ok:
            if high >= message.gas:  # somebody was first: what succeeded a moment ago never will
                return 0, again
            low, high, step = high + 1, min(message.gas, high + step), 2 * step
        while low < high:  # the answer is in [low, high]
            middle = (low + high) // 2
            low, high = (low, middle) if self.call(replace(message, gas=middle), number).ok else (middle + 1, high)
        return high, best

    def logs(
        self,
        first: int,
        last: int,
        addresses: Collection[bytes] | None,
        topics: Sequence[Collection[bytes] | None],
        limit: int,
    ) -> list[LogEntry]:
        """Events of blocks `first` to `last`, both included.

        Args:
            addresses: of any of these contracts; None means all.
            topics: by position; None matches anything.

        Raises: `Refused` (rule "rpc_limit") for more than `limit`.
        """
        found: list[LogEntry] = []
        for number in self._with_logs(first, min(last, self._view.head.number), addresses):
            block = self._blocks[number]
            found += [
                LogEntry(block, index, log)
                for index, log in enumerate(block.logs)
                if (addresses is None or log[0] in addresses) and _topics_match(log[1], topics)
            ]
            if len(found) > limit:
                raise Refused(f"more than {limit} events: ask for fewer blocks", rule="rpc_limit")
        return found

    def state_root(self) -> bytes:
        """Of the newest block; what members compare after their replay."""
        return self._view.head.state_root

    def signed_head(self, number: int | None = None) -> SignedHead:
        """The operator's word on a block; None means the newest.

        Raises: `Missing` without an operator's key, or without that block.
        """
        block = self.head if number is None else self.block(number)
        if self._operator is None or block is None:
            raise Missing("nobody signs heads here" if block else f"no block {number}: the head is {self.head.number}")
        return sign_head(self._operator, self.chain_id, block.number, block.hash)

    def entries(self, first: int = 0, limit: int | None = None) -> list[Entry]:
        """The journal's rows, for members who replay it."""
        with self._lock:
            if self._closed:
                raise Unavailable("the chain is closed")
            return list(self._journal.entries(first, limit))

    # --- development ------------------------------------------------------------------------------------------------

    def mine(self) -> Block:
        """An empty block."""
        with self._lock:
            parent = self._view.head
            env = self._next_env(parent)
            self._append(make_block(env.number, env.timestamp, parent.hash, parent.state_root), self._view.world)
            return self._view.head

    def increase_time(self, seconds: int) -> int:
        """Set the clock forward; returns how far ahead it is now."""
        if not 0 <= seconds <= 10**10:
            raise Invalid(f"time moves forward by 0 to 10^10 s, not {seconds}")
        with self._lock:
            self._skew_s += seconds
            return self._skew_s

    def set_next_timestamp(self, timestamp: int) -> None:
        """The next block's time in seconds since 1970, exactly; from there the clock goes on."""
        with self._lock:
            earliest = self._view.head.timestamp
            if not earliest <= timestamp < 2**40:
                raise Invalid(f"the next block's time is {earliest} or later, and below 2^40, not {timestamp}")
            self._next_timestamp = timestamp
            self._skew_s = timestamp - int(self._clock.time())

    def snapshot(self) -> int:
        """A number to `revert` to."""
        with self._lock:
            if not self._in_memory:
                raise Invalid("snapshots need a chain in memory: a journal on disk is append-only")
            self._snapshots.append((self._view.head.number, self._view.world))
            return len(self._snapshots)

    def revert(self, snapshot: int) -> bool:
        """Forget all blocks since a snapshot, and the snapshots taken since. False for one that is not known."""
        with self._lock:
            if not 1 <= snapshot <= len(self._snapshots):
                return False
            height, world = self._snapshots[snapshot - 1]
            self._journal.cut(height)
            del self._snapshots[snapshot - 1 :]
            self._view = _View(world, self._blocks[height])
            for block in self._blocks[height + 1 :]:
                self._forget(block)
            del self._blocks[height + 1 :]
            return True

    # --- inside -----------------------------------------------------------------------------------------------------

    def _load(self) -> _View:
        """From the checkpoint, when it agrees with the journal; the rest, or else everything, is replayed."""
        found = self._checkpoint.load(self._journal, self.genesis) if self._checkpoint else None
        for block in found[0] if found else ():
            self._index(block)
        world = found[1] if found else World.empty()
        try:
            rest = self._journal.entries(len(self._blocks))
            for block, world in replay(rest, self.chain_id, self.genesis, after=found):
                self._index(block)
                self._keep(block.number, world)
        except Misbehaviour as error:
            raise Invalid(f"the chain's journal is damaged: {error.message}") from error
        if not self._blocks:
            block, world = self.genesis.block(int(self._clock.time()))
            self._journal.append(_entry(block))
            self._index(block)
        self._keep(self._blocks[-1].number, world)
        if self._checkpoint:
            self._checkpoint.save(self._blocks, world, CHECKPOINT_LEAST)
        return _View(world, self._blocks[-1])

    def _keep(self, number: int, world: World) -> None:
        self._worlds[number] = world
        self._worlds.pop(number - KEPT, None)

    def _next_env(self, parent: Block) -> BlockEnv:
        """Two blocks may share a second: a clock that ran ahead with the blocks would end payments too early."""
        asked = self._next_timestamp
        now = max(int(self._clock.time()) + self._skew_s if asked is None else asked, parent.timestamp)
        return BlockEnv(self.chain_id, parent.number + 1, now, ancestors(self._blocks))

    def _append(self, block: Block, world: World) -> None:
        """Journal first, then everybody else. The lock is held over the disk: the order of blocks is what it guards."""
        if self._closed:
            raise Unavailable("the chain is closed")
        self._journal.append(_entry(block))
        self._index(block)
        self._keep(block.number, world)
        self._next_timestamp = None
        self._view = _View(world, block)
        if self._checkpoint:
            self._checkpoint.save(self._blocks, world, CHECKPOINT_EVERY)

    def _index(self, block: Block) -> None:
        self._blocks.append(block)
        self._heights[block.hash] = block.number
        if block.tx_hash:
            self._heights[block.tx_hash] = block.number
        for address in {log[0] for log in block.logs}:
            self._emitters.setdefault(address, []).append(block.number)

    def _forget(self, block: Block) -> None:
        self._worlds.pop(block.number, None)
        del self._heights[block.hash]
        if block.tx_hash:
            del self._heights[block.tx_hash]
        for address in {log[0] for log in block.logs}:
            self._emitters[address].remove(block.number)

    def _with_logs(self, first: int, last: int, addresses: Collection[bytes] | None) -> Iterator[int]:
        if addresses is None:
            yield from (number for number in range(max(first, 0), last + 1) if self._blocks[number].logs)
            return
        numbers: set[int] = set()
        for address in addresses:
            heights = self._emitters.get(address, [])
            numbers.update(heights[bisect_left(heights, first) : bisect_left(heights, last + 1)])
        yield from sorted(numbers)


def _entry(block: Block) -> Entry:
    return Entry(block.number, block.timestamp, block.raw, block.gas_used, block.state_root, block.hash)


def _topics_match(topics: Sequence[bytes], wanted: Sequence[Collection[bytes] | None]) -> bool:
    return len(wanted) <= len(topics) and all(
        want is None or topic in want for topic, want in zip(topics, wanted, strict=False)
    )
