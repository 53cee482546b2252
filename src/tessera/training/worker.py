"""A worker: takes a seat by invitation, trains, settles, serves, reports, and leaves when it is asked to.

It follows what its owner wishes (`wishes`): pause, or leave. Who leaves works until his stage can do without him.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

import anyio
import structlog
from anyio import to_thread

from tessera.chain.faces import ModelShare, Run
from tessera.core.clock import Clock
from tessera.core.errors import TesseraError
from tessera.core.ids import Account
from tessera.models.parallel_link import RankLink
from tessera.training.attendance import Attendance
from tessera.training.audit import Verdict
from tessera.training.audit_records import AuditRecords
from tessera.training.auditing import Auditing
from tessera.training.bond import bond_state
from tessera.training.book import ReceiptBook
from tessera.training.contract import check_changes
from tessera.training.copies import NoCopies, StageCopies, StageSnapshots
from tessera.training.exchange import Exchange
from tessera.training.gate import Gate
from tessera.training.home import Home
from tessera.training.joining import HostLink, Pace
from tessera.training.keeper import Keeper
from tessera.training.manifest import CHECKPOINT_EVERY
from tessera.training.membership import Membership
from tessera.training.news import News
from tessera.training.pipeline import Pipeline
from tessera.training.protocols import RUN
from tessera.training.roster import ROSTER_LIMIT, Roster, remember_run
from tessera.training.seating import Seated, Seating, WorkerConfig
from tessera.training.snapshot_header import Moment
from tessera.training.snapshots import SnapshotConfig, Snapshots, choose_maker
from tessera.training.status import WorkerStatus, save_status
from tessera.training.sums import Sums
from tessera.training.wishes import make_wish, read_wish
from tessera.training.work import NoRecords

__all__ = ["Worker"]

log = structlog.get_logger()

REPORT_S = 0.5
STATUS_S = 2.0
BOND_S = 30.0  # between two looks at our bond
REPORT_POINTS = 200  # losses in one report
TELL_TRIES = 10
STATE_ROOM = 2  # times our own state: what one of the same stage can be, its format allowed for
FIRST_LOOK_S = 1.0  # the gate is shut until somebody has looked: that is no reason to say that we pause


@dataclass
class _Progress:
    """What waits to be reported."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)

    def step_done(self, step: int, loss: float | None) -> None:
        self.step = step
        if loss is not None:
            self.losses = [*self.losses[-REPORT_POINTS + 1 :], (step, loss)]

    def validated(self, steps: int, loss: float) -> None:
        log.info("validated", step=steps, loss=round(loss, 4))
        self.validations = [*self.validations[-REPORT_POINTS + 1 :], (steps, loss)]


@dataclass
class _Parts:
    """A seated worker at work."""

    seated: Seated
    pipeline: Pipeline
    keeper: Keeper
    membership: Membership
    attendance: Attendance
    exchange: Exchange
    snapshots: Snapshots | None
    news: News
    auditing: Auditing | None
    book: ReceiptBook


