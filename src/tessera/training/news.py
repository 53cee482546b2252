"""What a run's workers tell each other without asking the host: where they are now, and what they have signed.

    seats      each one's newest peer record, so that neighbours find each other while the host is away
    receipts   those that a worker signed in the last steps, so that no two machines hold the only copies
    verdicts   audits that somebody failed, or did not let happen, as soon as they are over

All are flooded among the workers. Nothing is believed that is not signed by whom it concerns: a record by its peer, a
receipt by its signer, a verdict by its auditor. Losing all of it costs time, not shares: the host knows the records,
neighbours their receipts, auditors their verdicts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import anyio
import structlog
from anyio import to_thread

from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Misbehaviour, TesseraError
from tessera.core.signing import PeerKey
from tessera.p2p.flood import Flood, FloodConfig
from tessera.p2p.flood_item import Item
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.accusations import Accusations, read_accusations
from tessera.training.audit import Verdict
from tessera.training.book import ReceiptBook
from tessera.training.manifest import Manifest
from tessera.training.receipts import Receipt, why_not
from tessera.training.roster import Roster

__all__ = ["News"]

log = structlog.get_logger()

SEATS, RECEIPTS, VERDICTS = "seats", "receipts", "verdicts"
BATCH_STEPS = 10  # after which receipts are told
BATCH_LIMIT = 16 * 1024  # bytes of one item
BATCH = 20  # receipts in one item, of 800 bytes at most
RECEIPTS_TTL_S = 2 * 3600.0
LOOK_S = 2.0
REMEMBERED = 16  # workers who left
INBOX = 64  # items that wait for their signatures to be checked; more are asked of the neighbours when they are missed


class News:
    """One worker's part.

    Args:
        roster: the present one, whose records are followed.
        moved: told of a worker's record, which may be newer than what is known.
        accused: told of a verdict that somebody else gave, once it is checked and kept.
        steps_done: how many steps this worker has finished.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        transport: Transport,
        key: PeerKey,
        book: ReceiptBook,
        roster: Callable[[], Roster],
        moved: Callable[[PeerRecord], None],
        accused: Callable[[Verdict], None],
        steps_done: Callable[[], int],
        clock: Clock,
    ) -> None:
        self._manifest, self._transport, self._key, self._book = manifest, transport, key, book
        self._roster, self._moved, self._steps_done, self._accused = roster, moved, steps_done, accused
        self._flood = Flood(transport, manifest.run_id, self._members, key, clock, random.Random(key.id), FloodConfig())
        self._flood.subscribe(SEATS, self._on_seat)
        self._flood.subscribe(RECEIPTS, self._on_signed)
        self._flood.subscribe(VERDICTS, self._on_signed)
        self._inbox_in, self._inbox = anyio.create_memory_object_stream[Item](INBOX)
        self._told = max(0, steps_done() - BATCH_STEPS)

    async def run(self) -> None:
        """Take part until cancelled."""
        async with self._inbox_in, self._inbox, anyio.create_task_group() as tasks:
            tasks.start_soon(self._flood.run)
            tasks.start_soon(self._take_signed)
            self._say(SEATS, self._transport.record().to_text().encode(), key="record")
            while True:
                self._tell_receipts()
                await anyio.sleep(LOOK_S)

    def _members(self) -> list[PeerRecord]:
        """The workers, and the last who left: what they signed still counts."""
        roster = self._roster()
        return [*roster.records, *(seat.record for seat in roster.past[-REMEMBERED:])]

    def accuse(self, verdict: Verdict) -> None:
        """Tell everybody of a verdict of ours. Who does not hear it gets it from our book when the epoch is settled."""
        self._say(VERDICTS, encoding.encode([verdict.to_row()]), ttl_s=RECEIPTS_TTL_S)

    # --- telling ----------------------------------------------------------------------------------------------------

    def _tell_receipts(self) -> None:
        """What we signed in each ten steps, once they are done; the rest at the end."""
        done, last = self._steps_done(), self._manifest.schedule.steps
        while self._told < last and (done - self._told >= BATCH_STEPS or done == last):
            steps = range(self._told, min(self._told + BATCH_STEPS, last))
            held = self._book.of_steps(self._manifest.run_id, steps)
            rows = [receipt.to_row() for receipt in held if receipt.signer == self._key.id]
            for start in range(0, len(rows), BATCH):
                if not self._say(RECEIPTS, encoding.encode(rows[start : start + BATCH]), ttl_s=RECEIPTS_TTL_S):
                    return  # later
            self._told = steps.stop

    def _say(self, topic: str, payload: bytes, *, key: str = "", ttl_s: float | None = None) -> bool:
        try:
            self._flood.publish(topic, payload, key, ttl_s=ttl_s)
            return True
        except TesseraError as error:
            log.info("news_not_told", topic=topic, code=error.code, reason=error.message)
            return False

    # --- hearing ----------------------------------------------------------------------------------------------------

    def _on_seat(self, item: Item) -> None:
        try:
            record = PeerRecord.from_text(item.payload.decode(errors="replace"))
        except Invalid as error:
            log.warning("news_wrong", topic=item.topic, peer_id=item.origin, reason=error.message)
            return
        if record.id == item.origin != self._key.id:
            self._moved(record)

    def _on_signed(self, item: Item) -> None:
        if item.origin != self._key.id:
            try:
                self._inbox_in.send_nowait(item)
            except (anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
                log.debug("news_dropped", topic=item.topic, peer_id=item.origin)

    async def _take_signed(self) -> None:
        async for item in self._inbox:
            try:
                if item.topic == VERDICTS:
                    self._hear_verdicts(await to_thread.run_sync(self._read_verdicts, item))
                else:
                    self._book.add(await to_thread.run_sync(self._read_receipts, item))
            except (Invalid, Misbehaviour) as error:
                log.warning("news_wrong", topic=item.topic, peer_id=item.origin, reason=error.message)
            except TesseraError as error:  # the disk, or we are leaving
                log.warning("news_not_kept", code=error.code, reason=error.message)

    def _hear_verdicts(self, verdicts: list[Verdict]) -> None:
        """Keep those that the auditor may still give in their epoch, and pass them on."""
        for verdict in verdicts:
            schedule = self._manifest.schedule
            steps = schedule.epoch_range(verdict.draw.step // schedule.epoch_steps)
            held = Accusations(v for v in self._book.verdicts(verdict.draw.run_id, steps) if v.outcome != "passed")
            if held.add([verdict]):
                self._book.add_verdicts([verdict])
                self._accused(verdict)

    def _read_verdicts(self, item: Item) -> list[Verdict]:
        """The verdicts of an item, their signatures checked. Runs in a thread."""
        rows = encoding.decode(item.payload, BATCH_LIMIT)
        verdicts = read_accusations(self._manifest, self._roster().stage_by_peer, rows)
        if any(verdict.draw.auditor != item.origin for verdict in verdicts):
            raise Misbehaviour("a verdict that its teller has not given", evidence=item.origin)
        return verdicts

    def _read_receipts(self, item: Item) -> list[Receipt]:
        """The receipts of an item, their signatures checked. Cost: 0.1 ms each; runs in a thread."""
        rows: Any = encoding.decode(item.payload, BATCH_LIMIT)
        if not isinstance(rows, list):
            raise Invalid("receipts come as a list")
        receipts = [Receipt.from_row(self._manifest.run_id, row) for row in rows]
        stage_of, schedule = self._roster().stage_by_peer, self._manifest.schedule
        for receipt in receipts:
            if receipt.signer != item.origin or receipt.step >= schedule.steps:
                raise Misbehaviour("a receipt that its teller has not signed, or of no step", evidence=item.origin)
            if reason := why_not(receipt, stage_of, schedule.microbatches):
                raise Misbehaviour(f"a receipt {reason}", evidence=receipt.to_row())
            receipt.check()
        return receipts
