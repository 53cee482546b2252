"""A worker: takes a seat with nothing but an invitation, fetches what the manifest names, trains, settles, and reports.

It trusts nobody: the manifest must hash to the run id, blobs to their ids, every seat must be signed by its account,
and the share contract must be ours, for this run, with these workers.

It follows what its owner wishes (`wishes`): pause, or leave. Who leaves works until somebody has taken his stage over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import anyio
import structlog
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.core.clock import Clock
from tessera.core.errors import Misbehaviour, Missing, TesseraError
from tessera.core.ids import BlobId
from tessera.models.device import pick_device
from tessera.models.parallel import Parallel, build_trainer
from tessera.models.parallel_link import RankLink
from tessera.models.trainer import StageTrainer
from tessera.p2p.blobs import BlobStore, fetch, serve_blobs
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.contract import check_handovers, check_share
from tessera.training.data import NamedBatches, open_batches
from tessera.training.gate import Gate
from tessera.training.handover import Handover, take_over
from tessera.training.home import Home
from tessera.training.joining import HostLink, Pace, take_seat
from tessera.training.keeper import Keeper
from tessera.training.manifest import Manifest
from tessera.training.news import News
from tessera.training.pipeline import Pipeline
from tessera.training.protocols import RUN
from tessera.training.roster import ROSTER_LIMIT, Roster, Seat, recall_run, remember_run
from tessera.training.rpc_link import peer_rpc
from tessera.training.status import WorkerStatus, save_status
from tessera.training.wishes import make_wish, read_wish

__all__ = ["Seated", "Worker", "WorkerConfig"]

log = structlog.get_logger()

REPORT_S = 0.5
STATUS_S = 2.0
REPORT_POINTS = 200  # losses in one report
FETCH_S = 300.0
TAKE_OVER_S = 1800.0  # how long a successor waits for the holder of his stage
GOODBYE_TRIES = 10
FIRST_LOOK_S = 1.0  # the gate is shut until somebody has looked: that is no reason to say that we pause


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker may choose alone."""

    device: str = "auto"  # cpu, cuda, mps, or auto
    memory_limit: int = 0  # bytes of each device's memory that are lent; 0 = what is free
    parallel: Parallel = "auto"  # several devices: replicate the stage on each, or shard it
    quota_bytes: int | None = None  # most of the disk for the state directory; None = no limit
    claim_above: int = 1  # units of the coin that are worth a transaction


@dataclass
class Seated:
    """Everything that a seated worker knows; handed on when its stage is trained."""

    manifest: Manifest
    stage: int
    roster: Roster
    transport: Transport
    chain: RpcChain
    trainer: StageTrainer
    blobs: BlobStore

    def moved(self, record: PeerRecord) -> None:
        """A member said where it is now."""
        self.roster = self.roster.with_records([record])


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
    folder: Path
    pipeline: Pipeline
    keeper: Keeper
    handover: Handover
    batches: NamedBatches
    news: News
    book: ReceiptBook
    successor: Seat | None = None  # who takes our stage


