"""The chain on disk: an append-only SQLite table with one row for each block.

A row holds the raw transaction and what came of it (gas, state root, block hash), so that whoever has the rows can
replay them and compare. A row is on the disk before anybody is told of its block: the database runs in WAL mode with
synchronous=FULL, because a receipt that was shown must survive a power cut. One process at a time may have the file.

It is one operator's own ledger and no table that others share: so it stays a SQLite file with an exclusive lock, and
takes no database URL as `tessera.storage` does.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.core.errors import Conflict, Invalid, Unavailable

__all__ = ["Entry", "Journal"]

APPLICATION_ID = 0x54535241  # "TSRA"
FORMAT = 1
_COLUMNS = "number, timestamp, raw, gas_used, state_root, hash"
_SCHEMA = """
create table meta(name text primary key, value text not null) without rowid;
create table blocks(
    number integer primary key,
    timestamp integer not null,
    raw blob,
    gas_used integer not null,
    state_root blob not null,
    hash blob not null
);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One block as the journal has it. `raw` is None for blocks without a transaction."""

    number: int
    timestamp: int
    raw: bytes | None
    gas_used: int
    state_root: bytes
    hash: bytes

    def to_value(self) -> dict[str, Any]:
        """For JSON."""
        raw = None if self.raw is None else "0x" + self.raw.hex()
        return {
            "number": self.number, "timestamp": self.timestamp, "raw": raw, "gasUsed": self.gas_used,
            "stateRoot": "0x" + self.state_root.hex(), "hash": "0x" + self.hash.hex(),
        }  # fmt: skip

    @classmethod
    def from_value(cls, value: Any) -> Entry:
        """From a peer's JSON. Raises `Invalid`."""
        try:
            numbers = [value[name] for name in ("number", "timestamp", "gasUsed")]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise Invalid(f"a journal entry's numbers are ints ≥ 0, not {numbers!r}")
            raw = None if value["raw"] is None else bytes.fromhex(value["raw"].removeprefix("0x"))
            root, block_hash = (bytes.fromhex(value[name].removeprefix("0x")) for name in ("stateRoot", "hash"))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Invalid(f"not a journal entry: {error!r}") from error
        return cls(numbers[0], numbers[1], raw, numbers[2], root, block_hash)


class Journal:
    """Rows of one chain.

    Args:
        path: the file; None keeps the rows in memory.
        facts: what the chain is (id, first balances). Written to a new file, compared with an old one.
        defaults: more of it, written to a new file; an old one keeps its own, see `fact`.

    Raises: `Invalid` for a file that is no journal, is damaged, or is another chain's; `Conflict` while another
        process has it open; `Unavailable` when the disk refuses.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._where = str(path) if path else "memory"
        try:
            self._db = sqlite3.connect(
                path or ":memory:", timeout=0, isolation_level=None, check_same_thread=False, cached_statements=16
            )
            try:
                self._open(facts, defaults)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def append(self, entry: Entry) -> None:
        """On the disk when it returns.  Cost: one fsync."""
        row = (entry.number, entry.timestamp, entry.raw, entry.gas_used, entry.state_root, entry.hash)
        try:
            self._db.execute(f"insert into blocks({_COLUMNS}) values(?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise Unavailable(f"the journal {self._where} cannot be written: {error}") from error

    def entries(self, first: int = 0, limit: int | None = None) -> Iterator[Entry]:
        """From block `first` on, in order."""
        query = f"select {_COLUMNS} from blocks where number >= ? order by number limit ?"
        try:
            for row in self._db.execute(query, (first, -1 if limit is None else limit)):
                yield self._checked(row)
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def fact(self, name: str, default: Any) -> Any:
        """What the file says of its chain; `default` for a file that says nothing.

        Raises: `Invalid` when it is damaged.
        """
        try:
            row = self._db.execute("select value from meta where name = ?", (name,)).fetchone()
            return default if row is None else json.loads(row[0])
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise Invalid(f"{self._where} is damaged: its {name} cannot be read") from error

    def cut(self, above: int) -> None:
        """Forget the blocks above a height. Only for a development chain in memory."""
        if self._where != "memory":
            raise Invalid("a journal on disk is append-only")
        self._db.execute("delete from blocks where number > ?", (above,))

    def close(self) -> None:
        self._db.close()

    def _open(self, facts: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._db.execute("pragma locking_mode = exclusive")
        self._db.execute("pragma synchronous = full")
        self._db.execute("begin exclusive")
        (tables,) = self._db.execute("select count(*) from sqlite_master").fetchone()
        if tables == 0:
            self._create({**defaults, **facts})
        self._db.execute("commit")
        self._db.execute("pragma journal_mode = wal")
        self._check(facts)

    def _create(self, facts: Mapping[str, Any]) -> None:
        for statement in _SCHEMA.split(";")[:-1]:
            self._db.execute(statement)
        self._db.execute(f"pragma application_id = {APPLICATION_ID}")
        self._db.execute(f"pragma user_version = {FORMAT}")
        rows = [(name, json.dumps(value, sort_keys=True)) for name, value in facts.items()]
        self._db.executemany("insert into meta values(?, ?)", rows)

    def _check(self, facts: Mapping[str, Any]) -> None:
        (application,) = self._db.execute("pragma application_id").fetchone()
        (version,) = self._db.execute("pragma user_version").fetchone()
        if application != APPLICATION_ID:
            raise Invalid(f"{self._where} is a database, but no Tessera chain")
        if version != FORMAT:
            raise Invalid(f"{self._where} has format {version}, this version reads {FORMAT}")
        for name, text in self._db.execute("select name, value from meta"):
            if name in facts and text != json.dumps(facts[name], sort_keys=True):
                raise Invalid(f"{self._where} is another chain's: its {name} is {text}, expected {facts[name]!r}")

    def _checked(self, row: tuple[Any, ...]) -> Entry:
        number, timestamp, raw, gas_used, root, block_hash = row
        kinds = (type(number), type(timestamp), type(gas_used), type(root), type(block_hash))
        if kinds != (int, int, int, bytes, bytes) or not isinstance(raw, bytes | None):
            raise Invalid(f"block {number!r} in {self._where} is damaged: columns of the wrong type")
        return Entry(number, timestamp, raw, gas_used, root, block_hash)

    def _translated(self, error: sqlite3.Error) -> Invalid | Conflict | Unavailable:
        text = str(error)
        if "locked" in text:
            return Conflict(f"another process has the chain {self._where} open")
        if "unable to open" in text or "readonly" in text or "disk" in text.replace("disk image", ""):
            return Unavailable(f"the journal {self._where} cannot be opened: {text}")
        return Invalid(f"{self._where} is damaged or no chain's journal: {text}")
