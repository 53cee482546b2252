"""One worker at work between two neighbours whom a test plays: what he is sent, and what leaves him."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from tessera.core.ids import PeerId
from tessera.p2p.transport import PeerRecord
from tessera.training.book import ReceiptBook
from tessera.training.frames import Frame, Kind
from tessera.training.manifest import Manifest
from tessera.training.receipts import Direction, Receipt, payloads_digest
from tessera.training.roster import Roster, Seat, seat_binding
from tessera.training.work import NoRecords, StageWork
from training_world import FakeBatches, FakeTrainer, account_keys, peer_keys, small_manifest

MANIFEST = small_manifest(stages=3, steps=20)
KEYS = peer_keys(5)
UP, ME, DOWN, OTHER_UP, OTHER_DOWN = KEYS
TERM = 3


@dataclass
class FakeBoundary:
    """Frames as they would have left."""

    deliver: Callable[[PeerId, Frame], None]
    broken: Any
    queue: int
    frame_limit: int
    wait_s: float
    down: list[tuple[PeerId, Frame]] = field(default_factory=list)
    up: list[tuple[PeerId, Frame]] = field(default_factory=list)
    dropped: list[PeerId] = field(default_factory=list)

    async def run(self) -> None:
        await anyio.sleep_forever()

    def send_down(self, peer: PeerId, frame: Frame) -> None:
        self.down.append((peer, frame))

    def send_up(self, peer: PeerId, frame: Frame) -> None:
        self.up.append((peer, frame))

    def drop(self, peer: PeerId) -> None:
        self.dropped.append(peer)


def roster() -> Roster:
    seats = []
    for stage, key, account in zip((0, 1, 2, 0, 2), KEYS, account_keys(5), strict=True):
        record = PeerRecord.sign(key, ("memory:x",), 2_000_000_000)
        seats.append(Seat(stage, record, account.account, seat_binding(MANIFEST.run_id, key.id, stage, account)))
    share = account_keys(1)[0].account
    return Roster(MANIFEST.run_id, 3, tuple(sorted(seats, key=lambda seat: seat.stage)), share, share, share)


class Desk:
    """The worker of stage 1, between two neighbours whom a test plays."""

    def __init__(self, folder: Path, manifest: Manifest = MANIFEST, trainer: Any = None, batches: Any = None) -> None:
        self.manifest, self.said = manifest, list[dict[str, Any]]()
        self.trainer = trainer or FakeTrainer(manifest, 1)
        self.book = ReceiptBook(folder / "book.sqlite")
        self.calls: list[str] = []

        async def compute(function: Callable[..., Any], *arguments: Any) -> Any:
            self.calls.append(getattr(function, "__name__", ""))
            await anyio.lowlevel.checkpoint()
            return function(*arguments)

        known = roster()
        self.work = StageWork(
            manifest,
            stage=1,
            key=ME,
            trainer=self.trainer,
            batches=batches or FakeBatches(),
            book=self.book,
            roster=lambda: known,
            say=self.said.append,
            boundary=FakeBoundary,  # type: ignore[arg-type]
            records=NoRecords(),
            compute=compute,
        )
        self.wire: FakeBoundary = self.work.boundary  # type: ignore[assignment]
        self.size = manifest.tokens_per_microbatch * manifest.model.message_bytes_per_token()

    async def open(self, term: int = TERM, step: int = 0) -> None:
        self.trainer.step = step
        self.work.do(lambda: self.work.open(term, step))
        await self.settle()

    async def take(self, index: int, source: Any = UP, target: Any = DOWN, *, again: bool = False) -> None:
        async def job() -> None:
            self.work.take(index, source.id, target.id, again)

        self.work.do(job)
        await self.settle()

    async def hear(self, peer: Any, kind: Kind, index: int, payload: bytes | None = None, **changes: int) -> None:
        facts = {"term": TERM, "step": self.work.step, **changes}
        payload = bytes([index]) * self.size if payload is None else payload
        self.work.deliver(peer.id, Frame(kind, facts["term"], facts["step"], index, payload))
        await self.settle()

    async def pass_through(self, index: int) -> None:
        await self.take(index)
        await self.hear(UP, Kind.FORWARD, index)
        await self.hear(DOWN, Kind.GRADIENT, index)

    async def commit(self) -> None:
        self.work.do(lambda: self.work.commit(None, anyio.lowlevel.checkpoint))
        await self.settle()

    async def settle(self) -> None:
        await anyio.sleep(1)

    def receipt(self, key: Any, direction: Direction, step: int, hashes: dict[int, bytes]) -> Receipt:
        indexes = tuple(sorted(hashes))
        receipt = Receipt(MANIFEST.run_id, step, ME.id, key.id, direction, indexes, payloads_digest(hashes))
        return receipt.signed_by(key)
