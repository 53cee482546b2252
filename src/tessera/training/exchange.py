"""Replicas of a stage pull each other's parts: of a gradient in each step, or of the state in each round.

A replica offers its part and collects the others'; whoever has collected a part serves it too, so a laggard, or a ghost
that follows, gets it from anybody. A request waits at the server until the part is there. What is large goes in pieces,
as bulk, so that activations on the same link go first.

Invariants: only members of this stage are served and asked; parts of the last `keep` names are here, each replica's at
most `limit_bytes`; a call holds one piece; every wait ends with the deadline. Nobody is named without cause: see
`exchange_part`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
from anyio import to_thread

from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId, parse_peer_id
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.exchange_part import PartHead, PartName, SignedPart
from tessera.training.protocols import AVERAGE, SMALL

__all__ = ["Collected", "Exchange", "Members"]

log = structlog.get_logger()

Members = Callable[[], Mapping[PeerId, PeerRecord]]
Check = Callable[[bytes], object]  # raises Invalid

PIECE = 2 * 2**20  # bytes; a caller that takes 0.3 Mb/s has one within the minute that `serve_calls` grants
WINDOW = 2  # pieces on their way at once: the link is busy while one waits a round trip
MAX_STREAMS = 32  # calls at once from one member, most of which wait
WAIT_S = 30.0  # longest that a request waits at the server
ASK_S = 1.0  # and when the part may be with somebody else by now
PAUSE_S = 0.25
FORGOTTEN = 256  # names of which we know that they are over
HEDGE = 0.5  # of the deadline: from then on, a part that has not come from its owner is looked for elsewhere


@dataclass(slots=True)
class Collected:
    """What came until the deadline. Seconds count from the start of `collect`."""

    parts: dict[PeerId, bytes] = field(default_factory=dict)  # checked, in the order of the owners asked for
    arrived_s: dict[PeerId, float] = field(default_factory=dict)  # of what others sent
    faults: dict[PeerId, Misbehaviour] = field(default_factory=dict)  # who sent what no honest replica sends


class Exchange:
    """One replica's end.

    Args:
        key: whose peer `transport` is.
        members: this stage's admitted replicas and ghosts, with their records, at the time of the call.
        limit_bytes: most of one part.
        keep: names whose parts stay here; what a laggard or a ghost can still get.
    """

    def __init__(
        self, transport: Transport, key: PeerKey, run_id: RunId, members: Members, *, limit_bytes: int, keep: int = 4
    ) -> None:
        self._transport, self._key, self._run_id, self._members = transport, key, run_id, members
        self._limit, self._keep = limit_bytes, keep
        self._here: dict[PartName, dict[PeerId, SignedPart]] = {}  # oldest first
        self._over: deque[PartName] = deque(maxlen=FORGOTTEN)
        self._news = anyio.Event()

    def serve(self) -> None:
        """Answer the other members from now on."""
        serve_calls(self._transport, AVERAGE, self._answer, request_limit=SMALL, max_streams=MAX_STREAMS)

    def name(self, kind: str, number: int, attempt: int = 0) -> PartName:
        return PartName(self._run_id, kind, number, attempt)

    async def offer(self, name: PartName, data: bytes) -> None:
        """Our part of `name`. Offering the same again changes nothing.

        Raises: Conflict: other bytes under this name: what was signed may be with others already.  Invalid: too large.
        """
        self._check_size(len(data))
        part = await to_thread.run_sync(SignedPart.sign, self._key, name, data)
        before = self._here.get(name, {}).get(self.id)
        if before is not None and before.head.digest != part.head.digest:
            raise Conflict(f"another part was offered as {name}: take a new attempt")
        self._store(name, part)

    def digests(self, name: PartName) -> dict[PeerId, bytes]:
        """Of the parts that are here: replicas that hold the same make the same step."""
        return {owner: part.head.digest for owner, part in self._here.get(name, {}).items()}

    async def collect(
        self, name: PartName, owners: Iterable[PeerId], deadline_s: float, *, size_bytes: int, check: Check
    ) -> Collected:
        """The owners' parts of `name`: all of them, or those that came within `deadline_s`.

        Args:
            owners: our own id among them is served from here.
            size_bytes: of every part, exactly.
            check: raises Invalid for bytes that no honest replica sends. Runs in a thread.

        Raises: Conflict: we are among the owners and have offered nothing.  Invalid: parts larger than our limit.
        """
        self._check_size(size_bytes)
        owners, found = list(dict.fromkeys(owners)), Collected()
        if self.id in owners and self.id not in self._here.get(name, {}):
            raise Conflict(f"our own part of {name} was never offered")
        gathering = _Gathering(name, size_bytes, check, anyio.current_time(), anyio.current_time() + deadline_s, found)
        with anyio.move_on_after(deadline_s):
            async with anyio.create_task_group() as tasks:
                for owner in owners:
                    tasks.start_soon(self._gather, gathering, owner)
        found.parts = {owner: found.parts[owner] for owner in owners if owner in found.parts}
        missing = [owner[:16] for owner in owners if owner not in found.parts]
        if missing:
            log.info("parts_missing", kind=name.kind, number=name.number, owners=missing, waited_s=deadline_s)
        return found

    @property
    def id(self) -> PeerId:
        return self._key.id

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise Invalid(f"a part of {size} bytes, at most {self._limit} expected")

    # --- serving ----------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if peer not in self._members():
            raise Refused("parts are for the replicas of this stage", rule="average_members")
        name, owner = PartName.parse(request), parse_peer_id(request.get("owner"))
        offset, wait_ms = request.get("offset"), request.get("wait_ms")
        if name.run_id != self._run_id:
            raise Invalid(f"run {name.run_id[:16]}… is another one")
        if type(offset) is not int or type(wait_ms) is not int or offset < 0 or wait_ms < 0:
            raise Invalid(f"offset and wait_ms are whole numbers, not {str(offset)[:40]!r} and {str(wait_ms)[:40]!r}")
        part = await self._wait_for(name, owner, min(wait_ms / 1000, WAIT_S))
        if offset > len(part.data):
            raise Invalid(f"offset {offset} lies behind the part's {len(part.data)} bytes")
        return part.head.to_value(), part.data[offset : offset + PIECE]

    async def _wait_for(self, name: PartName, owner: PeerId, wait_s: float) -> SignedPart:
        with anyio.move_on_after(wait_s):
            while True:
                if (part := self._here.get(name, {}).get(owner)) is not None:
                    return part
                if name in self._over:
                    raise Missing(f"{name} is over, and its parts are gone")
                await self._news.wait()
        raise Unavailable(f"{owner[:16]}…'s part of {name} is not here yet", retry_after_s=PAUSE_S)

    def _store(self, name: PartName, part: SignedPart) -> None:
        self._here.setdefault(name, {}).setdefault(part.head.owner, part)
        while len(self._here) > self._keep:
            oldest = next(iter(self._here))
            del self._here[oldest]
            self._over.append(oldest)
        self._news.set()
        self._news = anyio.Event()

    # --- collecting -------------------------------------------------------------------------------------------------

    async def _gather(self, g: _Gathering, owner: PeerId) -> None:
        """One owner's part, from wherever it comes first."""
        part = self._here.get(g.name, {}).get(owner)
        if part is None:
            part = await self._bring(g, owner)
            if part is None or not await self._good(g, part):
                return
            g.found.arrived_s[owner] = anyio.current_time() - g.started
            self._store(g.name, part)
        g.found.parts[owner] = part.data

    async def _good(self, g: _Gathering, part: SignedPart) -> bool:
        try:
            await to_thread.run_sync(g.check, part.data)
        except Invalid as error:
            self._blame(g, part.head.owner, part.head.accusation(g.name, error.message))
            return False
        return True

    async def _bring(self, g: _Gathering, owner: PeerId) -> SignedPart | None:
        """From the owner; from others as well, once he has failed or takes long."""
        found: list[SignedPart] = []
        failed = anyio.Event()

        async def race(bring: Callable[[_Gathering, PeerId, anyio.Event], Awaitable[SignedPart | None]]) -> None:
            part = await bring(g, owner, failed)
            if part is not None and not found:
                found.append(part)
            if found or owner in g.found.faults:
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(race, self._from_owner)
            tasks.start_soon(race, self._from_others)
        return found[0] if found else None

    async def _from_owner(self, g: _Gathering, owner: PeerId, failed: anyio.Event) -> SignedPart | None:
        while owner not in g.found.faults:
            record = self._members().get(owner)
            if record is not None:
                part = await self._ask(g, record, owner, g.left_s())
                if part is not None:
                    return part
            failed.set()
            await anyio.sleep(PAUSE_S)
        return None

    async def _from_others(self, g: _Gathering, owner: PeerId, failed: anyio.Event) -> SignedPart | None:
        with anyio.move_on_after(HEDGE * g.left_s()):
            await failed.wait()
        while owner not in g.found.faults:
            for peer, record in list(self._members().items()):
                if peer not in (self.id, owner) and peer not in g.found.faults:
                    with anyio.move_on_after(max(ASK_S, g.left_s() / 2)):  # one that stalls leaves time for the next
                        part = await self._ask(g, record, owner, min(ASK_S, g.left_s()))
                        if part is not None:
                            return part
            await anyio.sleep(PAUSE_S)
        return None

    async def _ask(self, g: _Gathering, server: PeerRecord, owner: PeerId, wait_s: float) -> SignedPart | None:
        try:
            return await self._download(g, server, owner, wait_s)
        except Misbehaviour as error:
            self._blame(g, PeerId(error.fields.get("peer", server.id)), error)
        except TesseraError as error:
            log.debug("part_not_served", name=str(g.name), server=server.id, code=error.code, reason=error.message)
        return None

    def _blame(self, g: _Gathering, peer: PeerId, error: Misbehaviour) -> None:
        log.warning("part_refused", name=str(g.name), peer_id=peer, reason=error.message)
        g.found.faults.setdefault(peer, error)

    async def _download(self, g: _Gathering, server: PeerRecord, owner: PeerId, wait_s: float) -> SignedPart:
        head, first = await self._piece(g, server, owner, 0, wait_s)
        try:
            head.check(g.name)
        except Invalid as error:
            raise _wrong(server, g.name, error.message) from error
        if head.size_bytes != g.size_bytes:
            raise head.accusation(g.name, f"a part of {head.size_bytes} bytes, expected {g.size_bytes}")
        data = bytearray(g.size_bytes)
        offsets = iter(range(len(_at(data, 0, first, server, g.name)), g.size_bytes, PIECE))

        async def take_turns() -> None:
            for offset in offsets:
                again, piece = await self._piece(g, server, owner, offset, wait_s)
                if again != head:
                    raise _wrong(server, g.name, "another head than a piece before")
                _at(data, offset, piece, server, g.name)

        await _together(take_turns, WINDOW)
        part = SignedPart(head, bytes(data))
        if await to_thread.run_sync(sha256, part.data) != head.digest:
            raise _wrong(server, g.name, "other bytes than their owner signed")
        return part

    async def _piece(
        self, g: _Gathering, server: PeerRecord, owner: PeerId, offset: int, wait_s: float
    ) -> tuple[PartHead, bytes]:
        request = {**g.name.to_value(), "offset": offset, "owner": owner, "wait_ms": int(1000 * wait_s)}
        reply, body = await call(
            self._transport, server, AVERAGE, request, timeout_s=g.left_s(), reply_limit=SMALL + PIECE, bulk=True
        )
        try:
            return PartHead.parse(owner, reply), body
        except Invalid as error:
            raise _wrong(server, g.name, error.message) from error


