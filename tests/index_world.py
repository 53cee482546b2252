"""A node that can do everything wrong, and what tests of the indexer ask of tables.

`FakeNode` answers the indexer's four JSON-RPC methods from a list of blocks that a test makes, takes back and makes
otherwise. `Several` puts nodes behind one URL.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from chain_support import key
from tessera.chain import abi
from tessera.chain.client import RpcChain
from tessera.chain.face import Event
from tessera.chain.faces import Coin, ModelShare
from tessera.chain.indexer.coin import payments_to
from tessera.chain.indexer.engine import Config, Indexer
from tessera.chain.indexer.facts import Source
from tessera.chain.indexer.model_share import MODEL_SHARE
from tessera.chain.indexer.tables import FACTS, TOTALS
from tessera.chain.rpc import Rpc
from tessera.core.clock import Clock
from tessera.core.errors import Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account

CHAIN_ID = 31_337
SHARE, COIN = key("share contract").account, key("coin contract").account
PEOPLE = [key(name).account for name in ("holder", "other", "buyer", "late_worker")]
SOURCES: Sequence[Source] = (MODEL_SHARE.at(SHARE), payments_to(COIN, SHARE))


def emitted(kind: type[Event], address: Account, *values: Any) -> dict[str, Any]:
    """An event as a node tells it, without its place."""
    types = [*kind.INDEXED, *kind.PLAIN]
    by_position = dict(zip(kind.ORDER, values, strict=True))
    coded = [abi.encode([types[i]], [by_position[i]]) for i in range(len(kind.INDEXED))]
    plain = [by_position[i] for i in range(len(kind.INDEXED), len(types))]
    topics = [kind.TOPIC, *coded]
    return {
        "address": address,
        "topics": ["0x" + topic.hex() for topic in topics],
        "data": "0x" + abi.encode(kind.PLAIN, plain).hex(),
    }


def some_event(rng: random.Random) -> dict[str, Any]:
    """Anything that the two contracts emit, with what is nobody's business among it."""
    one, two, amount = rng.choice(PEOPLE), rng.choice(PEOPLE), rng.choice([1, 7, 10**18, 2**200])
    return rng.choice(
        [
            emitted(ModelShare.Posted, SHARE, rng.randrange(3), bytes(32), amount),
            emitted(ModelShare.Redeemed, SHARE, rng.randrange(3), one, amount),
            emitted(ModelShare.Transfer, SHARE, one, two, amount),
            emitted(ModelShare.Claimed, SHARE, one, amount),
            emitted(ModelShare.Approval, SHARE, one, two, amount),
            emitted(ModelShare.Distributed, SHARE, amount, 5),
            emitted(Coin.Transfer, COIN, one, SHARE, amount),
            emitted(Coin.Transfer, COIN, one, two, amount),
        ]
    )


@dataclass(frozen=True)
class FakeBlock:
    number: int
    hash: str
    parent: str
    logs: tuple[dict[str, Any], ...]


def make_block(parent: FakeBlock | None, events: Iterable[dict[str, Any]], salt: int) -> FakeBlock:
    number, before = (0, "0x" + "00" * 32) if parent is None else (parent.number + 1, parent.hash)
    block_hash = "0x" + keccak(f"{before} {number} {salt}".encode()).hex()
    logs = tuple(
        {
            **event,
            "blockNumber": hex(number),
            "blockHash": block_hash,
            "logIndex": hex(index),
            "transactionHash": "0x" + keccak(f"{block_hash} {index}".encode()).hex(),
        }
        for index, event in enumerate(events)
    )
    return FakeBlock(number, block_hash, before, logs)


@dataclass
class FakeNode:
    """One node.

    Args:
        longest_range: blocks in one question, beyond which it declines with `refusal`.
        most_logs: events in one answer, likewise.
        tamper: changes an answer to eth_getLogs on its way out.
        at_request: called before each request, with its number from 1 on.
    """

    blocks: list[FakeBlock] = field(default_factory=lambda: [make_block(None, [], 0)])
    longest_range: int = 10**9
    most_logs: int = 10**9
    refusal: Refused = field(default_factory=lambda: Refused("block range is too wide", rule="node", rpc_code=-32062))
    tamper: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda logs: logs
    at_request: Callable[[int], None] = lambda number: None
    requests: int = 0
    salt: int = 0

    def mine(self, *events: dict[str, Any]) -> None:
        self.salt += 1
        self.blocks.append(make_block(self.blocks[-1], events, self.salt))

    def grow(self, rng: random.Random, blocks: int, events: int = 3) -> None:
        for _ in range(blocks):
            self.mine(*(some_event(rng) for _ in range(rng.randrange(events + 1))))

    def cut(self, depth: int) -> None:
        """The last blocks never happened."""
        del self.blocks[max(1, len(self.blocks) - depth) :]

    async def request(self, method: str, params: list[Any]) -> Any:
        self.requests += 1
        self.at_request(self.requests)
        if method == "eth_chainId":
            return hex(CHAIN_ID)
        if method == "eth_getBlockByNumber":
            return self._header(params[0])
        assert method == "eth_getLogs", method
        return self.tamper(self._logs(params[0]))

    def _header(self, tag: str) -> Any:
        number = len(self.blocks) - 1 if tag == "latest" else int(tag, 16)
        if number >= len(self.blocks):
            return None
        block = self.blocks[number]
        return {"number": hex(number), "hash": block.hash, "parentHash": block.parent, "timestamp": hex(1_000 + number)}

    def _logs(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        if "blockHash" in query:
            blocks = [block for block in self.blocks if block.hash == query["blockHash"]]
            if not blocks:
                raise Refused("unknown block", rule="node", rpc_code=-32000)
        else:
            first, last = int(query["fromBlock"], 16), int(query["toBlock"], 16)
            if last - first >= self.longest_range:
                raise self.refusal
            blocks = self.blocks[first : last + 1]
        found = [dict(log) for block in blocks for log in block.logs if _matches(log, query)]
        if len(found) > self.most_logs:
            raise self.refusal
        return found


@dataclass
class Several:
    """Nodes behind one URL; `pick` says which one answers a request."""

    nodes: Sequence[FakeNode]
    pick: Callable[[int], int]
    requests: int = 0

    async def request(self, method: str, params: list[Any]) -> Any:
        self.requests += 1
        return await self.nodes[self.pick(self.requests)].request(method, params)


def index_of(
    node: Rpc, where: Path | str | None = None, config: Config | None = None, clock: Clock | None = None
) -> Indexer:
    return Indexer(where, RpcChain(node), SOURCES, config=config or Config(behind_s=0), clock=clock)


def contents(index: Indexer) -> tuple[list[Any], list[Any]]:
    """All facts and totals, row by row."""
    with index._db.read() as db:
        tables = [db.execute(select(table).order_by(*table.primary_key)).all() for table in (FACTS, TOTALS)]
    return [tuple(row) for row in tables[0]], [tuple(row) for row in tables[1]]


async def fresh(node: Rpc, config: Config | None = None) -> tuple[list[Any], list[Any]]:
    """What an index holds that has seen nothing but the present chain."""
    index = index_of(node, config=config)
    try:
        await index.update()
        return contents(index)
    finally:
        index.close()


def _matches(log: dict[str, Any], query: dict[str, Any]) -> bool:
    if log["address"] != query["address"]:
        return False
    for position, want in enumerate(query["topics"]):
        topic = log["topics"][position] if position < len(log["topics"]) else None
        if want is not None and topic != want and topic not in want:
            return False
    return True
