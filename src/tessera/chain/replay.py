"""Replaying a journal: what an operator does at start, and what members do to check the operator.

A ledger of one operator is honest as long as members look: they replay its entries by themselves and compare every
block's hash, which commits to the whole state. Two different blocks at one height, or a root that the transactions do
not lead to, is `Misbehaviour`, with the evidence in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from tessera.chain.blocks import Block, make_block
from tessera.chain.engine import BlockEnv, State, decode_transaction
from tessera.chain.genesis import Genesis
from tessera.chain.journal import Entry
from tessera.chain.world import World
from tessera.core.errors import Misbehaviour, TesseraError

__all__ = ["ANCESTORS", "Head", "ancestors", "replay", "verify_journal"]

ANCESTORS = 256  # block hashes that a contract can ask for
CHECK_EVERY = 256  # blocks between two comparisons of the state root, whose computation is most of a block's cost


@dataclass(frozen=True, slots=True)
class Head:
    """Where a journal ends."""

    number: int
    hash: bytes
    state_root: bytes


def verify_journal(
    entries: Iterable[Entry],
    *,
    chain_id: int,
    genesis: Genesis | None = None,
    known: Mapping[int, bytes] | None = None,
) -> Head:
    """Replay an operator's whole journal and compare every block.

    Args:
        entries: from block 0 on.
        genesis: what block 0 holds, as the run's members know it; None means the standard contracts and no balances.
        known: block hashes by height that were seen before, from receipts or an earlier replay.

    Raises: `Misbehaviour` when a block is not what its transaction leads to, or another than the one known at its
        height: a fork. `evidence` holds what proves it.

    Cost: about 2 ms a block.
    """
    seen = known or {}
    checked = _no_fork(entries, seen)
    steps = deque(replay(checked, chain_id, genesis or Genesis(), check_every=1), maxlen=1)
    last = steps[0][0] if steps else None
    if last is None or last.number < max(seen, default=0):
        ends = "nowhere" if last is None else f"at block {last.number}"
        raise Misbehaviour(f"the journal ends {ends}: blocks that were shown are gone", evidence=_hex_map(seen))
    return Head(last.number, last.hash, last.state_root)


def replay(
    entries: Iterable[Entry],
    chain_id: int,
    genesis: Genesis,
    *,
    after: tuple[Sequence[Block], World] | None = None,
    check_every: int = CHECK_EVERY,
) -> Iterator[tuple[Block, World]]:
    """Run the entries again; yields each block, with the accounts after it, once what the journal says of it has been
    found true.

    Args:
        after: the blocks before the entries, and the accounts there; None when the entries begin with block 0.
        check_every: blocks between two comparisons of the state root; hash and gas are always compared.

    Raises: `Misbehaviour` at the first entry that is out of order or does not lead where it says.

    Cost: 0.6 ms a block, and 2 ms for each comparison.
    """
    rest = iter(entries)
    if after is None:
        first = next(rest, None)
        if first is None:
            return
        block, world = genesis.block(first.timestamp)
        if first.number != 0 or block.hash != first.hash:
            raise _wrong(first, f"block 0 should hash to 0x{block.hash.hex()}")
        yield block, world
        after = [block], world
    recent, state = deque(after[0][-ANCESTORS:], maxlen=ANCESTORS), State(after[1])
    while group := list(islice(rest, check_every)):
        steps = []
        for entry in group:
            block = _step(state, entry, recent, chain_id)
            recent.append(block)
            steps.append((block, state.world))
        if state.world.root != group[-1].state_root:
            raise _wrong(group[-1], f"the transactions up to here lead to state root 0x{state.world.root.hex()}")
        yield from steps


def ancestors(blocks: Sequence[Block]) -> Iterator[bytes]:
    """The hashes that a block after these can ask for, the parent's first. Read only when a contract asks."""
    return (blocks[-i].hash for i in range(1, min(len(blocks), ANCESTORS) + 1))


def _step(state: State, entry: Entry, recent: deque[Block], chain_id: int) -> Block:
    parent = recent[-1]
    if entry.number != parent.number + 1 or entry.timestamp < parent.timestamp:
        raise _wrong(entry, f"expected block {parent.number + 1} at {parent.timestamp} or later")
    if entry.raw is None:
        block = make_block(entry.number, entry.timestamp, parent.hash, entry.state_root)
    else:
        try:
            transaction = decode_transaction(entry.raw, chain_id)
            outcome = state.apply(transaction, BlockEnv(chain_id, entry.number, entry.timestamp, ancestors(recent)))
        except TesseraError as error:
            raise _wrong(entry, error.message) from error
        block = make_block(entry.number, entry.timestamp, parent.hash, entry.state_root, transaction, outcome)
    if block.gas_used != entry.gas_used or block.hash != entry.hash:
        raise _wrong(entry, f"it should use {block.gas_used} gas and hash to 0x{block.hash.hex()}")
    return block


def _no_fork(entries: Iterable[Entry], known: Mapping[int, bytes]) -> Iterator[Entry]:
    for entry in entries:
        before = known.get(entry.number, entry.hash)
        if before != entry.hash:
            evidence = {"height": entry.number, "hashes": ["0x" + before.hex(), "0x" + entry.hash.hex()]}
            raise Misbehaviour(f"a fork: two different blocks at height {entry.number}", evidence=evidence)
        yield entry


def _wrong(entry: Entry, why: str) -> Misbehaviour:
    return Misbehaviour(f"block {entry.number} of the journal is wrong: {why}", evidence=entry.to_value())


def _hex_map(known: Mapping[int, bytes]) -> dict[str, str]:
    return {str(height): "0x" + block_hash.hex() for height, block_hash in known.items()}
