"""Getting a dead stage's state back from those who hold its pieces.

Everybody is asked which snapshots he holds; headers are signed, so nobody can make one up, and one honest holder is
enough to show that a snapshot belongs to a past that the run has left. The newest one of which enough pieces are
offered is fetched, several pieces at once. A holder that is slow, gone or serves something else is replaced by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import anyio
import structlog
from anyio import to_thread

from tessera.core.errors import Invalid, Misbehaviour, Missing, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId
from tessera.p2p.calls import call
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.protocols import CALL_S, SMALL, SNAPSHOT
from tessera.training.snapshot_code import open_snapshot, share_hash
from tessera.training.snapshot_header import SnapshotHeader, is_overtaken
from tessera.training.snapshot_shelf import KEPT
from tessera.training.snapshots import CHUNK_BYTES, CHUNK_S

__all__ = ["Found", "Inventory", "Restored", "find_snapshots", "restore"]

log = structlog.get_logger()

ASKED_AT_ONCE = 32


@dataclass
class Found:
    """A snapshot, and who offers his piece of it."""

    header: SnapshotHeader
    holders: list[PeerRecord] = field(default_factory=list)

    @property
    def enough(self) -> bool:
        return len(self.holders) >= self.header.needed


@dataclass
class Inventory:
    """What there is of a stage, newest first, without what a later session has overtaken."""

    found: list[Found] = field(default_factory=list)
    wrong: dict[PeerId, str] = field(default_factory=dict)  # who answered with something that cannot be, and with what
    away: dict[PeerId, str] = field(default_factory=dict)  # who did not answer, or would not, and why


@dataclass(frozen=True)
class Restored:
    """A stage's state at a step, to the byte what was saved there."""

    header: SnapshotHeader
    state: bytes
    wrong: dict[PeerId, str]  # holders that served something else

    @property
    def step(self) -> int:
        return self.header.step


async def find_snapshots(
    transport: Transport,
    holders: Sequence[PeerRecord],
    run_id: RunId,
    stage: int,
    *,
    made_by: Callable[[PeerId, int], bool],
) -> Inventory:
    """Ask everybody in `holders` for what he has of `stage`.

    Args:
        made_by: whether a peer was a worker of this stage at some time: others' headers count for nothing.

    Cost: one call each, 32 at once.
    """
    inventory, seen = Inventory(), dict[str, Found]()
    limiter = anyio.CapacityLimiter(ASKED_AT_ONCE)

    async def ask(record: PeerRecord) -> None:
        async with limiter:
            try:
                for header in await _list(transport, record, run_id, stage, made_by):
                    seen.setdefault(header.digest, Found(header)).holders.append(record)
            except Misbehaviour as error:
                inventory.wrong[record.id] = error.message
            except TesseraError as error:
                inventory.away[record.id] = error.message

    async with anyio.create_task_group() as tasks:
        for record in holders:
            tasks.start_soon(ask, record)
    moments = [found.header.moment for found in seen.values()]
    valid = [found for found in seen.values() if not is_overtaken(found.header.moment, moments)]
    inventory.found = sorted(valid, key=lambda f: (f.header.moment, len(f.holders)), reverse=True)
    return inventory


async def restore(
    transport: Transport,
    holders: Sequence[PeerRecord],
    run_id: RunId,
    stage: int,
    step: int | None = None,
    *,
    made_by: Callable[[PeerId, int], bool],
    size_limit: int,
) -> Restored:
    """The state of `stage` at the newest step that enough holders give back, or at `step`.

    All other stages must then go back to that step. Who calls this must be admitted to the stage.

    Args:
        holders: everybody who works at other stages.
        made_by: as for `find_snapshots`.
        size_limit: most bytes that the state can have.

    Raises: Missing, with `have` and `needed`, when too few pieces are offered or come; Misbehaviour, with `peers`,
    when that is because holders served something else, or the maker signed something false.
    Cost: the state over the wire once, and once a fragment for each holder that fails; three times the state in memory.
    """
    inventory = await find_snapshots(transport, holders, run_id, stage, made_by=made_by)
    fitting = [found for found in inventory.found if step in (None, found.header.step)]
    wrong = dict(inventory.wrong)
    failure: TesseraError = _too_few(stage, step, fitting, inventory)
    for found in filter(lambda found: found.enough, fitting):
        try:
            _check_size(found.header, size_limit)
            state = await _bring(transport, found, wrong)
        except (Missing, Misbehaviour) as error:
            log.warning("snapshot_lost", step=found.header.step, code=error.code, reason=error.message)
            failure = error
            continue
        log.info("stage_restored", stage=stage, step=found.header.step, wrong=sorted(wrong))
        return Restored(found.header, state, wrong)
    raise failure


