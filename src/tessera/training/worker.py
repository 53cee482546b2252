"""A worker: takes a seat with nothing but a ticket, fetches what the manifest names, trains, settles, and reports.

It trusts nobody: the manifest must hash to the run id, blobs to their ids, every seat must be signed by its account,
and the share contract must be ours, for this run, with these workers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
import structlog
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare
from tessera.core.clock import Clock
from tessera.core.errors import Late, Misbehaviour, Missing, TesseraError, Unavailable
from tessera.core.ids import BlobId
from tessera.models.dataset import Dataset
from tessera.models.device import pick_device
from tessera.models.trainer import StageTrainer
from tessera.p2p.blobs import BlobStore, fetch, serve_blobs
from tessera.p2p.calls import call
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.contract import check_share
from tessera.training.data import NamedBatches
from tessera.training.home import Home
from tessera.training.keeper import Keeper
from tessera.training.manifest import MANIFEST_LIMIT, Manifest, load_manifest
from tessera.training.pipeline import Pipeline
from tessera.training.protocols import CALL_S, JOIN, RUN, SMALL
from tessera.training.roster import Roster, recall_run, remember_run, seat_binding
from tessera.training.rpc_link import peer_rpc
from tessera.training.ticket import Ticket

__all__ = ["Seated", "Worker", "WorkerConfig"]

log = structlog.get_logger()

T = TypeVar("T")

REPORT_S = 0.5
REPORT_POINTS = 200  # losses in one report
FETCH_S = 300.0
ROSTER_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker may choose alone."""

    device: str = "auto"  # cpu, cuda, mps, or auto
    patience_s: float = 60.0  # how long to look for the host before giving up
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


