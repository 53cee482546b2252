"""API keys: secrets that name whose tokens or credit a request uses. Three kinds, in one table.

    operator   made by the operator for its own use, perhaps with a limit of tokens for each day
    credit     bought with the first credit; spends what its payer has prepaid
    session    from signing in with an account; ends by itself

Invariants: a secret is shown once, when it is made, and kept as its SHA-256 only; it has 256 bits of chance, so that
neither the hash nor the time of a look-up helps to guess it; a key that was revoked or has ended is no key, at every
gateway that shares the table, from the next request on. A key that we do not know is no key either, since official
clients always send one.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    MetaData,
    RowMapping,
    String,
    Table,
    and_,
    delete,
    insert,
    or_,
    select,
    update,
)

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Missing, Unavailable
from tessera.core.hashing import sha256
from tessera.serving.paying.charging import API_KEY_HEADER, Free, Hold, PaidRequest
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.storage.location import MEMORY

__all__ = ["ApiKey", "ApiKeys", "KeyRing", "KeyedWay", "Kind", "OperatorKeys", "bearer"]

Kind = Literal["operator", "credit", "session"]
PREFIX = "sk-tessera-"
ID_DIGITS = 16  # of the hash: what a key is called where it may be seen
MAX_PER_OWNER = 16  # of credit keys and sessions each; the oldest goes
NAME_LIMIT = 80

_TABLES = MetaData()
_KEYS = Table(
    "api_keys",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("digest", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("owner", String, nullable=False),  # an account, or the operator's name for it
    Column("tokens_per_day", BigInteger, nullable=False),  # 0 = no limit
    Column("made", Float(53), nullable=False),  # seconds since 1970, as the others
    Column("until", Float(53), nullable=False),  # 0 = for ever
    Column("revoked", Float(53), nullable=False),  # 0 = it is not
)
Index("api_keys_by_owner", _KEYS.c.kind, _KEYS.c.owner)
_LAYOUT = Layout("api_keys", _TABLES)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key; not its secret. Times in seconds since 1970; 0 = never."""

    id: str
    kind: Kind
    owner: str
    tokens_per_day: int
    made: float
    until: float
    revoked: float


class KeyRing:
    """The keys of one gateway, or of several that share `where`."""

    def __init__(self, clock: Clock, *, where: str | Path = MEMORY, schema: str = "") -> None:
        self._clock = clock
        self._db = open_database(where, _LAYOUT, schema=schema, durability="full")

    async def issue(self, kind: Kind, owner: str, *, tokens_per_day: int = 0, until: float = 0) -> str:
        """Makes a key. Returns: its secret, which nobody can tell again."""
        if not 0 < len(owner) <= NAME_LIMIT or not owner.isprintable():
            raise Invalid(f"a key's owner is named in 1 to {NAME_LIMIT} printable characters, not {owner[:100]!r}")
        if not 0 <= tokens_per_day < 2**53:
            raise Invalid(f"tokens for each day are from 0 (no limit) to 2^53, not {tokens_per_day}")
        secret = PREFIX + secrets.token_urlsafe(32)
        digest = _digest(secret)
        row = {"id": digest[:ID_DIGITS], "digest": digest, "kind": kind, "owner": owner, "revoked": 0.0, "until": until}
        row |= {"tokens_per_day": tokens_per_day, "made": self._clock.time()}

        def work(db: Transaction) -> None:
            if kind != "operator":
                self._make_room(db, kind, owner)
            db.execute(insert(_KEYS), row)

        await self._apply(work)
        return secret

    async def find(self, secret: str) -> ApiKey | None:
        """The key with this secret, if it is good now."""
        if not secret.startswith(PREFIX):
            return None
        digest, now = _digest(secret), self._clock.time()
        k = _KEYS.c
        good = and_(k.id == digest[:ID_DIGITS], k.revoked == 0, or_(k.until == 0, k.until > now))
        row = await self._apply(lambda db: db.execute(select(*_KEYS.c).where(good)).mappings().first())
        if row is None or not hmac.compare_digest(row["digest"], digest):
            return None
        return _key(row)

    async def list(self, kind: Kind) -> list[ApiKey]:
        """All that were ever made of a kind, oldest first; the ended and the revoked too."""
        query = select(*_KEYS.c).where(_KEYS.c.kind == kind).order_by(_KEYS.c.made)
        return [_key(row) for row in await self._apply(lambda db: db.execute(query).mappings().all())]

    async def revoke(self, id: str) -> ApiKey:
        """Ends a key. Raises: Missing when there is none with this id, or it is revoked already."""
        now = self._clock.time()
        change = update(_KEYS).where(_KEYS.c.id == id, _KEYS.c.revoked == 0).values(revoked=now).returning(*_KEYS.c)
        row = await self._apply(lambda db: db.execute(change).mappings().first())
        if row is None:
            raise Missing(f"there is no key {id[:80]!r} that is not revoked")
        return _key(row)

    def close(self) -> None:
        self._db.close()

    def _make_room(self, db: Transaction, kind: Kind, owner: str) -> None:
        """Others make these keys, as often as they like: what has ended goes, and all but the newest."""
        k = _KEYS.c
        theirs = and_(k.kind == kind, k.owner == owner)
        db.execute(delete(_KEYS).where(k.kind == kind, k.until > 0, k.until <= self._clock.time()))
        newest = db.execute(select(k.id).where(theirs).order_by(k.made.desc()).limit(MAX_PER_OWNER - 1)).scalars().all()
        db.execute(delete(_KEYS).where(theirs, k.id.not_in(newest)))

    async def _apply(self, work: Callable[[Transaction], T]) -> T:
        try:
            return await self._db.apply_async(work)
        except Conflict as error:
            raise Unavailable(f"{error.message}; nothing was charged") from error


class KeyedWay(Protocol):
    """A way to pay for who has named itself with a key."""

    async def hold(self, key: ApiKey, request: PaidRequest) -> Hold | None:
        """As `Payments.hold`."""
        ...


class ApiKeys:
    """Paying by API key: for each kind of key the ways that are tried, in order."""

    def __init__(self, ring: KeyRing, ways: Mapping[Kind, Sequence[KeyedWay]]) -> None:
        self._ring, self._ways = ring, ways

    async def hold(self, request: PaidRequest) -> Hold | None:
        """See `Payments.hold`."""
        key = await self._ring.find(bearer(request.headers))
        if key is None:
            return None
        for way in self._ways.get(key.kind, ()):
            if (hold := await way.hold(key, request)) is not None:
                return hold
        return None


class OperatorKeys:
    """Keys that stand in the operator's configuration: nothing is paid."""

    def __init__(self, api_keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(api_key) for api_key in api_keys)

    async def hold(self, request: PaidRequest) -> Free | None:
        digest = _digest(bearer(request.headers))
        known = [hmac.compare_digest(digest, key) for key in self._digests]  # all of them: equal time for every key
        return Free(f"key {digest[:ID_DIGITS]}") if any(known) else None


def bearer(headers: Mapping[str, str]) -> str:
    """The API key among a request's headers; empty without one."""
    scheme, _, api_key = headers.get(API_KEY_HEADER, "").partition(" ")
    return api_key.strip() if scheme.lower() == "bearer" else ""


def _digest(secret: str) -> str:
    return sha256(secret.encode(errors="replace")).hex()


def _key(row: RowMapping) -> ApiKey:
    return ApiKey(**{str(name): value for name, value in row.items() if name != "digest"})
