"""A stage that dies comes back: its state lies in sealed pieces with owners of other stages.

    maker    put    ─▶ holder   header, share of the key; the holder says how many bytes of the fragment he has
    maker    chunk  ─▶ …        as bulk, from there on, until it is whole and hashes right
    member   list   ─▶ holder   headers of a stage's snapshots          only to who is admitted to that very stage
    member   get    ─▶ …        share of the key, part of the fragment  (`snapshot_restore` asks)

One worker of each stage makes a snapshot every `every` steps, in a task of its own: training hands the moment over and
goes on. Holders that are away are tried again until a newer snapshot waits. A holder believes nothing: the maker must
be the one whose turn it is, speak for himself, for another stage than the holder's, and of a moment that the run has
reached.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import anyio
import structlog
from anyio import to_thread

from tessera.core.errors import Conflict, Invalid, Late, Misbehaviour, Refused, TesseraError, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.erasure import MAX_PIECES, SHARE_LIMIT
from tessera.training.protocols import CALL_S, SMALL, SNAPSHOT
from tessera.training.snapshot_code import Sealed, seal_snapshot
from tessera.training.snapshot_header import Moment, SnapshotHeader
from tessera.training.snapshot_shelf import KEPT, Shelf

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_S",
    "Member",
    "SnapshotConfig",
    "Snapshots",
    "Spread",
    "choose_holders",
    "choose_maker",
    "needed_of",
]

log = structlog.get_logger()

CHUNK_BYTES = 1 << 20
CHUNK_S = 40.0  # a chunk at 0.2 Mb/s
RETRY_S = 2.0
RETRY_MOST_S = 30.0
RESENT = 3  # times a fragment and a chunk: a holder that has us send more than this wastes our uplink


class Member(Protocol):
    """A worker of the run; `tessera.training.roster.Seat` is one."""

    @property
    def stage(self) -> int: ...
    @property
    def record(self) -> PeerRecord: ...


class Steps(Protocol):
    """Where states are saved; `tessera.training.checkpoints.Checkpoints`."""

    def steps(self) -> list[int]: ...
    def load(self, step: int) -> bytes: ...
    def hold(self, steps: Iterable[int]) -> None: ...


@dataclass(frozen=True)
class SnapshotConfig:
    """How often, with how many, and at what cost."""

    every: int = 100  # steps from one snapshot to the next: a multiple of the checkpoints' interval, alike for all
    holders: int = 5  # pieces of a snapshot, at most 16; fewer where fewer workers hold other stages
    quota_bytes: int = 16 << 30  # most of the disk for other stages' snapshots
    patience_s: float = 900.0  # how long a holder that is away, and takes nothing, is tried again

    def __post_init__(self) -> None:
        if self.every < 1 or not 2 <= self.holders <= MAX_PIECES or self.quota_bytes < 1 or self.patience_s <= 0:
            raise Invalid(f"snapshots come every 1 step or more, with 2 to {MAX_PIECES} holders: not {self}")


@dataclass
class Spread:
    """How far a snapshot got."""

    header: SnapshotHeader
    placed: list[PeerId] = field(default_factory=list)
    missing: dict[PeerId, str] = field(default_factory=dict)  # and why

    @property
    def restorable(self) -> bool:
        return len(self.placed) >= self.header.needed


@dataclass
class _Delivery:
    """One piece on its way."""

    record: PeerRecord
    fragment: bytes
    share: str
    moved: float  # when its holder last took something
    sent: int = 0  # bytes, those that were lost included


def needed_of(count: int) -> int:
    """How many of `count` holders give a state back: a majority, at least 2. So a minority reads nothing.

    >>> [needed_of(count) for count in (2, 3, 4, 5, 16)]
    [2, 2, 3, 3, 9]
    """
    return count // 2 + 1


def choose_holders(run_id: RunId, stage: int, members: Sequence[Member], count: int) -> list[PeerRecord]:
    """Up to `count` workers of other stages, alike for everybody: from as many stages as there are, evenly.

    Whoever has a whole stage on his side still has one of the pieces only, where there are stages enough. The order is
    that of SHA-256(run ‖ stage ‖ peer), so that no worker holds for all stages.
    """
    queues: dict[int, list[Member]] = {}
    ranked = sorted(members, key=lambda member: _rank(run_id, stage, member.record.id))
    for member in ranked:
        if member.stage != stage:
            queues.setdefault(member.stage, []).append(member)
    rounds = range(max((len(queue) for queue in queues.values()), default=0))
    chosen = [queue[turn].record for turn in rounds for queue in queues.values() if turn < len(queue)]
    return chosen[:count]


def choose_maker(run_id: RunId, stage: int, members: Sequence[Member], step: int, every: int) -> PeerId | None:
    """Whose turn it is among the workers of `stage`; None when it has none.

    Each has his turn, so that of the newest two snapshots one is good when every other worker is.
    """
    peers = sorted({m.record.id for m in members if m.stage == stage}, key=lambda peer: _rank(run_id, stage, peer))
    return peers[step // every % len(peers)] if peers else None


def _rank(run_id: RunId, stage: int, peer: PeerId) -> bytes:
    return sha256(b"tessera/holder\0", bytes.fromhex(run_id), stage.to_bytes(4, "big"), bytes.fromhex(peer))


class Snapshots:
    """One worker's part: makes its stage's snapshots when it is its turn, and holds other stages'.

    Args:
        stages: of the run; each other stage has an equal part of the quota.
        checkpoints: where `offer`ed states lie, and what must stay there is held.
        checkpoint_every: steps from one checkpoint to the next.
        members: who works now, at which stage.
        maker_of: whose turn it is at a stage and step (`choose_maker`).
        admitted: whether a peer is a worker of this very stage now, by what the run's members agree on.
        reached: how far the run is: the present session, and the steps done.

    Raises: Invalid when checkpoints and snapshots do not fall together; Unavailable for a disk that refuses.
    """

    def __init__(
        self,
        config: SnapshotConfig,
        *,
        run_id: RunId,
        stage: int,
        stages: int,
        key: PeerKey,
        transport: Transport,
        folder: Path,
        checkpoints: Steps,
        checkpoint_every: int,
        members: Callable[[], Sequence[Member]],
        maker_of: Callable[[int, int], PeerId | None],
        admitted: Callable[[PeerId, int], bool],
        reached: Callable[[], Moment],
    ) -> None:
        if config.every % checkpoint_every:
            raise Invalid(f"snapshots every {config.every} steps need checkpoints there, not every {checkpoint_every}")
        self._config, self._run_id, self._stage, self._stages = config, run_id, stage, stages
        self._key, self._transport, self._checkpoints = key, transport, checkpoints
        self._members, self._maker_of, self._admitted, self._reached = members, maker_of, admitted, reached
        self._shelf = Shelf(folder, peer=transport.id, stage_bytes=config.quota_bytes // max(1, stages - 1))
        self._newest = max(checkpoints.steps(), default=0)
        self._line = Moment(0, 0)  # where the present session began
        self._pending: Moment | None = None
        self._offered = anyio.Event()
        self.last: Spread | None = None  # of our own snapshots
        self._hold()

    def serve(self) -> None:
        limit = CHUNK_BYTES + SMALL
        serve_calls(self._transport, SNAPSHOT, self._answer, request_limit=limit, max_streams=8)

    def offer(self, moment: Moment) -> None:
        """The checkpoint of `moment.step` is saved: make a snapshot of it if one is due and it is our turn.

        Never waits. One that is being spread is brought to an end; of several that wait, only the newest is made.
        """
        self._newest = moment.step
        self._hold()
        due = moment.step > 0 and moment.step % self._config.every == 0
        if due and self._maker_of(self._stage, moment.step) == self._transport.id:
            self._pending = moment
            self._offered.set()

    def went_back(self, moment: Moment) -> None:
        """Session `moment.session` goes on from `moment.step`: what earlier ones reached beyond is void."""
        self._line = moment
        self._newest = moment.step
        self._shelf.drop_after(moment)
        if self._pending is not None and self._is_left(self._pending):
            self._pending = None
        self._hold()

    def steps_kept(self) -> list[int]:
        """The steps whose checkpoints must stay: a stage may come back at any of them, and all others go back with it.

        These are the steps of every snapshot that we hold, the newest two at which all stages have made one, and the
        one under way.
        """
        every = self._config.every
        newest = self._newest // every * every
        recent = {newest - number * every for number in range(KEPT + 1)}
        return sorted(step for step in recent | {header.step for header in self._shelf.headers()} if step > 0)

    async def run(self) -> None:
        """Make the snapshots that are offered; until cancelled."""
        while True:
            await self._offered.wait()
            self._offered = anyio.Event()
            moment, self._pending = self._pending, None
            if moment is not None:
                try:
                    await self._make(moment)
                except TesseraError as error:  # the next one may go better; training does not wait for this one
                    log.warning("snapshot_failed", step=moment.step, code=error.code, reason=error.message)

    def _is_left(self, moment: Moment) -> bool:
        return moment.session < self._line.session and moment.step > self._line.step

    def _hold(self) -> None:
        self._checkpoints.hold(self.steps_kept())

    # --- the maker --------------------------------------------------------------------------------------------------

    async def _make(self, moment: Moment) -> None:
        holders = choose_holders(self._run_id, self._stage, self._members(), self._config.holders)
        if len(holders) < 2:
            raise Unavailable(f"{len(holders)} workers hold other stages: a snapshot needs at least 2")
        sealed = await to_thread.run_sync(self._seal, moment, [record.id for record in holders])
        spread = self.last = Spread(sealed.header)
        now = anyio.current_time()
        todo = [_Delivery(*piece, now) for piece in zip(holders, sealed.fragments, sealed.shares, strict=True)]
        del sealed  # from here on each piece is freed as soon as it is placed
        async with anyio.create_task_group() as watch:
            watch.start_soon(self._give_way, spread, watch.cancel_scope)
            async with anyio.create_task_group() as tasks:
                while todo:
                    tasks.start_soon(self._place, spread, todo.pop())
            watch.cancel_scope.cancel()
        for record in holders:
            if record.id not in spread.placed:
                spread.missing.setdefault(record.id, "it was too slow for the next snapshot")
        facts = {"step": moment.step, "placed": len(spread.placed), "needed": spread.header.needed}
        if spread.restorable:
            log.info("snapshot_spread", **facts, missing=spread.missing)
        else:
            log.warning("snapshot_incomplete", **facts, missing=spread.missing)

    def _seal(self, moment: Moment, holders: list[PeerId]) -> Sealed:
        return seal_snapshot(
            self._checkpoints.load(moment.step),
            run_id=self._run_id,
            stage=self._stage,
            moment=moment,
            holders=holders,
            needed=needed_of(len(holders)),
            key=self._key,
            secret=secrets.token_bytes(32),
        )

    async def _give_way(self, spread: Spread, scope: anyio.CancelScope) -> None:
        """A slow holder must not keep the next snapshot waiting, once this one can be restored without him."""
        while self._pending is None or not spread.restorable:
            await anyio.sleep(RETRY_S)
        scope.cancel()

    async def _place(self, spread: Spread, delivery: _Delivery) -> None:
        """Bring one piece to its holder, in as many goes as it takes, unless a newer snapshot waits."""
        peer = delivery.record.id
        while True:
            try:
                await self._put(spread.header, delivery)
                spread.placed.append(peer)
                spread.missing.pop(peer, None)
                return
            except (Unavailable, Late) as error:
                spread.missing[peer] = error.message
                idle_s = anyio.current_time() - delivery.moved
                if self._pending is not None or idle_s > self._config.patience_s:
                    return
                wait_s = error.retry_after_s if isinstance(error, Unavailable) else 0.0
                await anyio.sleep(min(RETRY_MOST_S, max(RETRY_S, wait_s)))
            except TesseraError as error:
                spread.missing[peer] = error.message
                return

    async def _put(self, header: SnapshotHeader, delivery: _Delivery) -> None:
        record, fragment = delivery.record, delivery.fragment
        request: dict[str, Any] = {"op": "put", "header": header.to_value(), "share": delivery.share}
        have, whole = await self._ask(record, request)
        while not whole:
            chunk = fragment[have : have + CHUNK_BYTES]
            delivery.sent += len(chunk)
            if not chunk or delivery.sent > RESENT * (len(fragment) + CHUNK_BYTES):
                raise Misbehaviour(f"{record.id[:16]}… has us send the same bytes again and again", evidence=have)
            request, end = {"op": "chunk", "snapshot": header.digest, "offset": have}, have + len(chunk)
            have, whole = await self._ask(record, request, chunk)
            if have != end or whole != (end == len(fragment)):
                raise Misbehaviour(f"{record.id[:16]}… has {have:,} bytes where {end:,} were sent", evidence=have)
            delivery.moved = anyio.current_time()

    async def _ask(self, record: PeerRecord, request: dict[str, Any], body: bytes = b"") -> tuple[int, bool]:
        reply, _ = await call(
            self._transport,
            record,
            SNAPSHOT,
            request,
            body,
            timeout_s=CHUNK_S if body else CALL_S,
            reply_limit=SMALL,
            bulk=bool(body),
        )
        have, whole = reply.get("have"), reply.get("whole")
        if type(have) is not int or have < 0 or type(whole) is not bool:
            raise Misbehaviour(f"{record.id[:16]}… answers a snapshot with {str(reply)[:80]}", evidence=str(reply)[:80])
        return have, whole

    # --- the holder -------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        op = request.get("op")
        if op == "put":
            have, whole = await self._begin(peer, request.get("header"), request.get("share"))
            return {"have": have, "whole": whole}, b""
        if op == "chunk":
            digest, offset = _place_of(request)
            have, whole = await to_thread.run_sync(self._shelf.write, peer, digest, offset, body)
            if whole:
                self._hold()
            return {"have": have, "whole": whole}, b""
        if op == "list":
            stage = request.get("stage")
            self._check_admitted(peer, stage)
            return {"headers": [header.to_value() for header in self._shelf.headers(stage)]}, b""
        if op == "get":
            digest, offset = _place_of(request)
            self._check_admitted(peer, self._shelf.header(digest).stage)
            share, data = await to_thread.run_sync(self._shelf.read, digest, offset, CHUNK_BYTES)
            return {"share": share}, data
        raise Invalid(f"unknown operation {str(op)[:40]!r}")

    async def _begin(self, peer: PeerId, value: object, share: object) -> tuple[int, bool]:
        header = SnapshotHeader.from_value(value)
        if not isinstance(share, str) or len(share) > SHARE_LIMIT:
            raise Invalid(f"a share of the key is a text of at most {SHARE_LIMIT} characters")
        if header.run_id != self._run_id:
            raise Refused(f"this is run {self._run_id[:16]}…, not {header.run_id[:16]}…", rule="run")
        if header.stage == self._stage or header.stage >= self._stages:
            raise Refused(f"a worker of stage {self._stage} holds nothing of stage {header.stage}", rule="other_stage")
        if header.maker != peer or self._maker_of(header.stage, header.step) != peer:
            raise Refused(f"it is not your turn to make stage {header.stage}'s snapshot", rule="maker")
        if header.step % self._config.every:  # else one turn would be enough to fill all places
            raise Refused(f"snapshots come every {self._config.every} steps, not at {header.step}", rule="interval")
        if self._is_left(header.moment):
            raise Conflict(f"the run went back behind step {header.step} since session {header.session}")
        reached = self._reached()
        if header.session > reached.session or header.step > reached.step:
            raise Unavailable(
                f"the run has not come to step {header.step} yet, as far as we know", retry_after_s=RETRY_S
            )
        return await to_thread.run_sync(self._shelf.begin, header, share)

    def _check_admitted(self, peer: PeerId, stage: object) -> None:
        if type(stage) is not int or not self._admitted(peer, stage):
            raise Refused(f"only workers of stage {str(stage)[:20]} are given its snapshots", rule="own_stage")


def _place_of(request: dict[str, Any]) -> tuple[str, int]:
    digest, offset = request.get("snapshot"), request.get("offset")
    if not isinstance(digest, str) or type(offset) is not int:
        raise Invalid("a part of a snapshot is named by the snapshot's digest and an offset")
    return digest, offset
