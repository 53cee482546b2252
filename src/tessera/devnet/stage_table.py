"""Who holds which stage of a served model now: the roster that engine and stages read, and how members learn of it.

Protocol "tessera/stages/1", one stream for as long as a member holds its stage; every message is canonical JSON:

    member  {"op": "ask", "secret", "digest", "want"}        host  {"op": "seat", "stage", "card"}
    member  {"op": "alive"} ... {"op": "ready", "record"}    host  {"op": "roster", "stages": [[record, ...], ...]}
    member  {"op": "alive"} ...                              host  {"op": "roster", ...} after changes, now and then

Invariants: a member is in the roster from its `ready` to the end of its stream, with a record that it signed itself;
what it says is bounded and awaited with a deadline; the card is believed because its digest is in the invitation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import anyio

from tessera.core import encoding
from tessera.core.errors import Invalid, Late, Misbehaviour
from tessera.core.ids import PeerId
from tessera.models.card import CARD_LIMIT
from tessera.p2p.transport import PeerRecord

__all__ = ["ALIVE_S", "SILENCE_S", "STAGES", "StageTable", "receive", "send"]

STAGES = "tessera/stages/1"
ALIVE_S = 5.0  # how often a member says that it is there
SILENCE_S = 30.0  # after which it is not
MAX_HOLDERS = 64  # of one stage
MESSAGE_LIMIT = 2 * CARD_LIMIT  # bytes; a roster of 512 stages fits as well
SEND_S = 10.0


class Stream(Protocol):
    """What is asked of a stream; those of `tessera.p2p` fit."""

    @property
    def peer(self) -> PeerId: ...

    async def send(self, data: bytes, *, last: bool = False) -> None: ...
    async def recv(self, limit: int) -> bytes: ...


class StageTable:
    """A live `Roster`."""

    def __init__(self, stages: int) -> None:
        self._holders: list[dict[PeerId, PeerRecord]] = [{} for _ in range(stages)]
        self._changed = anyio.Event()

    @property
    def stages(self) -> int:
        return len(self._holders)

    def holders(self, stage: int) -> list[PeerRecord]:
        return list(self._holders[stage].values())

    @property
    def complete(self) -> bool:
        """Whether every stage has somebody."""
        return all(self._holders)

    def add(self, stage: int, record: PeerRecord) -> None:
        self._holders[stage][record.id] = record
        self._tell()

    def remove(self, stage: int, peer: PeerId) -> None:
        if self._holders[stage].pop(peer, None) is not None:
            self._tell()

    @property
    def change(self) -> anyio.Event:
        """Set by the next change. Take it, then read."""
        return self._changed

    def to_value(self) -> list[list[str]]:
        return [[record.to_text() for record in holders.values()] for holders in self._holders]

    def load(self, value: object) -> None:
        """Becomes what a host said. Raises: Invalid."""
        if not isinstance(value, list) or len(value) != self.stages:
            raise Invalid(f"a roster lists the holders of {self.stages} stages")
        if any(not isinstance(holders, list) or len(holders) > MAX_HOLDERS for holders in value):
            raise Invalid(f"a stage has up to {MAX_HOLDERS} holders")
        records = [[PeerRecord.from_text(text) for text in holders] for holders in value]
        self._holders = [{record.id: record for record in holders} for holders in records]
        self._tell()

    def least_held(self, coming: Sequence[int], want: int) -> int:
        """The stage that a newcomer should hold, `coming` ones counted; `want` if no other needs him more."""
        counts = [len(holders) + coming[stage] for stage, holders in enumerate(self._holders)]
        least = min(counts)
        if least >= MAX_HOLDERS:
            raise Invalid(f"every stage has {MAX_HOLDERS} holders")
        return want if 0 <= want < self.stages and counts[want] == least else counts.index(least)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


async def send(stream: Stream, message: dict[str, Any]) -> None:
    """Raises: Late; Unavailable when the peer is gone."""
    try:
        with anyio.fail_after(SEND_S):
            await stream.send(encoding.encode(message))
    except TimeoutError:
        raise Late(f"{stream.peer[:16]}… took no message within {SEND_S:g} s") from None


async def receive(stream: Stream, **fields: type) -> dict[str, Any] | None:
    """The next message; None at the end. `fields`: those that it may have beside `op`, with their types.

    Raises: Late after `SILENCE_S`; Misbehaviour for anything else than such a message; Unavailable.
    """
    try:
        with anyio.fail_after(SILENCE_S):
            data = await stream.recv(MESSAGE_LIMIT)
    except TimeoutError:
        raise Late(f"nothing from {stream.peer[:16]}… within {SILENCE_S:g} s") from None
    if not data:
        return None
    try:
        message = encoding.decode(data, MESSAGE_LIMIT)
        if not isinstance(message, dict) or not isinstance(message.get("op"), str):
            raise Invalid("a message is an object with an op")
        for name, value in message.items():
            if name != "op" and type(value) is not fields.get(name):
                raise Invalid(f"{message['op'][:20]} has the field {name[:20]} of type {type(value).__name__}")
    except Invalid as error:
        raise Misbehaviour(f"a bad message about stages: {error.message}", evidence=data[:64].hex()) from error
    return message
