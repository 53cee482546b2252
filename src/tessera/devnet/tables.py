"""Where a hosted run keeps its tables: files in its folder, or name-spaces of one database that processes share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from tessera.core.errors import Invalid, Missing
from tessera.core.ids import RunId
from tessera.training.book import SeatBook
from tessera.training.home import Home, write_atomic

__all__ = ["RunTables", "hosted_tables"]

FACTS = "host.json"


@dataclass(frozen=True)
class RunTables:
    """The tables of one run on one chain.

    Args:
        database: a URL, or "" for files in `folder`.
    """

    folder: Path
    run_id: RunId
    chain_id: int
    database: str = field(default="", repr=False)  # it may hold a password

    def at(self, kind: str) -> tuple[str | Path, str]:
        """Where the tables of one kind are, and the name-space: as `open_database` takes them."""
        if self.database:
            return self.database, f"{kind}_{self.run_id[:16]}_{self.chain_id}"
        return self.folder / f"{kind}-{self.chain_id}.sqlite", ""

    def seats(self) -> SeatBook:
        where, schema = self.at("host")
        return SeatBook(where, schema=schema)

    def note(self) -> None:
        """That this directory hosts the run, for later commands. The URL stays out: it may hold a password."""
        write_atomic(self.folder / FACTS, json.dumps({"chain_id": self.chain_id}).encode())


def hosted_tables(home: Home, run_id: RunId, database: str = "") -> RunTables:
    """The tables of a run that was hosted here. Raises `Missing` when it never was."""
    folder = home.run_folder(run_id)
    try:
        chain_id = json.loads((folder / FACTS).read_bytes())["chain_id"]
    except FileNotFoundError as error:
        raise Missing(f"{home.path} does not host run {run_id[:16]}…") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Invalid(f"{folder / FACTS} is damaged: start the host again, which writes it anew") from error
    return RunTables(folder, run_id, int(chain_id), database)