class Worker:
    """One worker process's part in one run. `run` returns when the host closes the run.

    Args:
        serve: called once the stage is trained, for as long as the run is open; offers the stage for inference.
    """

    def __init__(
        self,
        home: Home,
        ticket: Ticket,
        transport: Transport,
        config: WorkerConfig,
        *,
        clock: Clock,
        serve: Callable[[Seated], Awaitable[None]],
    ) -> None:
        self._home, self._ticket, self._transport, self._config = home, ticket, transport, config
        self._clock, self._serve = clock, serve
        self._progress = _Progress()
        self._closed = anyio.Event()
        self._settled = False

    async def run(self) -> None:
        seated, pipeline, keeper, book = await self._sit_down()
        keeper.serve()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._report, seated, pipeline)
                tasks.start_soon(pipeline.run)
                tasks.start_soon(self._settle, keeper)
                tasks.start_soon(self._serve_when_trained, seated, pipeline)
                await self._closed.wait()
                tasks.cancel_scope.cancel()
        finally:
            book.close()

    # --- taking the seat --------------------------------------------------------------------------------------------

    async def _sit_down(self) -> tuple[Seated, Pipeline, Keeper, ReceiptBook]:
        manifest, stage = await self._patiently(self._join)
        folder = self._home.run_folder(manifest.run_id)
        log.info("seated", run_id=manifest.run_id, stage=stage)
        roster = await self._wait_for_roster(manifest)
        _check_remembered(folder, roster)
        chain = RpcChain(peer_rpc(self._transport, lambda: self._ticket.peers[0]))
        await self._check_chain(manifest, roster, chain)
        remember_run(folder, manifest, roster)
        blobs = BlobStore(self._home.blobs)
        serve_blobs(self._transport, blobs)
        dataset = await self._fetch_data(manifest, roster, blobs)
        trainer = await to_thread.run_sync(self._build_trainer, manifest, stage)
        seated = Seated(manifest, stage, roster, self._transport, chain, trainer, blobs)
        book = ReceiptBook(folder / "book.sqlite")
        pipeline = Pipeline(
            manifest,
            stage=stage,
            key=self._home.peer_key,
            transport=self._transport,
            trainer=trainer,
            batches=NamedBatches(manifest, dataset),
            book=book,
            checkpoints=Checkpoints(folder / "checkpoints"),
            roster=lambda: seated.roster,
            refresh=lambda: self._refresh(seated),
            watcher=self._progress,
            clock=self._clock,
        )
        keeper = Keeper(
            manifest,
            transport=self._transport,
            chain=chain,
            account_key=self._home.account_key,
            book=book,
            roster=lambda: seated.roster,
            steps_done=lambda: pipeline.steps_done,
        )
        return seated, pipeline, keeper, book

    async def _join(self) -> tuple[Manifest, int]:
        run_id, key = self._ticket.run_id, self._home.peer_key
        request = {
            "run_id": run_id,
            "record": self._transport.record().to_text(),
            "account": self._home.account_key.account,
            "binding": seat_binding(run_id, key.id, self._home.account_key).hex(),
        }
        reply, body = await self._call_host(JOIN, request, reply_limit=MANIFEST_LIMIT + SMALL)
        manifest, stage = load_manifest(body, run_id), reply.get("stage")
        if type(stage) is not int or not 0 <= stage < manifest.model.stages:
            raise Misbehaviour(f"the host offers stage {stage!r} of {manifest.model.stages}")
        if manifest.chain_id != self._ticket.chain_id:
            raise Misbehaviour(f"the manifest is for chain {manifest.chain_id}, the ticket for {self._ticket.chain_id}")
        return manifest, stage

    async def _wait_for_roster(self, manifest: Manifest) -> Roster:
        told = -1
        while True:
            reply, _ = await self._patiently(lambda: self._call_host(RUN, {"op": "roster"}, reply_limit=ROSTER_LIMIT))
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
        await check_share(chain, roster.share, roster.coin, manifest.run_id, roster.accounts)
        if roster.accounts.count(self._home.account_key.account) != 1:
            raise Misbehaviour("the roster does not name our account once")

    async def _fetch_data(self, manifest: Manifest, roster: Roster, blobs: BlobStore) -> Dataset:
        peers = [*self._ticket.peers, *(r for r in roster.records if r.id != self._home.peer_key.id)]
        for blob in (manifest.tokenizer, manifest.dataset):
            await self._fetch(peers, blob, blobs)
        return await to_thread.run_sync(lambda: Dataset.from_bytes(blobs.path(manifest.dataset).read_bytes()))

    async def _fetch(self, peers: list[PeerRecord], blob: BlobId, blobs: BlobStore) -> None:
        if not blobs.has(blob):
            log.info("fetching", blob=blob)
            await fetch(self._transport, peers, blob, blobs, timeout_s=FETCH_S)

    def _build_trainer(self, manifest: Manifest, stage: int) -> StageTrainer:
        return StageTrainer(
            manifest.model, stage, steps=manifest.schedule.steps, device=pick_device(self._config.device)
        )

    # --- while the run is open --------------------------------------------------------------------------------------

    async def _serve_when_trained(self, seated: Seated, pipeline: Pipeline) -> None:
        await _event_set(lambda: pipeline.trained)
        log.info("trained", stage=seated.stage, steps=pipeline.steps_done)
        await self._serve(seated)

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
            waiting = await share.claimable(account)
            if waiting >= self._config.claim_above:
                await share.claim(self._home.account_key, account)
                log.info("income_claimed", units=str(waiting))
        except TesseraError as error:  # the chain is away: the income waits in the contract
            log.warning("claim_failed", code=error.code, reason=error.message)

    async def _report(self, seated: Seated, pipeline: Pipeline) -> None:
        """Tell the host how it goes, until it closes the run. A host that is away misses nothing that is paid for.

        Its answers also say when a peer has come back at another address.
        """
        edition: object = None
        rtt_ms: float | None = None
        while True:
            progress, wire = self._progress, pipeline.wire
            losses, validations = progress.losses, progress.validations  # replaced, never changed, by what comes in
            report = {
                "step": max(progress.step, pipeline.steps_done),
                "losses": losses,
                "validations": validations,
                "wire_bytes": wire[0],
                "wire_tokens": wire[1],
                "sessions": pipeline.sessions,
                "trained": pipeline.trained.is_set(),
                "settled": self._settled,
                "rtt_ms": rtt_ms,
            }
            try:
                asked = anyio.current_time()
                reply, _ = await self._call_host(RUN, {"op": "report", "report": report})
                rtt_ms = (anyio.current_time() - asked) * 1000
                progress.losses = [point for point in progress.losses if point not in losses]
                progress.validations = [point for point in progress.validations if point not in validations]
                if reply.get("phase") == "closed":
                    log.info("run_closed")
                    self._closed.set()
                    return
                if reply.get("roster") != edition:
                    edition = reply.get("roster")
                    await self._refresh(seated)
            except TesseraError as error:
                log.debug("host_away", code=error.code, reason=error.message)
                await anyio.sleep(REPORT_S)
            await anyio.sleep(REPORT_S)

    async def _refresh(self, seated: Seated) -> None:
        """Newer addresses from the host. The seats themselves never change."""
        try:
            reply, _ = await self._call_host(RUN, {"op": "roster"}, reply_limit=ROSTER_LIMIT)
            roster = Roster.from_value(seated.manifest.run_id, seated.manifest.model.stages, reply)
        except TesseraError as error:
            log.debug("roster_not_refreshed", code=error.code, reason=error.message)
            return
        if not roster.same_run(seated.roster):
            log.error("roster_changed", reason="the host names other workers or another contract than before; ignored")
            return
        seated.roster = roster

    # --- the host ---------------------------------------------------------------------------------------------------

    async def _call_host(
        self, protocol: str, request: dict[str, Any], *, reply_limit: int = SMALL
    ) -> tuple[dict[str, Any], bytes]:
        host = self._ticket.peers[0]
        return await call(self._transport, host, protocol, request, timeout_s=CALL_S, reply_limit=reply_limit)

    async def _patiently(self, action: Callable[[], Awaitable[T]]) -> T:
        """Try again while the host is away, up to `patience_s`."""
        deadline = self._clock.time() + self._config.patience_s
        while True:
            try:
                return await action()
            except (Unavailable, Late) as error:
                if self._clock.time() > deadline:
                    addresses = ", ".join(self._ticket.peers[0].addrs)
                    raise Unavailable(
                        f"nobody answers for run {self._ticket.run_id[:16]}… at {addresses}: "
                        "is it still running? Ask for a new ticket"
                    ) from error
                await anyio.sleep(1.0)


def _check_remembered(folder: Path, roster: Roster) -> None:
    """Whoever worked for one contract must not be moved to another under the same run id."""
    try:
        _, before = recall_run(folder)
    except Missing:
        return
    if not roster.same_run(before):
        raise Misbehaviour(
            f"the host now names contract {roster.share} and {len(roster.seats)} workers; "
            f"when this run was joined, they were {before.share} and others: do not follow it",
            evidence={"before": before.to_value(), "now": roster.to_value()},
        )


async def _event_set(current: Callable[[], anyio.Event]) -> None:
    """Wait for an event that may be replaced while we wait."""
    while not current().is_set():
        with anyio.move_on_after(1.0):
            await current().wait()
