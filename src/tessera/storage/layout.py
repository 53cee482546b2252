"""Layouts: which tables a component keeps, in which version, and how older ones are brought forward.

Several layouts may share one name-space; the table `layouts` holds the version of each. Opening is one transaction: it
makes the tables, or runs the missing migrations in order, or changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, insert, select, update

from tessera.core.errors import Invalid

__all__ = ["Layout", "Migration", "prepare"]

Migration = Callable[[Connection], None]

_VERSIONS = MetaData()
_LAYOUTS = Table(
    "layouts", _VERSIONS, Column("name", String, primary_key=True), Column("version", Integer, nullable=False)
)


@dataclass(frozen=True)
class Layout:
    """A component's tables.

    Args:
        name: one for each component; table names must differ between layouts that share a name-space.
        tables: as they are in the newest version.
        remedy: what to do about a damaged file.
        migrations: the n-th (from 1) takes version n to n + 1, with statements that both dialects understand, or two.
    """

    name: str
    tables: MetaData
    migrations: tuple[Migration, ...] = ()
    remedy: str = "restore it from your backup, or move it away"

    @property
    def version(self) -> int:
        return 1 + len(self.migrations)


def prepare(connection: Connection, layout: Layout, shown: str) -> None:
    """Bring the tables of `layout` to its version, inside the caller's transaction.

    Raises: Invalid when they are of a newer version than this program knows.
    """
    _VERSIONS.create_all(connection)
    stored = connection.scalar(select(_LAYOUTS.c.version).where(_LAYOUTS.c.name == layout.name))
    if stored == layout.version:
        return
    if stored is None:
        layout.tables.create_all(connection)
        connection.execute(insert(_LAYOUTS).values(name=layout.name, version=layout.version))
        return
    if not 0 < stored < layout.version:
        raise Invalid(
            f"{shown} holds {layout.name} of version {stored}, this program knows up to {layout.version}: "
            "start the newer program, or restore a backup that is as old as this one"
        )
    for migration in layout.migrations[stored - 1 :]:
        migration(connection)
    connection.execute(update(_LAYOUTS).where(_LAYOUTS.c.name == layout.name).values(version=layout.version))
