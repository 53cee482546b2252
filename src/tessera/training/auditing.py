"""A worker as auditor of the others of his stage, beside training: each step, each of them, and what follows from it.

After a step he asks each of the others for his promise (`audit_commitment`) and the receipts that fix his messages,
draws, audits what his lots hit, and tells everybody whom he found wanting. A place that another auditor accuses is
audited too, whatever the lot: a conviction takes more than half of the auditors.

Who shows nothing gains nothing by it: when an epoch is settled, and receipts credit him with microbatches that he let
nobody draw about, lots are drawn about those, and each hit counts as withheld. So hiding costs what cheating costs.

Invariants: training never waits for an audit; a step that has left the window is skipped; nobody is accused over a step
that was done again, because what is signed for it then is no longer one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import anyio
import structlog

from tessera.core.errors import Missing, TesseraError
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.accusations import Place, place_of
from tessera.training.audit import Draw, Verdict, draw
from tessera.training.audit_commitment import Commitment, SignedReceipt
from tessera.training.audit_log import serve_audits
from tessera.training.audit_records import AuditRecords
from tessera.training.audit_service import PAUSE_S, Auditor, Behind
from tessera.training.book import ReceiptBook
from tessera.training.manifest import Manifest
from tessera.training.receipts import Receipt, credited
from tessera.training.roster import Roster

__all__ = ["Auditing"]

log = structlog.get_logger()

LOOK_S = 0.25  # between two looks at whether a step is done
HEARD = 64  # accusations by others that wait for a second opinion; more are let go
REMEMBERED = 2  # epochs for which we know who showed us what


class Auditing:
    """One worker's part.

    Args:
        message_bytes: of one microbatch's message.
        records: ours; they answer auditors, and replay whoever had the same parameters.
        roster: the present one.
        ids: token ids [B, T+1] of (step, microbatch).
        steps_done: how many steps this worker has finished.
        past: changes when the run goes on from a checkpoint, so that steps are done again.
        accuse: told of each verdict of ours that somebody failed.
        device: where replays run.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        stage: int,
        key: PeerKey,
        transport: Transport,
        message_bytes: int,
        records: AuditRecords,
        book: ReceiptBook,
        roster: Callable[[], Roster],
        ids: Callable[[int, int], Any],
        steps_done: Callable[[], int],
        past: Callable[[], int],
        accuse: Callable[[Verdict], None],
        device: str = "cpu",
    ) -> None:
        self._manifest, self._stage, self._key, self._transport = manifest, stage, key, transport
        self._log, self._book, self._roster = records.log, book, roster
        self._steps_done, self._past, self._accuse = steps_done, past, accuse
        self._auditor = Auditor(
            key=key,
            run_id=manifest.run_id,
            spec=manifest.model,
            stage=stage,
            config=manifest.audit,
            message_bytes=message_bytes,
            transport=transport,
            own=records.log,
            record_of=self._record_of,
            stage_of=lambda peer: roster().stage_by_peer.get(peer),
            ids=ids,
            device=device,
        )
        self._over = steps_done()
        self._covered: dict[
            tuple[PeerId, int], set[int]
        ] = {}  # microbatches that could be drawn about, by who and when
        self._heard_in, self._heard = anyio.create_memory_object_stream[Draw](HEARD)

    def serve(self) -> None:
        """Let the others of our stage audit us."""
        serve_audits(self._transport, self._log, self._of_my_stage, receipts=self._receipts)

    async def run(self) -> None:
        """Audit each step once it is done, until the run's last."""
        async with self._heard_in, self._heard, anyio.create_task_group() as tasks:
            tasks.start_soon(self._give_second_opinions)
            for step in range(self._over, self._manifest.schedule.steps):
                while self._steps_done() <= step:
                    await anyio.sleep(LOOK_S)
                await self._audit_step(step)
                self._over = step + 1

    def over(self, step: int) -> bool:
        """Whether our audits of all steps before `step` are over, or were skipped."""
        return self._over >= step

    def heard(self, verdict: Verdict) -> None:
        """Another auditor accuses somebody: look at the same place."""
        lot = verdict.draw
        if lot.worker != self._key.id and self._of_my_stage(lot.worker):
            try:
                self._heard_in.send_nowait(lot)
            except (anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
                log.debug("accusation_not_looked_at", worker=lot.worker, step=lot.step)

    def review(self, receipts: Iterable[Receipt]) -> None:
        """Accuse, as often as an audit would have hit it, who is credited with what he let us draw nothing about.

        Args:
            receipts: of an epoch, signatures checked.
        """
        held = list(receipts)
        watched = {receipt.step for receipt in held}
        if not watched:
            return
        steps, roster = range(min(watched), max(watched) + 1), self._roster()
        credit = credited(held, roster.stage_by_peer, roster.stages, steps, self._manifest.schedule.microbatches)
        accused = {(v.draw.worker, place_of(v)) for v in self._book.verdicts(self._manifest.run_id, steps)}
        auditors = len(roster.of_stage(self._stage)) - 1
        for peer in self._others():
            for step, index in sorted(credit.get(peer, ())):
                if index not in self._covered.get((peer, step), {index}):
                    lot = self._lot(peer, (step, index))
                    if lot.hits(self._manifest.audit.rate_bps, auditors) or (peer, (step, index)) in accused:
                        self._keep(self._auditor.withheld(lot, "no promise, or no receipts with it").verdict)

    # --- one step ---------------------------------------------------------------------------------------------------

    async def _audit_step(self, step: int) -> None:
        others = self._others()
        past = self._past()
        async with anyio.create_task_group() as tasks:
            for peer in others:
                tasks.start_soon(self._audit_worker, peer, step, len(others))
        if self._past() != past:
            self._covered.clear()
        oldest = step - REMEMBERED * self._manifest.schedule.epoch_steps
        self._covered = {name: covered for name, covered in self._covered.items() if name[1] > oldest}

    async def _audit_worker(self, peer: PeerId, step: int, auditors: int) -> None:
        """Whatever goes wrong here is logged: it must not stop training."""
        try:
            commitment, receipts = await self._promised(peer, step)
        except Behind:
            log.info("audit_skipped", worker=peer, step=step, kept=self._log.steps)
            return
        except TesseraError as error:
            log.info("audit_not_promised", worker=peer, step=step, code=error.code, reason=error.message)
            self._covered[peer, step] = set()
            return
        self._covered[peer, step] = self._auditor.covered(commitment, receipts)
        for lot in self._auditor.lots(commitment, receipts, auditors):
            await self._audit(lot, receipts, commitment)

    async def _promised(self, peer: PeerId, step: int) -> tuple[Commitment, Sequence[SignedReceipt]]:
        """Ask until receipts cover it all: some are on their way to him. Raises: TesseraError: no promise.  Behind."""
        attempts = self._manifest.audit.attempts
        for attempt in range(attempts):
            if attempt:
                await anyio.sleep(PAUSE_S)
            try:
                commitment, receipts = await self._auditor.promise(peer, step, Receipt.from_row)
            except TesseraError:
                if attempt + 1 == attempts:
                    raise
                continue
            if attempt + 1 == attempts or self._auditor.covered(commitment, receipts) == set(commitment.microbatches):
                return commitment, receipts
        raise Missing(f"{peer[:16]}… was not asked for step {step}")

    async def _audit(self, lot: Draw, receipts: Sequence[SignedReceipt], commitment: Commitment) -> None:
        past = self._past()
        try:
            audited = await self._auditor.audit(lot, receipts, commitment)
        except Behind:
            log.info("audit_skipped", worker=lot.worker, step=lot.step, kept=self._log.steps)
            return
        except TesseraError as error:  # ours: its text is no longer here, say
            log.info("audit_given_up", worker=lot.worker, step=lot.step, code=error.code, reason=error.message)
            return
        if self._past() == past:
            self._keep(audited.verdict)

    async def _give_second_opinions(self) -> None:
        async for heard in self._heard:
            lot = self._lot(heard.worker, (heard.step, heard.index))
            given = self._book.verdicts(self._manifest.run_id, range(lot.step, lot.step + 1))
            if any(v.draw == lot for v in given):
                continue
            try:
                commitment, receipts = await self._promised(lot.worker, lot.step)
            except Behind:
                log.info("audit_skipped", worker=lot.worker, step=lot.step, kept=self._log.steps)
                continue
            except TesseraError as error:
                log.info("audit_not_promised", worker=lot.worker, step=lot.step, reason=error.message)
                continue
            await self._audit(lot, receipts, commitment)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _keep(self, verdict: Verdict) -> None:
        lot = verdict.draw
        self._book.add_verdicts([verdict])
        if verdict.outcome == "passed":
            log.debug("audit_passed", worker=lot.worker, step=lot.step, microbatch=lot.index)
            return
        log.warning("audit_failed", worker=lot.worker, step=lot.step, microbatch=lot.index, reason=verdict.reason)
        self._accuse(verdict)

    def _lot(self, peer: PeerId, place: Place) -> Draw:
        return draw(self._key, self._manifest.run_id, place[0], peer, place[1])

    def _others(self) -> list[PeerId]:
        return [seat.peer for seat in self._roster().of_stage(self._stage) if seat.peer != self._key.id]

    def _of_my_stage(self, peer: PeerId) -> bool:
        return self._roster().stage_of(peer) == self._stage

    def _record_of(self, peer: PeerId) -> PeerRecord:
        seat = self._roster().seat_of(peer)
        if seat is None:
            raise Missing(f"{peer[:16]}… has left")
        return seat.record

    def _receipts(self, step: int) -> list[Receipt]:
        """By us and for us: those fix what we got and what we sent."""
        held = self._book.of_steps(self._manifest.run_id, range(step, step + 1))
        return [receipt for receipt in held if self._key.id in (receipt.worker, receipt.signer)]