class Worker:
    """One worker process's part in one run. `run` returns when the host closes the run, or our stage is another's.

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
        self._pace, self._gate, self._clock, self._serve = pace, gate, clock, serve
        self._progress = _Progress()
        self._closed = anyio.Event()
        self._settled = False
        self._claimable = 0
        self._seated: Seated | None = None

    async def run(self) -> None:
        parts = await self._sit_down()
        parts.keeper.serve()
        parts.handover.serve()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._gate.watch)
                if self._link is not None:
                    tasks.start_soon(self._link.watch)
                with anyio.move_on_after(FIRST_LOOK_S):
                    await self._gate.wait_open()
                tasks.start_soon(self._report, parts)
                tasks.start_soon(self._show, parts)
                tasks.start_soon(parts.pipeline.run)
                tasks.start_soon(parts.batches.keep_ahead)
                tasks.start_soon(parts.news.run)
                tasks.start_soon(parts.handover.watch)
                tasks.start_soon(self._settle, parts.keeper)
                tasks.start_soon(self._serve_when_trained, parts)
                tasks.start_soon(self._leave_when_handed_over, parts)
                await self._closed.wait()
                tasks.cancel_scope.cancel()
        finally:
            parts.book.close()

    # --- taking the seat --------------------------------------------------------------------------------------------

    async def _sit_down(self) -> _Parts:
        manifest, stage, successor = await self._host.patiently(self._take_seat)
        folder = self._home.run_folder(manifest.run_id)
        log.info("seated", run_id=manifest.run_id, stage=stage, successor=successor)
        roster = await self._wait_for_roster(manifest)
        _check_remembered(folder, roster)
        chain = RpcChain(peer_rpc(self._transport, lambda: self._host.invitation.host))
        await self._host.patiently(lambda: self._check_chain(manifest, roster, chain))
        blobs = BlobStore(self._home.blobs, quota_bytes=self._home.blob_quota(self._config.quota_bytes))
        serve_blobs(self._transport, blobs)
        batches = await self._host.patiently(lambda: self._open_data(manifest, roster, blobs, folder))
        trainer = await to_thread.run_sync(self._build_trainer, manifest, stage)
        checkpoints = Checkpoints(folder / "checkpoints")
        if successor:
            roster = await self._take_over(manifest, stage, checkpoints, chain)
        remember_run(folder, manifest, roster)
        seated = self._seated = Seated(manifest, stage, roster, self._transport, chain, trainer, blobs)
        return self._set_to_work(seated, folder, checkpoints, batches)

    def _set_to_work(self, seated: Seated, folder: Path, checkpoints: Checkpoints, batches: NamedBatches) -> _Parts:
        manifest, book = seated.manifest, ReceiptBook(folder / "book.sqlite")
        pipeline = Pipeline(
            manifest,
            stage=seated.stage,
            key=self._home.peer_key,
            transport=self._transport,
            trainer=seated.trainer,
            batches=batches,
            book=book,
            checkpoints=checkpoints,
            roster=lambda: seated.roster,
            refresh=lambda: self._refresh(seated, folder),
            watcher=self._progress,
            gate=self._gate,
            clock=self._clock,
        )
        keeper = Keeper(
            manifest,
            transport=self._transport,
            chain=seated.chain,
            account_key=self._home.account_key,
            book=book,
            roster=lambda: seated.roster,
            steps_done=lambda: pipeline.steps_done,
        )
        handover = Handover(
            manifest,
            transport=self._transport,
            chain=seated.chain,
            account_key=self._home.account_key,
            book=book,
            checkpoints=checkpoints,
            training=pipeline,
            roster=lambda: seated.roster,
            successor=lambda: parts.successor,
        )
        news = News(
            manifest,
            transport=self._transport,
            key=self._home.peer_key,
            book=book,
            roster=lambda: seated.roster,
            moved=lambda record: seated.moved(record),
            steps_done=lambda: pipeline.steps_done,
            clock=self._clock,
        )
        parts = _Parts(seated, folder, pipeline, keeper, handover, batches, news, book)
        return parts

    async def _take_seat(self) -> tuple[Manifest, int, bool]:
        return await take_seat(self._host, self._home, self._pace)

    async def _wait_for_roster(self, manifest: Manifest) -> Roster:
        told = -1
        while True:
            reply, _ = await self._host.patiently(
                lambda: self._host.call(RUN, {"op": "roster"}, reply_limit=ROSTER_LIMIT)
            )
            if reply.get("ready") is True:
                return Roster.from_value(manifest.run_id, manifest.model.stages, reply)
            taken = reply.get("taken")
            if isinstance(taken, int) and taken != told:
                log.info("waiting_for_workers", taken=taken, stages=manifest.model.stages)
                told = taken
            await anyio.sleep(REPORT_S)  # the host holds the question for a while; one that does not is no busy loop

    async def _check_chain(self, manifest: Manifest, roster: Roster, chain: RpcChain) -> None:
        found = await chain.chain_id()
        if found != manifest.chain_id:
            raise Misbehaviour(f"the host's chain has id {found}, the manifest says {manifest.chain_id}")
        await check_share(chain, roster)

    async def _take_over(self, manifest: Manifest, stage: int, checkpoints: Checkpoints, chain: RpcChain) -> Roster:
        """Have the stage's holder hand it over; the roster that names us."""

        async def leaver() -> PeerRecord:
            return (await self._wait_for_roster(manifest)).holder(stage)

        roster = await self._wait_for_roster(manifest)
        if roster.holder(stage).id != self._transport.id:
            log.info("taking_over", stage=stage, from_peer=roster.holder(stage).id)
            await take_over(self._transport, leaver, checkpoints, patience_s=TAKE_OVER_S)
        while (roster := await self._wait_for_roster(manifest)).holder(stage).id != self._transport.id:
            await anyio.sleep(REPORT_S)
        await check_share(chain, roster)
        return roster

    async def _open_data(self, manifest: Manifest, roster: Roster, blobs: BlobStore, folder: Path) -> NamedBatches:
        """The run's text, from whoever has it: tokenizer and indexes now, shards when they are due."""
        pin = f"run-{manifest.run_id[:16]}"

        async def bring(blob: BlobId) -> Path:
            await to_thread.run_sync(blobs.pin, blob, pin)
            if not await to_thread.run_sync(blobs.is_here, blob):
                log.info("fetching", blob=blob)
                await fetch(self._transport, self._sources(roster), blob, blobs, timeout_s=FETCH_S)
            return await to_thread.run_sync(blobs.path, blob)

        def release(blob: BlobId) -> None:
            blobs.unpin(blob, pin)
            if not blobs.pins(blob):  # others have it; what is not needed soon is room for what is
                blobs.remove(blob)

        await bring(manifest.tokenizer)
        return await open_batches(manifest, bring, release, folder)

    def _sources(self, roster: Roster) -> list[PeerRecord]:
        """Who may have the run's text: the host, and the workers where they are now."""
        workers = self._seated.roster if self._seated is not None else roster
        known = {record.id: record for record in (*self._host.invitation.peers, *workers.records)}
        return [record for peer, record in known.items() if peer != self._transport.id]

    def _build_trainer(self, manifest: Manifest, stage: int) -> StageTrainer:
        schedule, config = manifest.schedule, self._config
        return build_trainer(
            manifest.model,
            stage,
            steps=schedule.steps,
            sequences=schedule.sequences,
            length=schedule.length,
            microbatches=schedule.microbatches,
            device=pick_device(config.device),
            limit_bytes=config.memory_limit,
            link=self._link,
            parallel=config.parallel,
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
        account = self._home.account_key.account
        try:
            self._claimable = await share.claimable(account)
            if self._claimable >= self._config.claim_above:
                await share.claim(self._home.account_key, account)
                log.info("income_claimed", units=str(self._claimable))
        except TesseraError as error:  # the chain is away: the income waits in the contract
            log.warning("claim_failed", code=error.code, reason=error.message)

    async def _report(self, parts: _Parts) -> None:
        """Tell the host how it goes, until it closes the run. A host that is away misses nothing that is paid for.

        Its answers also say when the run pauses, when a peer has come back at another address, and who follows us.
        """
        edition: object = None
        rtt_ms: float | None = None
        while True:
            progress, pipeline = self._progress, parts.pipeline
            losses, validations = progress.losses, progress.validations  # replaced, never changed, by what comes in
            wish = read_wish(parts.folder)
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
                _pause(self._gate, "run", reply.get("phase") == "paused")
                self._meet_successor(parts, reply.get("successor"), wish == "leave")
                if reply.get("roster") != edition:
                    edition = reply.get("roster")
                    await self._refresh(parts.seated, parts.folder)
            except TesseraError as error:
                log.debug("host_away", code=error.code, reason=error.message)
                await anyio.sleep(REPORT_S)
            await anyio.sleep(REPORT_S)

    def _meet_successor(self, parts: _Parts, value: object, leaving: bool) -> None:
        """Note who is to follow us, if we want to leave; the host alone cannot make us go."""
        if value is None or not leaving:
            parts.successor = None
            return
        seat = Seat.from_value(value)
        seat.check(parts.seated.manifest.run_id)
        if seat.stage != parts.seated.stage:
            raise Misbehaviour(f"the host names a successor for stage {seat.stage}, ours is {parts.seated.stage}")
        if parts.successor != seat:
            log.info("successor_found", successor=seat.peer, account=seat.account)
        parts.successor = seat

    async def _leave_when_handed_over(self, parts: _Parts) -> None:
        await parts.handover.complete.wait()
        make_wish(parts.folder, "work")  # done: joining again is a new beginning
        for _ in range(GOODBYE_TRIES):  # the host reads the chain; without it, the successor's question has it read
            try:
                await self._host.call(RUN, {"op": "handed_over"})
                break
            except TesseraError as error:
                log.debug("goodbye_unheard", code=error.code, reason=error.message)
                await anyio.sleep(REPORT_S)
        log.info("left", stage=parts.seated.stage)
        self._closed.set()

    async def _refresh(self, seated: Seated, folder: Path) -> None:
        """Newer addresses, and successors of those who left, from the host; what it says of the latter must be on the
        chain.
        """
        try:
            reply, _ = await self._host.call(RUN, {"op": "roster"}, reply_limit=ROSTER_LIMIT)
            roster = Roster.from_value(seated.manifest.run_id, seated.manifest.model.stages, reply)
            if not roster.follows(seated.roster):
                log.error("roster_changed", reason="the host names other workers or another contract; ignored")
                return
            if len(roster.past) > len(seated.roster.past):
                await check_handovers(ModelShare(seated.chain, roster.share), roster, len(seated.roster.past))
                remember_run(folder, seated.manifest, roster)
                log.info("stage_has_new_holder", stages=[past.seat.stage for past in roster.past])
        except TesseraError as error:
            log.debug("roster_not_refreshed", code=error.code, reason=error.message)
            return
        seated.roster = roster.with_records(seated.roster.records)

    async def _show(self, parts: _Parts) -> None:
        """Keep the status file fresh, for `tessera status`."""
        while True:
            pipeline, seated = parts.pipeline, parts.seated
            status = WorkerStatus(
                run_id=seated.manifest.run_id,
                name=seated.manifest.name,
                stage=seated.stage,
                stages=seated.manifest.model.stages,
                account=self._home.account_key.account,
                time=self._clock.time(),
                step=pipeline.steps_done,
                steps=seated.manifest.schedule.steps,
                tokens_per_step=seated.manifest.tokens_per_step,
                last_step=pipeline.last_step,
                trouble=pipeline.trouble,
                pauses=self._gate.reason,
                leaving=read_wish(parts.folder) == "leave",
                successor="" if parts.successor is None else parts.successor.peer,
                trained=pipeline.trained.is_set(),
                settled=self._settled,
                claimable=self._claimable,
            )
            try:
                await to_thread.run_sync(save_status, parts.folder, status)
            except OSError as error:
                log.warning("status_not_written", reason=str(error))
            await anyio.sleep(STATUS_S)


def _check_remembered(folder: Path, roster: Roster) -> None:
    """Whoever worked for one contract must not be moved to another under the same run id."""
    try:
        _, before = recall_run(folder)
    except Missing:
        return
    if not roster.follows(before):
        raise Misbehaviour(
            f"the host now names contract {roster.share} and {len(roster.seats)} workers; "
            f"when this run was joined, they were {before.share} and others: do not follow it",
            evidence={"before": before.to_value(), "now": roster.to_value()},
        )


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