class Worker:
    """One worker process's part in one run. `run` returns when the host closes the run, or we have left it.

    Args:
        pace: what this machine can do, if it was measured.
        gate: when this worker may work.
        serve: called once the stage is trained, for as long as the run is open; offers the stage for inference.
        link: to the other processes of this worker, when several devices share the stage.
    """

    def __init__(
        self,
        home: Home,
        host: HostLink,
        config: WorkerConfig,
        *,
        pace: Pace | None,
        gate: Gate,
        clock: Clock,
        serve: Callable[[Seated], Awaitable[None]],
        link: RankLink | None = None,
    ) -> None:
        self._link = link
        self._home, self._host, self._transport, self._config = home, host, host.transport, config
        self._seating = Seating(home, host, config, pace=pace, link=link)
        self._gate, self._clock, self._serve = gate, clock, serve
        self._progress = _Progress()
        self._closed = anyio.Event()
        self._settled = False
        self._claimable = 0
        self._stake = (0, "")  # units, and what is of them

    @property
    def _account(self) -> Account:
        return self._home.account_key.account

    async def run(self) -> None:
        parts = self._set_to_work(await self._seating.sit_down())
        parts.keeper.serve()
        parts.membership.serve()
        parts.exchange.serve()
        if parts.snapshots is not None:
            parts.snapshots.serve()
        if parts.auditing is not None:
            parts.auditing.serve()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._gate.watch)
                if self._link is not None:
                    tasks.start_soon(self._link.watch)
                with anyio.move_on_after(FIRST_LOOK_S):
                    await self._gate.wait_open()
                tasks.start_soon(self._report, parts)
                tasks.start_soon(self._show, parts)
                tasks.start_soon(self._look_at_bond, parts)
                tasks.start_soon(parts.pipeline.run)
                tasks.start_soon(parts.seated.batches.keep_ahead)
                tasks.start_soon(parts.news.run)
                tasks.start_soon(parts.attendance.run)
                tasks.start_soon(parts.membership.run)
                if parts.snapshots is not None:
                    tasks.start_soon(parts.snapshots.run)
                if parts.auditing is not None:
                    tasks.start_soon(parts.auditing.run)
                tasks.start_soon(self._settle, parts.keeper)
                tasks.start_soon(self._serve_when_trained, parts)
                tasks.start_soon(self._say_goodbye, parts)
                await self._closed.wait()
                tasks.cancel_scope.cancel()
        finally:
            parts.book.close()

    def _set_to_work(self, seated: Seated) -> _Parts:
        manifest, book = seated.manifest, ReceiptBook(seated.folder / "book.sqlite")
        exchange = Exchange(
            self._transport,
            self._home.peer_key,
            manifest.run_id,
            lambda: {seat.peer: seat.record for seat in seated.roster.of_stage(seated.stage)},
            limit_bytes=seated.trainer.gradient_bytes,
        )
        snapshots = self._snapshots(seated, lambda: Moment(pipeline.past, pipeline.steps_done))
        copies: StageCopies = NoCopies()
        if snapshots is not None:
            copies = StageSnapshots(
                snapshots,
                self._transport,
                seated.checkpoints,
                stage=seated.stage,
                roster=lambda: seated.roster,
                size_limit=STATE_ROOM * len(seated.trainer.save()),
            )
        records = self._records(seated)
        pipeline = Pipeline(
            manifest,
            stage=seated.stage,
            key=self._home.peer_key,
            transport=self._transport,
            trainer=seated.trainer,
            batches=seated.batches,
            book=book,
            checkpoints=seated.checkpoints,
            sums=Sums(exchange, seated.trainer, manifest.tokens_per_step),
            roster=lambda: seated.roster,
            refresh=lambda: self._refresh(seated),
            watcher=self._progress,
            gate=self._gate,
            clock=self._clock,
            records=records or NoRecords(),
            copies=copies,
        )
        auditing = None
        if records is not None:
            auditing = self._auditing(
                seated, records, book, lambda: pipeline.steps_done, lambda: pipeline.past, lambda v: news.accuse(v)
            )
        keeper = Keeper(
            manifest,
            transport=self._transport,
            chain=seated.chain,
            account_key=self._home.account_key,
            book=book,
            roster=lambda: seated.roster,
            steps_done=lambda: pipeline.steps_done,
            clock=self._clock,
            audits=auditing,
            changed=self._tell_of_change,
        )
        attendance = Attendance(self._transport, lambda: seated.roster.records)
        membership = Membership(
            manifest,
            transport=self._transport,
            chain=seated.chain,
            account_key=self._home.account_key,
            book=book,
            training=pipeline,
            roster=lambda: seated.roster,
            attendance=attendance,
            changed=self._tell_of_change,
            leaving=lambda: read_wish(seated.folder) == "leave",
        )
        news = News(
            manifest,
            transport=self._transport,
            key=self._home.peer_key,
            book=book,
            roster=lambda: seated.roster,
            moved=lambda record: seated.moved(record),
            accused=lambda verdict: auditing.heard(verdict) if auditing is not None else None,
            steps_done=lambda: pipeline.steps_done,
            clock=self._clock,
        )
        return _Parts(seated, pipeline, keeper, membership, attendance, exchange, snapshots, news, auditing, book)

    def _snapshots(self, seated: Seated, reached: Callable[[], Moment]) -> Snapshots | None:
        """Our part in keeping stages alive; None when the manifest wants no copies."""
        every = seated.manifest.schedule.snapshot_every
        if every == 0:
            return None
        run_id = seated.manifest.run_id
        return Snapshots(
            SnapshotConfig(every=every),
            run_id=run_id,
            stage=seated.stage,
            stages=seated.manifest.model.stages,
            key=self._home.peer_key,
            transport=self._transport,
            folder=seated.folder / "snapshots",
            checkpoints=seated.checkpoints,
            checkpoint_every=CHECKPOINT_EVERY,
            members=lambda: seated.roster.seats,
            maker_of=lambda stage, step: choose_maker(run_id, stage, seated.roster.seats, step, every),
            admitted=lambda peer, stage: seated.roster.stage_of(peer) == stage,
            reached=reached,
        )

    def _records(self, seated: Seated) -> AuditRecords | None:
        """What others can audit of us; None when the manifest wants no audits."""
        if seated.manifest.audit.rate_bps == 0:
            return None
        return AuditRecords(
            seated.manifest,
            stage=seated.stage,
            key=self._home.peer_key,
            trainer=seated.trainer,
            alone=lambda: len(seated.roster.of_stage(seated.stage)) < 2,
        )

    def _auditing(
        self,
        seated: Seated,
        records: AuditRecords,
        book: ReceiptBook,
        steps_done: Callable[[], int],
        past: Callable[[], int],
        accuse: Callable[[Verdict], None],
    ) -> Auditing:
        schedule = seated.manifest.schedule
        return Auditing(
            seated.manifest,
            stage=seated.stage,
            key=self._home.peer_key,
            transport=self._transport,
            message_bytes=seated.trainer.payload_limit(schedule.sequences, schedule.length),
            records=records,
            book=book,
            roster=lambda: seated.roster,
            ids=seated.batches.train,
            steps_done=steps_done,
            past=past,
            accuse=accuse,
            device=str(seated.trainer.device),
        )

    # --- while the run is open --------------------------------------------------------------------------------------

    async def _serve_when_trained(self, parts: _Parts) -> None:
        await _event_set(lambda: parts.pipeline.trained)
        log.info("trained", stage=parts.seated.stage, steps=parts.pipeline.steps_done)
        await self._serve(parts.seated)

    async def _settle(self, keeper: Keeper) -> None:
        """Epochs first; then claim income whenever enough of it waits."""
        await keeper.run()
        self._settled = True
        while True:
            await self._claim(keeper.share)
            await anyio.sleep(1.0)

    async def _claim(self, share: ModelShare) -> None:
        try:
            self._claimable = await share.claimable(self._account)
            if self._claimable >= self._config.claim_above:
                await share.claim(self._home.account_key, self._account)
                log.info("income_claimed", units=str(self._claimable))
        except TesseraError as error:  # the chain is away: the income waits in the contract
            log.warning("claim_failed", code=error.code, reason=error.message)

    async def _report(self, parts: _Parts) -> None:
        """Tell the host how it goes, until it closes the run. A host that is away misses nothing that is paid for.

        Its answers also say when the run pauses, and when somebody came, went, or came back at another address.
        """
        edition: object = None
        rtt_ms: float | None = None
        while True:
            progress, pipeline = self._progress, parts.pipeline
            losses, validations = progress.losses, progress.validations  # replaced, never changed, by what comes in
            wish = read_wish(parts.seated.folder)
            _pause(self._gate, "owner", wish == "pause")
            report = {
                "step": max(progress.step, pipeline.steps_done),
                "losses": losses,
                "validations": validations,
                "wire_bytes": pipeline.wire[0],
                "wire_tokens": pipeline.wire[1],
                "sessions": pipeline.sessions,
                "trained": pipeline.trained.is_set(),
                "settled": self._settled,
                "rtt_ms": rtt_ms,
                "leaving": wish == "leave",
                "pauses": self._gate.reason[:100],
            }
            try:
                asked = anyio.current_time()
                reply, _ = await self._host.call(RUN, {"op": "report", "report": report})
                rtt_ms = (anyio.current_time() - asked) * 1000
                progress.losses = [point for point in progress.losses if point not in losses]
                progress.validations = [point for point in progress.validations if point not in validations]
                if reply.get("phase") == "closed":
                    log.info("run_closed")
                    self._closed.set()
                    return
                if reply.get("phase") == "left" and not await parts.keeper.run_contract.is_worker(self._account):
                    log.warning("dismissed", reason="the other workers have taken us off the list")
                    parts.membership.left.set()
                    return
                _pause(self._gate, "run", reply.get("phase") == "paused")
                if reply.get("roster") != edition:
                    edition = reply.get("roster")
                    await self._refresh(parts.seated)
            except TesseraError as error:
                log.debug("host_away", code=error.code, reason=error.message)
                await anyio.sleep(REPORT_S)
            await anyio.sleep(REPORT_S)

    async def _say_goodbye(self, parts: _Parts) -> None:
        """Once we are off the list."""
        await parts.membership.left.wait()
        make_wish(parts.seated.folder, "work")  # done: joining again is a new beginning
        await self._tell_of_change()
        log.info("left", stage=parts.seated.stage)
        self._closed.set()

    async def _tell_of_change(self) -> None:
        """The host reads the chain when somebody says that there is something new."""
        for _ in range(TELL_TRIES):
            try:
                await self._host.call(RUN, {"op": "changed"})
                return
            except TesseraError as error:
                log.debug("host_away", code=error.code, reason=error.message)
                await anyio.sleep(REPORT_S)

    async def _refresh(self, seated: Seated) -> None:
        """Newer addresses, and who came and went, from the host; what it says of the latter must be on the chain."""
        try:
            reply, _ = await self._host.call(RUN, {"op": "roster"}, reply_limit=ROSTER_LIMIT)
            if reply.get("phase") == "left":  # the next report finds that out too
                return
            roster = Roster.from_value(seated.manifest.run_id, seated.manifest.model.stages, reply)
            if not roster.follows(seated.roster):
                log.error("roster_changed", reason="the host names other workers or another contract; ignored")
                return
            if roster.changes > seated.roster.changes:
                await check_changes(Run(seated.chain, roster.run), roster, seated.roster)
                remember_run(seated.folder, seated.manifest, roster)
                log.info("workers_changed", workers=len(roster.seats), changes=roster.changes)
        except TesseraError as error:
            log.debug("roster_not_refreshed", code=error.code, reason=error.message)
            return
        seated.roster = roster.with_records(seated.roster.records)

    async def _look_at_bond(self, parts: _Parts) -> None:
        """Now and then, for `tessera status`."""
        delay_s = parts.seated.manifest.settlement.delay_s
        while True:
            try:
                member = await parts.keeper.run_contract.members(self._account)
                self._stake = (member.bond, bond_state(member, delay_s))
            except TesseraError as error:
                log.debug("bond_not_read", code=error.code, reason=error.message)
            await anyio.sleep(BOND_S)

    async def _show(self, parts: _Parts) -> None:
        """Keep the status file fresh, for `tessera status`."""
        while True:
            pipeline, seated = parts.pipeline, parts.seated
            status = WorkerStatus(
                run_id=seated.manifest.run_id,
                name=seated.manifest.name,
                stage=seated.stage,
                stages=seated.manifest.model.stages,
                account=self._account,
                time=self._clock.time(),
                step=pipeline.steps_done,
                steps=seated.manifest.schedule.steps,
                tokens_per_step=seated.manifest.tokens_per_step,
                last_step=pipeline.last_step,
                trouble=pipeline.trouble,
                pauses=self._gate.reason,
                leaving=read_wish(parts.seated.folder) == "leave",
                companions=len(seated.roster.of_stage(seated.stage)) - 1,
                audits=parts.auditing is not None,
                trained=pipeline.trained.is_set(),
                settled=self._settled,
                claimable=self._claimable,
                stake=self._stake[0],
                bond=self._stake[1],
            )
            try:
                await to_thread.run_sync(save_status, parts.seated.folder, status)
            except OSError as error:
                log.warning("status_not_written", reason=str(error))
            await anyio.sleep(STATUS_S)


def _pause(gate: Gate, who: Literal["owner", "run"], wanted: bool) -> None:
    if wanted:
        gate.pause(who)
    else:
        gate.go_on(who)


async def _event_set(current: Callable[[], anyio.Event]) -> None:
    """Wait for an event that may be replaced while we wait."""
    while not current().is_set():
        with anyio.move_on_after(1.0):
            await current().wait()
