"""Reading a node that nobody vouches for: which facts stand in which blocks, or an error that says why not.

Near the chain's end a block is named by its hash, so that its logs are never another block's. Farther down a range is
asked for at once, and its last block's hash must be the same before and after. What is wrong in an answer by itself
(another contract's log, one outside the range, out of order, one block with two hashes) is `Misbehaviour`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.chain.indexer.facts import Fact, Source
from tessera.chain.types import Chain, Header, Log, Topic
from tessera.core.errors import Invalid, Misbehaviour, Refused, TesseraError, Unavailable

__all__ = ["Moved", "Reader", "is_limit"]


class Moved(Unavailable):
    """The chain's history changed while it was read, or two nodes behind one URL differ: look again."""


class Reader:
    """Facts of some sources, read from one chain."""

    def __init__(self, chain: Chain, sources: Sequence[Source]) -> None:
        self._chain, self._sources = chain, sources

    async def newest(self) -> Header:
        header = await self._chain.header()
        if header is None:
            raise Unavailable("the node has no block at all yet")
        return header

    async def header(self, number: int) -> Header | None:
        return await self._chain.header(number)

    async def in_block(self, header: Header) -> list[Fact]:
        """Facts of one block.  Cost: a request for each source. Raises: Moved when the node does not know it."""
        facts: list[Fact] = []
        for source in self._sources:
            try:
                logs = await self._chain.block_logs(source.address, source.topics, header.hash)
            except (Refused, Invalid) as error:
                if not is_limit(error):
                    raise
                raise Moved(
                    f"the node tells no logs of block {header.number} {header.hash}: {error.message}"
                ) from error
            hashes = {header.number: header.hash}
            _check(source, logs, header.number, header.number, hashes)
            facts += [fact for log in logs for fact in source.facts(log, header.timestamp)]
        return sorted(facts, key=lambda fact: fact.place)

    async def in_range(self, first: int, last: int) -> tuple[str, list[Fact]]:
        """The hash of block `last`, and the facts of blocks `first` to `last`.

        Cost: two requests, one or more for each source, and one for each block with events where the node does not say
        in a log when its block was. Raises: Moved; what a node says to too long a range.
        """
        before = await self.header(last)
        facts: list[Fact] = []
        hashes = {last: before.hash} if before else {}
        times: dict[int, int] = {}
        for source in self._sources:
            logs = await self._chain.logs(source.address, source.topics, first, last)
            _check(source, logs, first, last, hashes)
            facts += [fact for log in logs for fact in source.facts(log, await self._time(log, times))]
        after = await self.header(last)
        if before is None or after is None or before.hash != after.hash:
            raise Moved(f"block {last} became another one while the blocks up to it were read")
        return before.hash, sorted(facts, key=lambda fact: fact.place)

    async def _time(self, log: Log, times: dict[int, int]) -> int:
        if log.timestamp is not None:
            return log.timestamp
        if log.block_number not in times:
            header = await self.header(log.block_number)
            if header is None or header.hash != log.block_hash:
                raise Moved(f"the node told a log of block {log.block_number} and has no such block")
            times[log.block_number] = header.timestamp
        return times[log.block_number]


def is_limit(error: TesseraError) -> bool:
    """Whether it is the node that declined, and may not decline a smaller question. There is no one code for it."""
    return isinstance(error, Refused) or error.fields.get("rpc_code") is not None


def _check(source: Source, logs: Sequence[Log], first: int, last: int, hashes: dict[int, str]) -> None:
    """Raises: Misbehaviour for an answer that no honest node gives; Moved where two histories meet in it.

    `hashes` are the blocks seen so far; the new ones are added.
    """
    place = (-1, -1)
    for log in logs:
        here = (log.block_number, log.log_index)
        wrong = ""
        if not first <= log.block_number <= last:
            wrong = f"expected blocks {first} to {last}"
        elif log.address != source.address or not _wanted(log.topics, source.topics):
            wrong = f"expected {source.name} at {source.address}"
        elif here <= place:
            wrong = f"it comes after log {place[1]} of block {place[0]}: torn, doubled or out of order"
        if wrong:
            raise Misbehaviour(
                f"the node sent log {log.log_index} of block {log.block_number}, of {log.address}: {wrong}",
                evidence=log.tx_hash,
            )
        if hashes.setdefault(log.block_number, log.block_hash) != log.block_hash:
            raise Moved(f"the node tells logs of two blocks {log.block_number}: its history changes, or it is torn")
        place = here


def _wanted(topics: Sequence[bytes], wanted: Sequence[Topic]) -> bool:
    return len(topics) >= len(wanted) and all(
        want is None or topic == want or (not isinstance(want, bytes) and topic in want)
        for topic, want in zip(topics, wanted, strict=False)
    )
