"""What an agent remembers from run to run. Remembering does not launder: an outside text stays outside.

Invariants: a note keeps the origin that its text had when it was written, and only the guard says which; at most
`NOTES_LIMIT` notes of `NOTE_LIMIT` characters, the oldest are forgotten.
"""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import delete, func, select

from tessera.agents.origins import Knowledge, Origin
from tessera.agents.tables import LAYOUT, NOTES
from tessera.agents.tools import Source, ToolSpec
from tessera.core.clock import Clock, SystemClock
from tessera.core.errors import Invalid
from tessera.storage.database import Transaction, open_database
from tessera.storage.location import MEMORY

__all__ = ["RECALL", "REMEMBER", "USER_NOTE", "Memory", "note_origin"]

NOTES_LIMIT = 1_000  # of one agent
NOTE_LIMIT = 2_000  # characters
FOUND_LIMIT = 10  # of one search
USER_NOTE = "memory:user"  # who wrote a note that says only what the user said; among the guard's `me`

REMEMBER = ToolSpec("remember", "write", {"note": "content"}, Source(author="own"), repeatable=True)
RECALL = ToolSpec("recall", "read", {"query": "plain"}, Source(author="origin", text=("note",)))


def note_origin(knowledge: Knowledge, note: str) -> str:
    """Who wrote a note, as it is kept: the user, when the request says all of it; else somebody outside.

    A text that is partly the user's and partly a page's is the page's: nothing less could be told apart later.
    """
    return USER_NOTE if knowledge.origin(note) == Origin.USER else "outside"


class Memory:
    """The notes of one agent, in the tables of its ledgers."""

    def __init__(self, agent: str, where: str | Path = MEMORY, *, clock: Clock | None = None, schema: str = "") -> None:
        self._agent, self._clock = agent, clock or SystemClock()
        self._db = open_database(where, LAYOUT, schema=schema)

    def remember(self, note: str, origin: str) -> None:
        """Raises: Invalid for an empty or too long note."""
        if not 0 < len(note.strip()) <= NOTE_LIMIT:
            raise Invalid(f"a note has 1 to {NOTE_LIMIT} characters, not {len(note)}")
        mine = NOTES.c.agent == self._agent

        def work(db: Transaction) -> None:
            known = db.execute(select(NOTES.c.number).where(mine, NOTES.c.note == note, NOTES.c.origin == origin))
            if known.first() is not None:
                return
            number = db.execute(select(func.coalesce(func.max(NOTES.c.number), 0)).where(mine)).scalar_one() + 1
            at_ms = int(self._clock.time() * 1000)
            db.add(NOTES, [{"agent": self._agent, "number": number, "origin": origin, "note": note, "at_ms": at_ms}])
            db.execute(delete(NOTES).where(mine, NOTES.c.number <= number - NOTES_LIMIT))

        self._db.apply(work)

    def recall(self, query: str) -> list[dict[str, str]]:
        """The notes that share most words with the query, newest first among equals; of no words, the newest."""
        words = set(re.findall(r"\w+", query.casefold()))
        with self._db.read() as db:
            mine = select(NOTES).where(NOTES.c.agent == self._agent)
            rows = db.execute(mine.order_by(NOTES.c.number.desc()).limit(NOTES_LIMIT)).all()
        scored = [(len(words & set(re.findall(r"\w+", row.note.casefold()))), row) for row in rows]
        found = sorted((pair for pair in scored if pair[0] or not words), key=lambda pair: -pair[0])
        return [{"origin": row.origin, "note": row.note} for _, row in found[:FOUND_LIMIT]]

    def close(self) -> None:
        self._db.close()
