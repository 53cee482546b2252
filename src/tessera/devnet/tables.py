"""Where a hosted run keeps its tables: files in its folder, or one database that processes share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from tessera.core.errors import Invalid, Missing
from tessera.core.ids import RunId
from tessera.storage.location import schema_name
from tessera.training.book import SeatBook
from tessera.training.home import Home, write_atomic

__all__ = ["MARK", "RunTables", "hosted_tables"]

MARK = "host.json"


@dataclass(frozen=True)
class RunTables:
    """The tables of one run.

    Args:
        database: a URL, or "" for files in `folder`.
    """

    folder: Path
    run_id: RunId
    database: str = field(default="", repr=False)  # it may hold a password

    def at(self, kind: str) -> tuple[str | Path, str]:
        """Where the tables of one kind are, and their name-space: as `open_database` takes them."""
        if self.database:
            return self.database, schema_name("run", self.run_id)
        return self.folder / f"{kind}.sqlite", ""

    def seats(self) -> SeatBook:
        where, schema = self.at("host")
        return SeatBook(where, schema=schema)

    def mark(self) -> None:
        """That this directory hosts the run, for later commands. The URL stays out: it may hold a password."""
        write_atomic(self.folder / MARK, json.dumps({"database": bool(self.database)}).encode())


def hosted_tables(home: Home, run_id: RunId, database: str = "") -> RunTables:
    """The tables of a run that was hosted here. Raises `Missing` when it never was, `Invalid` without its database."""
    folder = home.run_folder(run_id)
    try:
        elsewhere = json.loads((folder / MARK).read_bytes())["database"]
    except FileNotFoundError as error:
        raise Missing(f"{home.path} does not host run {run_id[:16]}…") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Invalid(f"{folder / MARK} is damaged: start the host again, which writes it anew") from error
    if elsewhere and not database:
        raise Invalid(f"the tables of run {run_id[:16]}… lie in a database: give its URL with --database")
    return RunTables(folder, run_id, database)
