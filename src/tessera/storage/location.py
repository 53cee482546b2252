"""Where a database lies: a file or a URL, read into what SQLAlchemy needs and what a person may see.

Invariant: no text made here holds a password. What stands in a URL besides driver, user, host and name is not shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from tessera.core.errors import Invalid

__all__ = ["DEFAULT_SCHEMA", "MEMORY", "Dialect", "Location", "locate", "schema_name"]

Dialect = Literal["sqlite", "postgresql"]
DEFAULT_SCHEMA = "tessera"
MEMORY = ":memory:"
FORMS = "a file, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
_SCHEMA = re.compile(r"[a-z][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True)
class Location:
    """One name-space of one database."""

    dialect: Dialect
    url: URL = field(repr=False)  # its query may hold secrets, which SQLAlchemy would show
    schema: str  # "" on SQLite, where each name-space is a file
    shown: str  # without secrets

    def hide(self, text: str) -> str:
        """`text`, a driver's message, without the secrets that it may repeat."""
        secrets = [self.url.password, *(value for name, value in self.url.query.items() if "pass" in name.lower())]
        for secret in secrets:
            if secret and isinstance(secret, str):
                text = text.replace(secret, "***")
        return text


def locate(where: str | Path, schema: str = "") -> Location:
    """Read a file's path or a database URL.

    `schema` is the name-space: a schema of that name on PostgreSQL (default `tessera`); on SQLite, which has none, a
    file of its own beside (`tables.sqlite` and `run_1` make `tables.run_1.sqlite`).

    Raises: Invalid for another kind of database, or for a schema that is no plain name.
    """
    if schema and _SCHEMA.fullmatch(schema) is None:
        raise Invalid(f"a schema is a small letter and up to 62 of a-z, 0-9 and _, not {schema[:80]!r}")
    if isinstance(where, Path) or "://" not in where:
        return _file(Path(where), schema)
    url = _parse(where)
    if url.get_backend_name() in ("postgresql", "postgres"):
        return _server(url, schema or DEFAULT_SCHEMA)
    if url.get_backend_name() == "sqlite":
        return _file(Path(url.database or MEMORY), schema)
    raise Invalid(f"{url.get_backend_name()[:40]!r} is no database that is known here: expected {FORMS}")


def schema_name(kind: str, *ids: str) -> str:
    """A name-space's name, from ids in hex, of which 16 digits each are enough to tell them apart.

    >>> schema_name("run", "7c" * 32, "0x5B38Da6a701c568545dCfcB03FcB875f56beddC4")
    'run_7c7c7c7c7c7c7c7c_5b38da6a701c5685'
    """
    return "_".join([kind, *(id.lower().removeprefix("0x")[:16] for id in ids)])


def _parse(text: str) -> URL:
    try:
        return make_url(text)
    except (ArgumentError, ValueError):
        pass
    # Raised outside of the handler: the parser's own error repeats a part of the URL, perhaps the password.
    raise Invalid(f"the database URL cannot be read: expected {FORMS}; write @, : and / in a password as %40, %3A, %2F")


def _file(file: Path, schema: str) -> Location:
    if str(file) == MEMORY:
        return Location("sqlite", URL.create("sqlite+pysqlite", database=MEMORY), "", "the database in memory")
    if schema:
        file = file.with_name(f"{file.stem}.{schema}{file.suffix}")
    return Location("sqlite", URL.create("sqlite+pysqlite", database=str(file)), "", str(file))


def _server(url: URL, schema: str) -> Location:
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise Invalid(f"the driver {url.drivername[:40]!r} is not used here: expected postgresql:// (psycopg)")
    shown = f"{url.set(drivername='postgresql', query={}).render_as_string(hide_password=True)} (schema {schema})"
    return Location("postgresql", url.set(drivername="postgresql+psycopg"), schema, shown)
