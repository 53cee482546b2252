"""The indexer on nodes that take blocks back, limit, lag, contradict one another, or lie."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chain_support import key
from index_world import COIN, PEOPLE, SHARE, FakeNode, Several, contents, emitted, fresh, index_of
from tessera.chain.faces import Coin, ModelShare
from tessera.chain.indexer.engine import Config, Indexer
from tessera.chain.indexer.model_share import ShareView
from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Late, Misbehaviour, Refused, TesseraError, Unavailable

pytestmark = [pytest.mark.anyio, pytest.mark.slow]  # each of them folds many times; the plain ones are elsewhere
PAYER, OTHER = PEOPLE[0], PEOPLE[1]
CONFIG = Config(window_blocks=4, chunk_blocks=7, behind_s=0)


def payment(amount: int) -> dict[str, Any]:
    return emitted(Coin.Transfer, COIN, PAYER, SHARE, amount)


def claim(amount: int) -> dict[str, Any]:
    return emitted(ModelShare.Claimed, SHARE, OTHER, amount)


def grown(blocks: int, seed: int = 1) -> FakeNode:
    node = FakeNode()
    node.grow(random.Random(seed), blocks)
    return node


async def equals_the_chain(index: Indexer, node: FakeNode) -> bool:
    return contents(index) == await fresh(node, CONFIG)


# --- reorgs -----------------------------------------------------------------------------------------------------------


async def test_a_payment_in_a_block_that_is_taken_back_is_forgotten(database_url: str) -> None:
    node = FakeNode()
    node.mine(payment(5))
    node.mine(payment(30), claim(7))
    index = index_of(node, database_url)
    await index.update()
    told = ShareView(index.queries)
    assert (told.revenue().amount, told.revenue().count) == (35, 2)
    node.cut(1)
    node.mine(claim(2))
    await index.update()
    assert (told.revenue().amount, told.revenue().count) == (5, 1)
    assert told.revenue().tx_hash == node.blocks[1].logs[0]["transactionHash"]
    assert told.claimed()[OTHER].amount == 2
    assert await equals_the_chain(index, node)
    index.close()


async def test_a_figure_without_facts_is_gone_after_a_reorg() -> None:
    node = FakeNode()
    node.mine()
    index = index_of(node)
    node.mine(payment(5))
    await index.update()
    node.cut(1)
    node.mine()
    await index.update()
    assert ShareView(index.queries).payments.by_payer() == {}
    assert contents(index) == ([], [])
    index.close()


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 11, 12])
async def test_a_reorg_of_any_depth_ends_in_the_tables_of_a_fresh_index(depth: int, database_url: str) -> None:
    """Up to the window it is followed back, beyond it the tables are built again."""
    node = grown(12)
    index = index_of(node, database_url, CONFIG)
    await index.update()
    node.cut(depth)
    node.grow(random.Random(2), depth + 1)
    await index.update()
    assert await equals_the_chain(index, node)
    index.close()


async def test_a_reorg_within_the_window_reads_no_more_than_the_window_again() -> None:
    node = grown(200)
    index = index_of(node, config=CONFIG)
    await index.update()
    node.cut(2)
    node.grow(random.Random(2), 3)
    before = node.requests
    await index.update()
    assert node.requests - before < 30  # 200 blocks in chunks of 7 took 130
    assert await equals_the_chain(index, node)
    index.close()


@pytest.mark.parametrize("request_number", range(1, 40))
async def test_a_reorg_between_any_two_requests_leaves_no_trace(request_number: int) -> None:
    node = grown(16, seed=3)
    index = index_of(node, config=CONFIG)

    def strike(number: int) -> None:
        if number == request_number:
            node.cut(6)
            node.grow(random.Random(4), 7)

    node.at_request = strike
    await index.update()
    node.at_request = lambda number: None
    await index.update()
    assert await equals_the_chain(index, node)
    index.close()


async def test_a_chain_that_never_rests_is_given_up_for_now() -> None:
    node = grown(6)
    index = index_of(node, config=CONFIG)

    def strike(number: int) -> None:
        node.cut(3)
        node.grow(random.Random(number), 3)

    node.at_request = strike
    with pytest.raises(Unavailable, match=r"keeps changing|follow|logs of"):
        await index.update()
    node.at_request = lambda number: None
    await index.update()
    assert await equals_the_chain(index, node)
    index.close()


async def test_a_reorg_that_another_process_has_followed_is_not_followed_twice(tmp_path: Path) -> None:
    node = grown(9)
    first, second = (index_of(node, tmp_path / "index.sqlite", CONFIG) for _ in range(2))
    await first.update()
    seen = second.queries.mark()
    node.cut(2)
    node.grow(random.Random(2), 2)
    await first.update()
    await second._roll_back(seen, seen.settled)  # decided before the first one was through
    assert await equals_the_chain(second, node)
    first.close()
    second.close()


# --- nodes that limit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        Refused("query returned more than 10000 results", rule="rpc_limit", rpc_code=-32005),
        Refused("block range is too wide", rule="node", rpc_code=-32062),
    ],
)
@pytest.mark.parametrize(("longest_range", "most_logs"), [(1, 99), (3, 99), (99, 4)])
async def test_a_node_that_limits_is_asked_for_less(refusal: Refused, longest_range: int, most_logs: int) -> None:
    node = grown(60)
    node.longest_range, node.most_logs, node.refusal = longest_range, most_logs, refusal
    index = index_of(node, config=CONFIG)
    await index.update()
    assert contents(index) == await fresh(grown(60), CONFIG)
    index.close()


async def test_a_node_that_declines_a_single_block_is_told_so() -> None:
    node = grown(60)
    node.longest_range = 0
    index = index_of(node, config=CONFIG)
    with pytest.raises(Refused, match="too wide"):
        await index.update()
    index.close()


async def test_a_node_that_takes_too_long_is_asked_for_less_next_time() -> None:
    node = grown(60)
    index = index_of(node, config=CONFIG)

    def slow(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        raise Late("no answer to eth_getLogs in 30 s")

    node.tamper = slow
    with pytest.raises(Late):
        await index.update()
    assert index._chunk == 3
    node.tamper = lambda logs: logs
    await index.update()
    assert await equals_the_chain(index, node)
    index.close()


async def test_a_chunk_full_of_facts_makes_the_next_one_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.chain.indexer.engine.MANY_FACTS", 2)
    node = FakeNode()
    for amount in range(40):
        node.mine(payment(amount), payment(amount))
    index = index_of(node, config=CONFIG)
    await index.update()
    assert index._chunk == 1
    assert await equals_the_chain(index, node)
    index.close()


# --- nodes that lag ---------------------------------------------------------------------------------------------------


async def test_a_late_node_takes_nothing_back_and_a_shorter_chain_does() -> None:
    node, clock = grown(9), FakeClock()
    index = index_of(node, config=Config(window_blocks=4, behind_s=60), clock=clock)
    await index.update()
    whole, blocks = contents(index), list(node.blocks)
    del node.blocks[8:]
    assert await index.update() == 9
    clock.advance(59)
    assert await index.update() == 9
    assert contents(index) == whole
    node.blocks.append(blocks[8])  # it moves, so it lives
    clock.advance(59)
    assert await index.update() == 9
    clock.advance(61)
    assert await index.update() == 8
    assert await equals_the_chain(index, node)
    node.blocks.append(blocks[9])
    assert await index.update() == 9
    assert contents(index) == whole
    index.close()


async def test_a_chain_cut_below_the_window_is_read_again() -> None:
    node, clock = grown(30), FakeClock()
    index = index_of(node, config=Config(window_blocks=4, behind_s=60), clock=clock)
    await index.update()
    node.cut(25)
    assert await index.update() == 30
    clock.advance(61)
    assert await index.update() == 5
    assert await equals_the_chain(index, node)
    index.close()


@pytest.mark.parametrize("seed", range(5))
async def test_two_nodes_that_differ_by_a_block_lose_nothing(seed: int) -> None:
    """Behind one URL: each request goes to either, and no block that was seen is taken back."""
    ahead, behind = FakeNode(), FakeNode()
    rng = random.Random(seed)
    both = Several([ahead, behind], lambda number: rng.randrange(2))
    index = index_of(both, config=Config(window_blocks=4, chunk_blocks=7, behind_s=60), clock=FakeClock())
    reached = 0
    for _ in range(40):
        behind.blocks = list(ahead.blocks)
        ahead.grow(rng, 1)
        last = await index.update()
        assert last >= reached
        reached = last
    behind.blocks = list(ahead.blocks)
    await index.update()
    assert await equals_the_chain(index, ahead)
    index.close()


async def test_two_nodes_with_different_histories_are_an_error_that_says_so() -> None:
    one, two = grown(6), FakeNode()
    two.blocks = one.blocks[:3]
    two.salt = 99
    two.grow(random.Random(5), 4)
    index = index_of(Several([one, two], lambda number: number % 2), config=CONFIG)

    async def follow() -> None:
        for _ in range(20):
            await index.update()

    with pytest.raises(Unavailable, match=r"ask again later|does not follow|tells no logs|became another"):
        await follow()
    index.close()


async def test_a_log_that_was_kept_back_is_found_when_its_block_leaves_the_window() -> None:
    """Some nodes answer with nothing, instead of an error, for a block that they do not have yet."""
    node = FakeNode()
    node.grow(random.Random(1), 10)
    index = index_of(node, config=CONFIG)
    await index.update()
    node.tamper = lambda logs: []
    node.mine(payment(77))
    await index.update()
    node.tamper = lambda logs: logs
    before = ShareView(index.queries).revenue().amount
    for _ in range(12):
        node.mine(payment(1))
        await index.update()
    assert ShareView(index.queries).revenue().amount == before + 77 + 12
    assert await equals_the_chain(index, node)
    index.close()


async def test_a_node_that_fails_leaves_what_was_stored() -> None:
    node = grown(40)
    index = index_of(node, config=CONFIG)

    def fail(number: int) -> None:
        if number == 30:
            raise Unavailable("connection refused")

    node.at_request = fail
    with pytest.raises(Unavailable, match="connection refused"):
        await index.update()
    assert 0 < index.last_block < 40
    await index.update()
    assert await equals_the_chain(index, node)
    index.close()


# --- nodes that lie ---------------------------------------------------------------------------------------------------

Logs = list[dict[str, Any]]


def _other_hash(logs: Logs) -> Logs:
    return [{**logs[0], "blockHash": "0x" + "77" * 32}, *logs[1:]]


@pytest.mark.parametrize(
    ("tamper", "error", "match"),
    [
        (lambda logs: logs[::-1], Misbehaviour, "torn, doubled or out of order"),
        (lambda logs: [logs[0], *logs], Misbehaviour, "torn, doubled or out of order"),
        (lambda logs: [{**logs[0], "address": key("stranger").account}], Misbehaviour, "expected model_share at"),
        (lambda logs: [{**logs[0], "topics": ["0x" + "11" * 32]}], Misbehaviour, "expected model_share at"),
        (lambda logs: [{**logs[0], "blockNumber": hex(999)}], Misbehaviour, "expected blocks"),
        (lambda logs: [{**logs[0], "data": "0x"}], Invalid, "expected"),
        (lambda logs: [{**logs[0], "blockHash": None}], Invalid, "expected 0x and hex digits, not 'None'"),
        (lambda logs: [{**logs[0], "topics": 7}], Invalid, "log that cannot be read"),
        (_other_hash, Unavailable, "logs of two blocks"),
    ],
)
@pytest.mark.parametrize("deep", [True, False])
async def test_a_lying_node_is_named_and_nothing_is_stored(
    tamper: Callable[[Logs], Logs], error: type[TesseraError], match: str, deep: bool
) -> None:
    node = FakeNode()
    node.mine(claim(1), claim(2), claim(3))
    for _ in range(20 if deep else 0):
        node.mine()
    node.tamper = lambda logs: tamper(logs) if logs else logs
    index = index_of(node, config=Config(window_blocks=4, behind_s=0))
    with pytest.raises(error, match=match):
        await index.update()
    assert contents(index) == ([], [])
    index.close()


async def test_a_node_that_answers_for_another_block_is_named() -> None:
    node = grown(5)
    real = node._header
    node._header = lambda tag: real("0x1") if tag != "latest" else real(tag)  # type: ignore[method-assign]
    index = index_of(node)
    with pytest.raises(Misbehaviour, match="asked for block 0, the node sent 1"):
        await index.update()
    index.close()


async def test_a_node_without_blocks_is_unavailable() -> None:
    node = FakeNode()
    node._header = lambda tag: None  # type: ignore[method-assign]
    index = index_of(node)
    with pytest.raises(Unavailable, match="no block at all"):
        await index.update()
    index.close()
