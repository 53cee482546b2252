"""Where a gateway of this machine keeps what it knows of money, for the commands that look at it or change it."""

from __future__ import annotations

from pathlib import Path

from tessera.core.errors import Missing
from tessera.devnet.tables import hosted_tables
from tessera.serving.paying.till import Tables
from tessera.storage.location import schema_name
from tessera.training.home import Home

__all__ = ["known_tables", "own_tables"]

FOLDER = "gateway"


def own_tables(home: Home, database: str = "") -> Tables:
    """The tables of a gateway that serves models of this directory, and no run: one for them all.

    Args:
        database: a URL that several gateways share, or "" for files.
    """
    folder = home.path / FOLDER

    def at(kind: str) -> tuple[str | Path, str]:
        if database:
            return database, schema_name(FOLDER)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder / f"{kind}.sqlite", ""

    return at


def known_tables(home: Home, database: str = "") -> Tables:
    """The tables of the run that was hosted here last, or of the gateway that serves this directory's models.

    Raises: Missing when there is neither; Invalid when they lie in a database whose URL is not given.
    """
    for run_id in reversed(home.runs()):
        try:
            return hosted_tables(home, run_id, database).at
        except Missing:
            continue
    if not database and not (home.path / FOLDER).is_dir():
        raise Missing(f"no gateway was started in {home.path}: start it first, or name it with --state-dir")
    return own_tables(home, database)
