"""A chain's state at one block, beside its journal, so that a long journal need not be replayed at each start.

The journal alone is the ledger; this file can be deleted at any time. Nothing in it is believed: each block that it
helps to restore must hash to what the journal says, each node of the state is named by its own hash, and the state must
be whole below the root that the journal has for the block. A file that fails in anything, down to its last bit, is
thrown away, and the journal replayed in full. Members who check an operator never use one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import structlog

from tessera.chain.blocks import NO_BLOOM, Block, RawLog, restore_block
from tessera.chain.genesis import Genesis
from tessera.chain.journal import Journal
from tessera.chain.world import World
from tessera.core.hashing import keccak

__all__ = ["Checkpoint"]

log = structlog.get_logger()

FORMAT = 1
GARBAGE_FACTOR, GARBAGE_FROM = 4, 50_000  # nodes in the file for each node that the newest state needs
_SCHEMA = """
create table head(number integer not null);
create table receipts(number integer primary key, ok integer not null, logs blob not null, bloom blob not null);
create table nodes(content blob not null);
"""


class _Damaged(Exception):
    """The file is not what it should be."""


class Checkpoint:
    """The checkpoint file of one chain. Never raises for what the file holds or the disk does: it logs, and goes on
    without. Use it from one thread at a time, under the journal's own lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._height = -1  # of the last block that is in the file
        self._failed_at = -1  # where the disk refused
        self._names: set[bytes] = set()  # nodes in the file
        self._live = 0  # nodes that the state needed when the file was last written anew

    @property
    def height(self) -> int:
        """Of the newest block in the file; -1 without one."""
        return self._height

    def load(self, journal: Journal, genesis: Genesis) -> tuple[list[Block], World] | None:
        """All blocks up to the checkpoint, and the state there; None when there is no good checkpoint.

        Raises: as `Journal.entries`.

        Cost: about 0.1 ms a block and 30 µs a node.
        """
        if not self._path.exists():
            return None
        try:
            self._open()
            assert self._db is not None
            found = self._restored(self._db, journal, genesis)
        except (_Damaged, sqlite3.Error, KeyError, ValueError, TypeError, IndexError) as error:
            log.warning("checkpoint_ignored", file=str(self._path), reason=str(error)[:200])
            self._discard()
            return None
        return found

    def save(self, blocks: Sequence[Block], world: World, least: int) -> None:
        """Bring the file up to the last block, when that is at least `least` blocks after what it has.

        Cost: about 20 µs a block since then, and 30 µs for each node that has changed.
        """
        head = blocks[-1]
        if head.number - max(self._height, self._failed_at) < least:
            return
        try:
            self._open()
            assert self._db is not None
            self._write(self._db, blocks, world)
        except sqlite3.Error as error:  # a full disk, for one: the journal says so itself, when it matters
            log.warning("checkpoint_not_written", file=str(self._path), reason=str(error)[:200])
            self._discard()
            self._failed_at = head.number  # tried again after as many blocks, then with all of it

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._db is not None:
            return
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._db.execute("pragma synchronous = normal")
        (version,) = self._db.execute("pragma user_version").fetchone()
        (tables,) = self._db.execute("select count(*) from sqlite_master").fetchone()
        if version == 0 and tables == 0:
            self._db.execute("begin")
            for statement in _SCHEMA.split(";")[:-1]:
                self._db.execute(statement)
            self._db.execute(f"pragma user_version = {FORMAT}")
            self._db.execute("commit")
        elif version != FORMAT:
            raise _Damaged(f"format {version}, this version reads {FORMAT}")

    def _discard(self) -> None:
        """Away with the file."""
        self.close()
        self._height, self._live = -1, 0
        self._names.clear()
        for path in (self._path, self._path.with_name(self._path.name + "-journal")):
            path.unlink(missing_ok=True)

    def _restored(self, db: sqlite3.Connection, journal: Journal, genesis: Genesis) -> tuple[list[Block], World] | None:
        row = db.execute("select number from head").fetchone()
        if row is None:
            return None
        blocks = list(_blocks(db, journal, genesis, row[0]))
        content = {keccak(node): node for (node,) in db.execute("select content from nodes")}
        world = World.restored(blocks[-1].state_root, content)
        self._height, self._names, self._live = row[0], set(content), sum(1 for _ in world.contents())
        return blocks, world

    def _write(self, db: sqlite3.Connection, blocks: Sequence[Block], world: World) -> None:
        head, names = blocks[-1], self._names
        anew = len(names) > GARBAGE_FACTOR * self._live + GARBAGE_FROM
        if anew:
            names = set()
        new = dict(world.contents(names))
        kept = [
            (block.number, block.ok, _packed(block.logs), b"" if block.bloom == NO_BLOOM else block.bloom)
            for block in blocks[self._height + 1 :]
        ]
        db.execute("begin")
        try:
            if anew:
                db.execute("delete from nodes")
            db.executemany("insert into nodes values(?)", ((node,) for node in new.values()))
            db.executemany("insert into receipts values(?, ?, ?, ?)", kept)
            db.execute("delete from head")
            db.execute("insert into head values(?)", (head.number,))
            db.execute("commit")
        except BaseException:
            db.execute("rollback")
            raise
        self._names = names | new.keys()
        self._height = head.number
        if anew or not self._live:
            self._live = len(new)


def _blocks(db: sqlite3.Connection, journal: Journal, genesis: Genesis, height: int) -> Iterator[Block]:
    """Blocks 0 to `height`, each found to hash to what the journal says."""
    receipts = db.execute("select number, ok, logs, bloom from receipts order by number")
    parent: Block | None = None
    for entry, (number, ok, logs, bits) in zip(islice(journal.entries(), height + 1), receipts, strict=True):
        if parent is None:
            block, _ = genesis.block(entry.timestamp)
        else:
            kept = (bool(ok), entry.gas_used, _unpacked(logs))
            block = restore_block(
                entry.number, entry.timestamp, parent.hash, entry.state_root, entry.raw, kept, bits or NO_BLOOM
            )
        if not number == entry.number == block.number or block.hash != entry.hash:
            raise _Damaged(f"block {number} is not the journal's")
        yield block
        parent = block
    if parent is None or parent.number != height:
        raise _Damaged(f"the journal does not reach block {height}")


def _packed(logs: Sequence[RawLog]) -> bytes:
    """Address, number of topics, topics, length of data, data; one event after the other."""
    return b"".join(
        address + bytes([len(topics)]) + b"".join(topics) + len(data).to_bytes(4, "big") + data
        for address, topics, data in logs
    )


def _unpacked(packed: bytes) -> tuple[RawLog, ...]:
    logs: list[RawLog] = []
    at = 0
    while at < len(packed):
        address, end = packed[at : at + 20], at + 21 + 32 * packed[at + 20]
        topics = tuple(packed[i : i + 32] for i in range(at + 21, end, 32))
        at = end + 4 + int.from_bytes(packed[end : end + 4], "big")
        logs.append((address, topics, packed[end + 4 : at]))
    return tuple(logs)