async def _list(
    transport: Transport, record: PeerRecord, run_id: RunId, stage: int, made_by: Callable[[PeerId, int], bool]
) -> list[SnapshotHeader]:
    """One holder's headers, checked."""
    request = {"op": "list", "stage": stage}
    reply, _ = await call(transport, record, SNAPSHOT, request, timeout_s=CALL_S, reply_limit=SMALL)
    rows = reply.get("headers")
    if not isinstance(rows, list) or len(rows) > KEPT:
        raise _wrong(record, f"a holder has at most {KEPT} snapshots of a stage, not {str(rows)[:80]}")
    try:
        headers = [SnapshotHeader.from_value(row) for row in rows]
        for header in headers:
            header.number_of(record.id)
    except Invalid as error:
        raise _wrong(record, error.message) from error
    for header in headers:
        if (header.run_id, header.stage) != (run_id, stage) or not made_by(header.maker, stage):
            raise _wrong(record, f"a snapshot of stage {header.stage} by {header.maker[:16]}…, who never held it")
    return headers


async def _bring(transport: Transport, found: Found, wrong: dict[PeerId, str]) -> bytes:
    """Fetch as many pieces as are needed, as many at once, and open them."""
    header, candidates = found.header, iter(found.holders)
    fragments: dict[int, bytes] = {}
    shares: dict[int, str] = {}
    lost: dict[PeerId, str] = {}

    async def work(todo: Iterator[PeerRecord], tasks: anyio.abc.TaskGroup) -> None:
        """Until enough is here: who is done takes the next holder, so that one slow holder does not hold us up."""
        for record in todo:
            try:
                fragment, share = await _get(transport, record, header)
            except Misbehaviour as error:
                wrong[record.id] = lost[record.id] = error.message
                continue
            except TesseraError as error:
                lost[record.id] = error.message
                continue
            number = header.number_of(record.id)
            fragments[number], shares[number] = fragment, share
            if len(fragments) == header.needed:
                tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for _ in range(header.needed):
            tasks.start_soon(work, candidates, tasks)
    if len(fragments) < header.needed:
        raise _lost(header, len(fragments), lost, {peer for peer in lost if peer in wrong})
    return (await to_thread.run_sync(open_snapshot, header, fragments, shares)).state


async def _get(transport: Transport, record: PeerRecord, header: SnapshotHeader) -> tuple[bytes, str]:
    """One holder's piece, checked. Raises `Misbehaviour` for any other."""
    piece, data, share = header.pieces[header.number_of(record.id)], bytearray(), ""
    while len(data) < header.fragment_bytes:
        request = {"op": "get", "snapshot": header.digest, "offset": len(data)}
        limit = CHUNK_BYTES + SMALL
        reply, chunk = await call(transport, record, SNAPSHOT, request, timeout_s=CHUNK_S, reply_limit=limit, bulk=True)
        if not chunk or len(data) + len(chunk) > header.fragment_bytes:
            raise _wrong(record, f"a fragment that does not end at {header.fragment_bytes:,} bytes")
        data += chunk
        share = str(reply.get("share"))
        if share_hash(share) != piece.share:
            raise _wrong(record, "another share of the key than the header names")
    fragment = bytes(data)
    if sha256(fragment).hex() != piece.fragment:
        raise _wrong(record, "another fragment than the header names")
    return fragment, share


def _check_size(header: SnapshotHeader, limit: int) -> None:
    if header.size > limit:
        what = f"a state of {header.size:,} bytes, at most {limit:,} expected"
        raise Misbehaviour(f"{header.maker[:16]}… signed {what}", evidence={"peers": [header.maker], "fault": what})


def _wrong(record: PeerRecord, what: str) -> Misbehaviour:
    return Misbehaviour(f"{record.id[:16]}… serves {what}", evidence={"peer": record.id, "fault": what})


def _too_few(stage: int, step: int | None, found: list[Found], inventory: Inventory) -> Missing:
    """Why there is nothing to begin with."""
    best = max(found, key=lambda f: len(f.holders) / f.header.needed, default=None)
    have, needed = (0, 2) if best is None else (len(best.holders), best.header.needed)
    which = "any step" if step is None else f"step {step}"
    return Missing(
        f"no snapshot of stage {stage} at {which} has enough holders: {have} of {needed} needed answer, "
        f"{len(inventory.away)} are away, {len(inventory.wrong)} answer wrongly",
        have=have,
        needed=needed,
        away=sorted(inventory.away),
        peers=sorted(inventory.wrong),
    )


def _lost(header: SnapshotHeader, have: int, lost: dict[PeerId, str], liars: set[PeerId]) -> TesseraError:
    """Why pieces that were offered did not come."""
    reasons = "; ".join(f"{peer[:16]}…: {reason}" for peer, reason in sorted(lost.items()))
    text = f"{have} of {header.needed} pieces of stage {header.stage}, step {header.step} came: {reasons}"
    if not liars:
        return Missing(text, have=have, needed=header.needed)
    evidence = {"snapshot": header.digest, "peers": sorted(liars)}
    return Misbehaviour(text, evidence=evidence, have=have, needed=header.needed)