@dataclass(frozen=True, slots=True)
class _Gathering:
    """One `collect` under way."""

    name: PartName
    size_bytes: int
    check: Check
    started: float
    ends: float
    found: Collected

    def left_s(self) -> float:
        return max(0.001, self.ends - anyio.current_time())


async def _together(work: Callable[[], Awaitable[None]], count: int) -> None:
    """`count` tasks that share what is to be done; the first failure comes out as itself."""
    failures: list[TesseraError] = []

    async def guarded() -> None:
        try:
            await work()
        except TesseraError as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(guarded)
    if failures:
        raise failures[0]


def _at(data: bytearray, offset: int, piece: bytes, server: PeerRecord, name: PartName) -> bytes:
    """Puts a piece in its place. Raises: Misbehaviour: it is none."""
    expected = min(PIECE, len(data) - offset)
    if len(piece) != expected:
        raise _wrong(server, name, f"a piece of {len(piece)} bytes, expected {expected}")
    data[offset : offset + expected] = piece
    return piece


def _wrong(server: PeerRecord, name: PartName, fault: str) -> Misbehaviour:
    evidence = {"fault": fault, "name": name.to_value(), "peer": server.id}
    return Misbehaviour(f"{server.id[:16]}…, {name}: {fault}", evidence=evidence, peer=server.id)
