"""Checkpoints: a long journal starts from one, and nothing in one is believed that the journal does not bear out."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tessera.chain.checkpoint as checkpoint_module
import tessera.chain.local as local_module
from chain_support import CHAIN_ID, NOW, WORKERS, key, make_world
from tessera.chain.blocks import Block
from tessera.chain.checkpoint import Checkpoint
from tessera.chain.faces import Coin
from tessera.chain.journal import Entry
from tessera.chain.local import LocalChain
from tessera.chain.replay import replay, verify_journal
from tessera.chain.transactions import Transaction, sign
from tessera.chain.world import World
from tessera.core.clock import FakeClock
from tessera.core.errors import Invalid, Missing

pytestmark = pytest.mark.anyio
HOLDER = key("holder")


def opened(path: Path) -> LocalChain:
    return LocalChain(path, chain_id=CHAIN_ID, clock=FakeClock(NOW), dev=True)


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".checkpoint")


def blocks_of(chain: LocalChain) -> list[Block | None]:
    return [chain.block(number) for number in range(chain.head.number + 1)]


def extend(chain: LocalChain, count: int) -> None:
    nonce = chain.state().nonce(bytes.fromhex(HOLDER.account[2:]))
    for n in range(nonce, nonce + count):
        to = key(f"somebody {n}").account
        chain.submit(sign(HOLDER, Transaction(CHAIN_ID, n, to, 0, b"", 21_000, 0, 0))[0])


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at each opening and closing."""
    monkeypatch.setattr(local_module, "CHECKPOINT_LEAST", 1)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Heights that were replayed since."""
    heights: list[int] = []

    def counted(entries: Iterable[Entry], *arguments: Any, **options: Any) -> Iterable[tuple[Block, World]]:
        for block, world in replay(entries, *arguments, **options):
            heights.append(block.number)
            yield block, world

    monkeypatch.setattr(local_module, "replay", counted)
    return heights


_made: list[tuple[bytes, bytes, list[Block | None]]] = []


@pytest.fixture
async def chain_file(tmp_path: Path) -> tuple[Path, list[Block | None]]:
    """A closed chain with its checkpoint: contracts, events, a failure, an empty block. Made once, then copied."""
    path = tmp_path / "chain.db"
    if not _made:
        with opened(path) as chain:
            world = await make_world(chain.client())
            await world.give({HOLDER.account: 3})
            await world.earn(100)
            chain.mine()
            poor = Transaction(CHAIN_ID, 0, world.coin.address, 0, bytes.fromhex("a9059cbb") + bytes(64), 90_000, 0, 0)
            chain.submit(sign(key("poor"), poor)[0])
            assert not chain.head.ok
            blocks = blocks_of(chain)
        _made.append((path.read_bytes(), beside(path).read_bytes(), blocks))
    journal, checkpoint, blocks = _made[0]
    path.write_bytes(journal)
    beside(path).write_bytes(checkpoint)
    return path, blocks


async def test_a_chain_starts_from_its_checkpoint_as_if_it_had_been_replayed(
    chain_file: tuple[Path, list[Block | None]], replayed: list[int]
) -> None:
    path, blocks = chain_file
    with opened(path) as chain:
        assert replayed == []
        assert blocks_of(chain) == blocks
        assert [block and block.transaction for block in blocks_of(chain)] == [b and b.transaction for b in blocks]
        logs = await chain.client().logs(None, [], 0)
        assert len(logs) == sum(len(block.logs) for block in blocks if block)
        await Coin.deploy(chain.client(), WORKERS[1])
        extend(chain, 3)
        root = chain.state_root()
    with opened(path) as chain:
        assert replayed == []
        assert chain.state_root() == root
    beside(path).unlink()
    with opened(path) as chain:
        assert replayed == list(range(chain.head.number + 1))
        assert chain.state_root() == root


async def test_only_what_came_after_the_checkpoint_is_replayed(
    chain_file: tuple[Path, list[Block | None]], replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, blocks = chain_file
    monkeypatch.setattr(local_module, "CHECKPOINT_LEAST", 1_000)
    with opened(path) as chain:
        extend(chain, 5)
        root = chain.state_root()
    with opened(path) as chain:
        assert replayed == list(range(len(blocks), len(blocks) + 5))
        assert chain.state_root() == root


async def test_a_chain_at_work_checkpoints_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "CHECKPOINT_LEAST", 1_000)
    monkeypatch.setattr(local_module, "CHECKPOINT_EVERY", 4)
    with opened(tmp_path / "chain.db") as chain:
        extend(chain, 10)
        assert chain._checkpoint
        assert chain._checkpoint.height == 7


async def test_old_states_are_missing_and_say_so(chain_file: tuple[Path, list[Block | None]]) -> None:
    path, _ = chain_file
    with opened(path) as chain, pytest.raises(Missing, match="no longer kept"):
        chain.state(2)


async def test_members_replay_all_of_it_all_the_same(chain_file: tuple[Path, list[Block | None]]) -> None:
    path, blocks = chain_file
    with opened(path) as chain:
        entries = chain.entries()
        head = verify_journal(entries, chain_id=CHAIN_ID)
    assert (head.number, head.hash) == (len(blocks) - 1, blocks[-1].hash if blocks[-1] else b"")


DAMAGE = {
    "a node is gone": "delete from nodes where rowid = (select max(rowid) from nodes)",
    "a contract is gone": "delete from nodes where length(content) = (select max(length(content)) from nodes)",
    "a node is another": "update nodes set content = zeroblob(100) where rowid = 3",
    "a node is text": "update nodes set content = 'text' where rowid = 3",
    "a failure succeeds": "update receipts set ok = 1 where ok = 0",
    "a success fails": "update receipts set ok = 0 where number = 3",
    "an event is gone": "update receipts set logs = x'' where length(logs) > 0",
    "an event is cut": "update receipts set logs = substr(logs, 1, 30) where length(logs) > 0",
    "a bloom is empty": "update receipts set bloom = zeroblob(256) where length(bloom) > 0",
    "a receipt is gone": "delete from receipts where number = 4",
    "a receipt is too many": "insert into receipts values(500, 1, x'', x'')",
    "receipts are swapped": "update receipts set number = case number when 3 then 4 when 4 then 3 end + 1000 "
    "where number in (3, 4)",
    "the head is beyond the journal": "update head set number = 900",
    "the head is before": "update head set number = 3",
    "the head is text": "update head set number = 'x'",
    "no table": "drop table nodes",
    "another format": "pragma user_version = 9",
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_checkpoint_is_ignored_and_made_again(
    chain_file: tuple[Path, list[Block | None]], replayed: list[int], damage: str
) -> None:
    path, blocks = chain_file
    with sqlite3.connect(beside(path)) as database:
        database.execute(DAMAGE[damage])
    database.close()
    with opened(path) as chain:
        assert blocks_of(chain) == blocks
        assert replayed == list(range(len(blocks)))
    replayed.clear()
    with opened(path) as chain:
        assert (blocks_of(chain), replayed) == (blocks, [])


@pytest.mark.parametrize("content", [b"", b"some text" * 500, b"SQLite format 3\0" + bytes(4_000)])
async def test_a_file_that_is_no_checkpoint_is_ignored(
    chain_file: tuple[Path, list[Block | None]], replayed: list[int], content: bytes
) -> None:
    path, blocks = chain_file
    beside(path).write_bytes(content)
    with opened(path) as chain:
        assert blocks_of(chain) == blocks
        assert replayed == list(range(len(blocks)))


@pytest.mark.slow
async def test_no_flipped_bit_changes_what_a_chain_says(chain_file: tuple[Path, list[Block | None]]) -> None:
    path, blocks = chain_file
    good = beside(path).read_bytes()
    chance = random.Random(5)
    for _ in range(12):
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        beside(path).write_bytes(bad)
        with opened(path) as chain:
            assert blocks_of(chain) == blocks
            assert chain.state().code(bytes(blocks[1].contract or b"")) if blocks[1] else False


async def test_another_chains_checkpoint_is_ignored(
    chain_file: tuple[Path, list[Block | None]], tmp_path: Path, replayed: list[int]
) -> None:
    path, blocks = chain_file
    with opened(tmp_path / "other.db") as other:
        extend(other, 4)
    shutil.copy(beside(tmp_path / "other.db"), beside(path))
    replayed.clear()
    with opened(path) as chain:
        assert blocks_of(chain) == blocks
        assert replayed == list(range(len(blocks)))


async def test_a_checkpoint_does_not_hide_a_damaged_journal(chain_file: tuple[Path, list[Block | None]]) -> None:
    path, _ = chain_file
    with sqlite3.connect(path) as database:
        database.execute("update blocks set gas_used = gas_used + 1 where number = 3")
    database.close()
    with pytest.raises(Invalid, match="block 3"):
        opened(path)


async def test_a_disk_that_refuses_the_checkpoint_does_not_stop_the_chain(
    chain_file: tuple[Path, list[Block | None]], replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Checkpoint, *arguments: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    path, blocks = chain_file
    monkeypatch.setattr(local_module, "CHECKPOINT_EVERY", 2)
    with opened(path) as chain:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "_write", full)
            extend(chain, 5)
        assert chain.head.number == len(blocks) + 4
        extend(chain, 4)
        assert chain._checkpoint
        assert chain._checkpoint.height >= len(blocks) + 5  # tried again
        after = blocks_of(chain)
    replayed.clear()
    with opened(path) as chain:
        assert (blocks_of(chain), replayed) == (after, [])  # it was whole


@pytest.mark.slow
async def test_a_start_from_a_checkpoint_takes_a_fraction_of_a_replay(tmp_path: Path, replayed: list[int]) -> None:
    """In CPU time of this thread. 20,000 transactions: 2 s from the checkpoint, about a minute without."""
    path = tmp_path / "chain.db"
    chain = opened(path)
    chain._journal._db.execute("pragma synchronous = off")  # what is measured is not the disk
    coin = await Coin.deploy(chain.client(), HOLDER)
    await coin.mint(HOLDER, HOLDER.account, 10**6)
    to, body = coin.address, bytes.fromhex("a9059cbb") + bytes(12)
    for n in range(2, 1_500):
        data = body + bytes.fromhex(key(f"somebody {n}").account[2:]) + (1).to_bytes(32, "big")
        chain.submit(sign(HOLDER, Transaction(CHAIN_ID, n, to, 0, data, 100_000, 0, 0))[0])
    root = chain.state_root()
    chain.close()
    took = []
    for _ in range(2):
        started = time.thread_time()
        with opened(path) as chain:
            took.append(time.thread_time() - started)
            assert chain.state_root() == root
        beside(path).unlink()
    assert len(replayed) == 1_501
    print(f"from the checkpoint {took[0]:.2f} s, replayed {took[1]:.2f} s")  # noqa: T201
    assert took[0] < took[1] / 5


async def test_nodes_of_old_states_do_not_pile_up(
    chain_file: tuple[Path, list[Block | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = chain_file
    monkeypatch.setattr(local_module, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(checkpoint_module, "GARBAGE_FROM", 10)
    monkeypatch.setattr(checkpoint_module, "GARBAGE_FACTOR", 2)
    with opened(path) as chain:
        extend(chain, 60)
        live = len(dict(chain._view.world.contents()))
        root = chain.state_root()
    with sqlite3.connect(beside(path)) as database:
        (stored,) = database.execute("select count(*) from nodes").fetchone()
    database.close()
    assert live <= stored <= 2 * live + 10 + 20
    with opened(path) as chain:
        assert chain.state_root() == root
        assert replace(chain.head, size=0) != chain.head
