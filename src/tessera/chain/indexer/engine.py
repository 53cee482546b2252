"""The indexer: follows a chain and keeps tables equal to what the chain says, wherever either of them stops.

Far below the chain's end, blocks are read in long ranges and are final. The last `window_blocks` are read one by one
and their hashes kept: when the chain's history differs from them, what was folded after the last common block is taken
back and read again. When it differs below them too, the tables are built again from the contract's beginning: they hold
nothing that the chain does not. As a block leaves the window it is read a second time, so that a log that a lagging
node kept back is found.

Invariants, after `update` and with one history behind the node's URL: the tables equal a fresh index of the chain up to
the node's end; a crash at any point loses at most the chunk being read; several processes may share the tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from tessera.chain.indexer import tables
from tessera.chain.indexer.facts import Fact, Source
from tessera.chain.indexer.queries import Queries
from tessera.chain.indexer.reader import Moved, Reader, is_limit
from tessera.chain.indexer.tables import Mark
from tessera.chain.types import Chain, Header
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Late, Refused, Unavailable
from tessera.storage.database import Transaction, open_database
from tessera.storage.location import MEMORY

__all__ = ["Config", "Indexer"]

log = structlog.get_logger()

PATIENCE = 8  # reorgs and torn readings in one update, before it is left for the next
MANY_FACTS = 5_000  # in one chunk; the next one is made shorter


@dataclass(frozen=True, slots=True)
class Config:
    """How a chain is followed."""

    window_blocks: int = 64  # the deepest reorg that is followed back, rather than built again from the beginning
    confirmations: int = 0  # blocks that must lie above one before it is read
    chunk_blocks: int = 5_000  # the longest range in one question, and in one transaction
    behind_s: float = 60.0  # a node that stands still behind the tables for so long is not late: its chain is shorter

    def __post_init__(self) -> None:
        if self.window_blocks < 1 or self.confirmations < 0 or self.chunk_blocks < 1 or self.behind_s < 0:
            raise Invalid(f"an index's window and chunk are at least 1, the rest at least 0: {self}")


class Indexer:
    """One index: some contracts of one chain.

    Args:
        where: a file, made when missing, or a database's URL; None keeps it in memory.
        sources: reducers, each bound to a contract.
        schema: the name-space in a shared database, one for each index.
        from_block: where the oldest contract begins.

    Raises: `Invalid` for a file that is damaged or indexes other contracts; `Conflict` while it is locked.
    """

    def __init__(
        self,
        where: str | Path | None,
        chain: Chain,
        sources: Sequence[Source],
        *,
        schema: str = "",
        from_block: int = 0,
        config: Config | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config, self._clock, self._start = config or Config(), clock or SystemClock(), from_block
        self._chain, self._reader = chain, Reader(chain, sources)
        self._chunk = self._config.chunk_blocks
        self._claimed = False
        self._behind: tuple[str, float] | None = None  # where the node stood when it was behind us, and since when
        addresses = {source.name: source.address for source in sources}
        if len(addresses) != len(sources) or from_block < 0:
            raise Invalid(f"an index needs sources of different names, and a first block from 0 on, not {from_block}")
        versions = json.dumps({source.name: source.reducer.version for source in sources}, sort_keys=True)
        self._db = open_database(where or MEMORY, tables.LAYOUT, schema=schema)
        self.queries = Queries(self._db)
        try:
            self._db.apply(partial(tables.begin, addresses=addresses, versions=versions, start=from_block,
                                   shown=self._db.shown))  # fmt: skip
        except BaseException:
            self._db.close()
            raise

    @property
    def last_block(self) -> int:
        """The last block whose facts are stored."""
        return self.queries.mark().last

    async def update(self) -> int:
        """Read on to the chain's present end; returns the last block read.

        Raises: `Unavailable` when the node keeps changing its history; `Misbehaviour` when its answers contradict
            themselves; what the chain or the database raise. What was stored before stays.

        Cost: one request when nothing is new; for each new block one and one for each source; before that, two and
            one for each source a chunk.
        """
        await self._claim()
        setbacks, farthest = 0, self.queries.mark().settled
        while True:
            mark = self.queries.mark()
            if mark.settled > farthest:
                setbacks, farthest = 0, mark.settled
            try:
                head = await self._reader.newest()
                if not await self._agrees(mark, head):
                    setbacks += 1
                elif not await self._read_on(mark, head):
                    return self.last_block
            except Moved as error:
                setbacks += 1
                if setbacks > PATIENCE:
                    raise
                log.info("index_read_again", why=error.message)
            if setbacks > PATIENCE:
                raise Unavailable(f"the node keeps changing its history about block {mark.last}: ask again later")

    def close(self) -> None:
        self._db.close()

    # --- one step ---------------------------------------------------------------------------------------------------

    async def _agrees(self, mark: Mark, head: Header) -> bool:
        """Whether the chain still says what was folded. If not, what it no longer says is taken back."""
        if mark.last < self._start:
            return True
        if head.number < mark.last:
            return await self._is_late(mark, head)
        self._behind = None
        here = head if head.number == mark.last else await self._reader.header(mark.last)
        if here is None:
            raise Moved(f"the node told of block {head.number} and has no block {mark.last}")
        if here.hash == mark.hash:
            return True
        await self._go_back(mark)
        return False

    async def _is_late(self, mark: Mark, head: Header) -> bool:
        """The node ends before the tables do: it is late, or its chain has become shorter.

        Nodes behind one URL differ by a block now and then; a reader would see payments come and go.
        """
        ours = self.queries.known()
        if head.number in ours and ours[head.number] != head.hash:
            await self._go_back(mark)
            return False
        now = self._clock.time()
        if self._behind is None or self._behind[0] != head.hash:
            self._behind = (head.hash, now)
        if now - self._behind[1] < self._config.behind_s:
            return True
        await self._roll_back(mark, head.number if head.number in ours else None)
        return False

    async def _go_back(self, mark: Mark) -> None:
        """Find the last common block, and take back what came after it."""
        for number, block_hash in self.queries.known().items():
            header = await self._reader.header(number)
            if header is not None and header.hash == block_hash:
                return await self._roll_back(mark, number)
        return await self._roll_back(mark, None)

    async def _read_on(self, mark: Mark, head: Header) -> bool:
        """Read a chunk. False when there is nothing to read."""
        end = head.number - self._config.confirmations
        deep, window = end - self._config.window_blocks, self._config.window_blocks
        if mark.settled < deep and (mark.last < deep or deep - mark.settled >= window):
            await self._settle(mark, deep)
            return True
        return mark.last < end and await self._extend(mark, end, head)

    async def _settle(self, mark: Mark, deep: int) -> None:
        """Read a range that no reorg is expected to reach, as long as the node allows."""
        while True:
            last = min(mark.settled + self._chunk, deep)
            try:
                block_hash, facts = await self._reader.in_range(mark.settled + 1, last)
                break
            except Moved:
                raise
            except (Refused, Invalid) as error:
                if not is_limit(error) or last == mark.settled + 1:
                    raise
                self._chunk = (last - mark.settled) // 2
            except Late:
                self._chunk = max(1, (last - mark.settled) // 2)  # perhaps it was too much to ask: less next time
                raise
        longer = min(2 * self._chunk, self._config.chunk_blocks)
        self._chunk = max(1, self._chunk // 2) if len(facts) > MANY_FACTS else longer
        await self._change(partial(tables.settle, seen=mark, last=last, block_hash=block_hash, facts=facts))

    async def _extend(self, mark: Mark, end: int, head: Header) -> bool:
        """Read the window's blocks one by one, as far as they follow one another."""
        blocks: list[tuple[int, str]] = []
        facts: list[Fact] = []
        parent = mark.hash
        try:
            for number in range(mark.last + 1, end + 1):
                header = head if number == head.number else await self._reader.header(number)
                if header is None:  # this node is late
                    break
                if parent and header.parent != parent:
                    raise Moved(f"block {number} does not follow the block before it any more")
                facts += await self._reader.in_block(header)
                blocks.append((number, header.hash))
                parent = header.hash
        except Moved:
            if not blocks:
                raise
        if blocks:
            await self._change(partial(tables.extend, seen=mark, blocks=blocks, facts=facts))
        return bool(blocks)

    # --- the tables -------------------------------------------------------------------------------------------------

    async def _claim(self) -> None:
        if not self._claimed:
            chain_id = await self._chain.chain_id()
            self._db.apply(partial(tables.claim, chain_id=chain_id, shown=self._db.shown))
            self._claimed = True

    async def _roll_back(self, mark: Mark, to: int | None) -> None:
        if await self._change(partial(tables.roll_back, seen=mark, to=to)):
            rolled_to = self._start - 1 if to is None else to
            log.warning("index_rolled_back", reached=mark.last, to=rolled_to, rebuilt=to is None)

    async def _change(self, work: Callable[[Transaction], bool]) -> bool:
        return await self._db.apply_async(work)
