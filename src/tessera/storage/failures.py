"""What a database's failure means to its caller: drivers' errors become ours.

    locked, or changed by somebody else      Conflict      read again, then retry
    damaged, or not a database               Invalid       restore the backup, or whatever `remedy` says
    disk full, read only, connection lost    Unavailable   ask again later

Invariant: a message names the database, never its password, and holds no row's values.
"""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tessera.core.errors import Conflict, Invalid, TesseraError, Unavailable
from tessera.storage.location import Location

__all__ = ["is_race", "translated"]

RACES = ("40001", "40P01")  # serialization failure, deadlock: the same transaction may succeed when it is run again

_SQLITE_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_SQLITE_TROUBLE = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it can only be read: look at the file's and the folder's permissions",
    sqlite3.SQLITE_IOERR: "the disk failed",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: does the folder exist, and may this user write there?",
    sqlite3.SQLITE_PERM: "this user may not write there",
    sqlite3.SQLITE_NOMEM: "memory is short",
}
_POSTGRES = {  # by SQLSTATE or its class, the longest that fits
    "22": (Invalid, "it cannot hold a value"),
    "08": (Unavailable, "the connection is lost"),
    "23": (Conflict, "somebody else wrote this first"),
    "25006": (Unavailable, "it can only be read now"),
    "28": (Invalid, "it refuses this user or password"),
    "3D": (Invalid, "it has no database of this name: create it (createdb)"),
    "40": (Conflict, "others keep changing the same rows"),
    "42501": (Invalid, "this user lacks a right: grant CREATE on the database, and the schema's ownership"),
    "53": (Unavailable, "it is out of disk, memory or connections"),
    "55": (Conflict, "somebody else holds a lock"),
    "57": (Unavailable, "it stopped the statement or is going down"),
    "58": (Unavailable, "its disk failed"),
    "XX": (Invalid, "it is damaged: restore it from your backup"),
}

_REFUSALS = ("authentication failed", "no password supplied", "does not exist", "invalid connection option")  # libpq
# gives no SQLSTATE for a connection that failed; a server that speaks another language is met with `Unavailable`.


def is_race(error: Exception) -> bool:
    """Whether two transactions crossed, so that running this one again may succeed."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in RACES


def translated(error: SQLAlchemyError, location: Location, remedy: str) -> TesseraError:
    """The error of ours that says what to do about `error`."""
    if isinstance(error, PoolTimeout):
        return Unavailable(f"{location.shown} is busy: all of this process's connections are in use")
    original = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(original, sqlite3.Error):
        return _of_sqlite(original, location, remedy)
    if original is not None:
        return _of_postgres(original, location, error)
    return Invalid(f"{location.shown}: {location.hide(str(error))[:300]}")


def _of_sqlite(error: sqlite3.Error, location: Location, remedy: str) -> TesseraError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest tells kinds of one class apart
    if code in _SQLITE_LOCKED:
        return Conflict(f"another process writes {location.shown}")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return Conflict(f"{location.shown}: somebody else wrote this first")
    if code in _SQLITE_TROUBLE:
        return Unavailable(f"{location.shown}: {_SQLITE_TROUBLE[code]} ({error})")
    return Invalid(f"{location.shown} is damaged ({error}): {remedy}")


def _of_postgres(error: BaseException, location: Location, wrapped: SQLAlchemyError) -> TesseraError:
    state = str(getattr(error, "sqlstate", None) or "")
    for code in (state, state[:2]):
        if code in _POSTGRES:
            cls, meaning = _POSTGRES[code]
            return cls(f"{location.shown}: {meaning} ({_told(error, location)})")
    if not state and isinstance(wrapped, OperationalError | InterfaceError):  # the server did not answer as one does
        told = _told(error, location)
        hopeless = any(sign in told for sign in _REFUSALS)
        cls = Invalid if hopeless else Unavailable
        return cls(f"{location.shown} cannot be reached: {told}" + ("; correct the URL" if hopeless else ""))
    return Invalid(f"{location.shown}: {_told(error, location)}")


def _told(error: BaseException, location: Location) -> str:
    """The driver's message without its DETAIL, which would show a row."""
    told = getattr(getattr(error, "diag", None), "message_primary", None) or str(error)
    return location.hide(" ".join(told.split()))[:300]
