"""An agent's desk: the messages that came and went, and the deals they made, on disk.

Invariants: a message is taken once, however often it comes, also after a crash and while its recipient was away; it is
handled once, because its answers and the deal it makes are written in the transaction that marks it handled; what is to
be sent is sent until the recipient has it, or it expires. Senders are bounded, each and all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Column, Index, LargeBinary, MetaData, String, Table, delete, func, select, update

from tessera.agents.commerce.messages import MESSAGE_LIMIT, SKEW_S, Kind, Message, Post
from tessera.agents.commerce.terms import Brief, Terms
from tessera.core import encoding
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid, Late, Missing, TesseraError, Unavailable
from tessera.core.ids import Account
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.storage.location import MEMORY

__all__ = ["Deal", "Desk"]

MOST_WAITING, MOST_WAITING_OF_ONE = 1_000, 50
MOST_KEPT = 100_000  # of ids that are remembered until they expire
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1, 300  # between two tries to send

_TABLES = MetaData()
_IN = Table(
    "desk_in",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("sender", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("message", LargeBinary, nullable=False),  # empty once it is handled
    Column("handled", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
Index("desk_in_by_handled", _IN.c.handled, _IN.c.at_ms)
_OUT = Table(
    "desk_out",
    _TABLES,
    Column("id", String, primary_key=True),
    Column("message", LargeBinary, nullable=False),
    Column("due_at", BigInteger, nullable=False),
    Column("tries", BigInteger, nullable=False),
)
_DEALS = Table(
    "desk_deals",
    _TABLES,
    Column("terms", String, primary_key=True),  # the digest
    Column("role", String, primary_key=True),
    Column("intent", String, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("answer", String, nullable=False),
    Column("job", BigInteger, nullable=False),  # 0 until it is known
    Column("over", BigInteger, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)
Index("desk_deals_by_intent", _DEALS.c.intent)
_LAYOUT = Layout("desk", _TABLES, remedy="restore it from your backup; the chain still knows every job")


@dataclass(frozen=True, slots=True)
class Deal:
    """Terms that this agent has a part in: as `client`, `provider` or `evaluator`."""

    terms: Terms
    brief: Brief
    role: str
    answer: str = ""  # the provider's: accept, decline, or counter and the units
    job: int = 0
    over: bool = False


class Desk:
    """Made with a file or a database's URL.

    Args:
        owner: whose messages it takes.
    """

    def __init__(self, owner: Account, where: str | Path = MEMORY, *, clock: Clock | None = None) -> None:
        self.owner, self._clock = owner, clock or SystemClock()
        self._db = open_database(where, _LAYOUT, durability="full")

    # --- messages ---------------------------------------------------------------------------------------------------

    def receive(self, message: Message) -> bool:
        """Keep a message that came; True when it is new. What is kept is answered for: the sender may forget it.

        Raises: Invalid, Late; Unavailable when too many wait.
        """
        now = self._clock.time()
        message.verify(self.owner, now)
        row = {"id": message.id, "sender": message.sender, "kind": message.kind, "message": message.encode(),
               "handled": 0, "expires_at": message.expires_at, "at_ms": int(now * 1000)}  # fmt: skip

        def work(db: Transaction) -> bool:
            db.execute(delete(_IN).where(_IN.c.expires_at < now - SKEW_S))  # its time keeps it out from now on
            if db.execute(select(_IN.c.id).where(_IN.c.id == message.id)).first() is not None:
                return False
            waiting = select(func.count()).where(_IN.c.handled == 0)
            mine = db.execute(waiting.where(_IN.c.sender == message.sender)).scalar_one()
            total = db.execute(select(func.count()).select_from(_IN)).scalar_one()
            if mine >= MOST_WAITING_OF_ONE or db.execute(waiting).scalar_one() >= MOST_WAITING or total >= MOST_KEPT:
                raise Unavailable("too many messages wait here", retry_after_s=60)
            db.add(_IN, [row])
            return True

        return self._db.apply(work)

    def waiting(self, *kinds: Kind, limit: int = 100) -> list[Message]:
        """Of these kinds, not handled yet, the oldest first; those that came while the agent was away, too."""
        fresh = (_IN.c.handled == 0, _IN.c.kind.in_(kinds), _IN.c.expires_at > self._clock.time())
        query = select(_IN.c.message).where(*fresh).order_by(_IN.c.at_ms, _IN.c.id).limit(limit)
        with self._db.read() as db:
            return [Message.decode(row.message) for row in db.execute(query)]

    def handled(self, message: Message, *, answers: Sequence[Message] = (), deal: Deal | None = None) -> bool:
        """One transaction: the message is handled, its answers wait to be sent, its deal is kept. False when it was."""

        def work(db: Transaction) -> bool:
            mark = update(_IN).where(_IN.c.id == message.id, _IN.c.handled == 0).values(handled=1, message=b"")
            if db.execute(mark).rowcount == 0:  # type: ignore[attr-defined]
                return False
            self._write(db, answers, deal)
            return True

        return self._db.apply(work)

    def send(self, *messages: Message, deal: Deal | None = None) -> None:
        """Have them sent; with the deal that they are about, in one transaction."""
        self._db.apply(lambda db: self._write(db, messages, deal))

    async def flush(self, post: Post) -> int:
        """Try to send what is due. Returns: how many got there."""
        now, sent = int(self._clock.time()), 0
        query = select(_OUT).where(_OUT.c.due_at <= now).order_by(_OUT.c.due_at, _OUT.c.id).limit(100)
        with self._db.read() as db:
            due = [(row.id, Message.decode(row.message), row.tries) for row in db.execute(query)]
        for id, message, tries in due:
            if message.expires_at <= now:
                self._forget(id)
                continue
            try:
                await post.deliver(message)
            except (Unavailable, Late, Missing):  # away, or not there yet
                later = now + min(FIRST_PAUSE_S * 2**tries, LONGEST_PAUSE_S)
                self._postpone(id, later, tries + 1)
                continue
            except TesseraError:  # it is refused for good
                self._forget(id)
                continue
            self._forget(id)
            sent += 1
        return sent

    # --- deals ------------------------------------------------------------------------------------------------------

    def deals(self, role: str) -> list[Deal]:
        """Those that are not over, the oldest first."""
        query = select(_DEALS).where(_DEALS.c.role == role, _DEALS.c.over == 0).order_by(_DEALS.c.at_ms, _DEALS.c.terms)
        with self._db.read() as db:
            return [_deal(row) for row in db.execute(query)]

    def deal(self, digest: str, role: str) -> Deal | None:
        with self._db.read() as db:
            row = db.execute(select(_DEALS).where(_DEALS.c.terms == digest, _DEALS.c.role == role)).first()
        return None if row is None else _deal(row)

    def asked(self, intent: str) -> Deal | None:
        """The first terms that this agent asked for an intent."""
        where = (_DEALS.c.intent == intent, _DEALS.c.role == "client")
        with self._db.read() as db:
            row = db.execute(select(_DEALS).where(*where).order_by(_DEALS.c.at_ms).limit(1)).first()
        return None if row is None else _deal(row)

    def note(self, deal: Deal, *, answer: str = "", job: int = 0, over: bool = False) -> None:
        """Add what is new about a deal; what is known stays."""
        values: dict[str, Any] = {}
        values |= {"answer": answer} if answer else {}
        values |= {"job": job} if job else {}
        values |= {"over": 1} if over else {}
        where = (_DEALS.c.terms == deal.terms.digest, _DEALS.c.role == deal.role)
        if values:
            self._db.apply(lambda db: db.execute(update(_DEALS).where(*where).values(**values)))

    def close(self) -> None:
        self._db.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _write(self, db: Transaction, messages: Sequence[Message], deal: Deal | None) -> None:
        now = int(self._clock.time())
        db.add(_OUT, [{"id": one.id, "message": one.encode(), "due_at": now, "tries": 0} for one in messages])
        if deal is not None:
            body = encoding.encode({"terms": deal.terms.to_dict(), "brief": deal.brief.to_dict()})
            row = {"terms": deal.terms.digest, "role": deal.role, "intent": deal.terms.intent, "body": body,
                   "answer": deal.answer, "job": deal.job, "over": int(deal.over), "at_ms": now * 1000}  # fmt: skip
            db.add(_DEALS, [row])

    def _forget(self, id: str) -> None:
        self._db.apply(lambda db: db.execute(delete(_OUT).where(_OUT.c.id == id)))

    def _postpone(self, id: str, due_at: int, tries: int) -> None:
        self._db.apply(lambda db: db.execute(update(_OUT).where(_OUT.c.id == id).values(due_at=due_at, tries=tries)))


def _deal(row: Any) -> Deal:
    value = encoding.decode(row.body, 2 * MESSAGE_LIMIT)
    if type(value) is not dict:
        raise Invalid("a deal on this desk cannot be read")
    terms, brief = Terms.from_dict(value["terms"]), Brief.from_dict(value["brief"])
    return Deal(terms, brief, row.role, row.answer, row.job, bool(row.over))
