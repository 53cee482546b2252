"""Sitting down: from an invitation to a stage that can be trained.

Nothing that the host says is believed: the manifest must hash to the run id, blobs to their ids, every seat must be
signed by its account, the contracts must be ours, for this run, on its terms, with these workers, and whoever worked
for one contract before is not moved to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog
from anyio import to_thread

from tessera.chain.client import RpcChain
from tessera.core.errors import Conflict, Late, Misbehaviour, Missing, Unavailable
from tessera.core.ids import BlobId
from tessera.models.device import pick_device
from tessera.models.parallel import Parallel, build_trainer
from tessera.models.parallel_link import RankLink
from tessera.models.trainer import StageTrainer
from tessera.p2p.blobs import BlobStore, fetch, serve_blobs
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.checkpoints import Checkpoints
from tessera.training.contract import check_contracts
from tessera.training.data import NamedBatches, open_batches
from tessera.training.home import Home
from tessera.training.joining import HostLink, Pace, Taken, take_seat
from tessera.training.manifest import Manifest
from tessera.training.proposal import Proposal, propose
from tessera.training.protocols import RUN
from tessera.training.roster import ROSTER_LIMIT, Roster, recall_run, remember_run

__all__ = ["Seated", "Seating", "WorkerConfig"]

log = structlog.get_logger()

FETCH_S = 300.0
ADMISSION_S = 1800.0  # how long a joiner asks the workers to let him in
ASK_S = 0.5  # between two looks at the roster


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
    folder: Path  # of this run
    transport: Transport
    chain: RpcChain
    trainer: StageTrainer
    checkpoints: Checkpoints
    batches: NamedBatches
    blobs: BlobStore

    def moved(self, record: PeerRecord) -> None:
        """A member said where it is now."""
        self.roster = self.roster.with_records([record])


class Seating:
    """One worker's way to its seat.

    Args:
        pace: what this machine can do, if it was measured.
        link: to the other processes of this worker, when several devices share the stage.
    """

    def __init__(
        self, home: Home, host: HostLink, config: WorkerConfig, *, pace: Pace | None, link: RankLink | None
    ) -> None:
        self._home, self._host, self._config = home, host, config
        self._transport, self._pace, self._link = host.transport, pace, link
        self._seated: Seated | None = None

    async def sit_down(self) -> Seated:
        """Take the seat, fetch and check what the manifest names, and have the workers let us in if the run has begun.

        Raises: what the host says; Misbehaviour for anything that is not as the manifest and the chain have it.
        """
        taken = await self._host.patiently(lambda: take_seat(self._host, self._home, self._pace))
        manifest, stage = taken.manifest, taken.seat.stage
        folder = self._home.run_folder(manifest.run_id)
        log.info("seated", run_id=manifest.run_id, stage=stage, admitted=taken.admitted)
        roster = await self._wait_for_roster(manifest)
        _check_remembered(folder, roster)
        chain = self._host.chain()
        await self._host.patiently(lambda: check_contracts(chain, manifest, roster))
        blobs = BlobStore(self._home.blobs, quota_bytes=self._home.blob_quota(self._config.quota_bytes))
        serve_blobs(self._transport, blobs)
        batches = await self._host.patiently(lambda: self._open_data(manifest, roster, blobs, folder))
        trainer = await to_thread.run_sync(self._build_trainer, manifest, stage)
        checkpoints = Checkpoints(folder / "checkpoints")
        if not taken.admitted:
            roster = await self._be_admitted(taken, chain)
        remember_run(folder, manifest, roster)
        self._seated = Seated(
            manifest, stage, roster, folder, self._transport, chain, trainer, checkpoints, batches, blobs
        )
        return self._seated

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
                log.info("waiting_for_workers", taken=taken, seats=manifest.model.stages * manifest.replicas)
                told = taken
            await anyio.sleep(ASK_S)  # the host holds the question for a while; one that does not is no busy loop

    async def _be_admitted(self, taken: Taken, chain: RpcChain) -> Roster:
        """Ask the workers until they let us in; the roster that names us."""
        deadline = anyio.current_time() + ADMISSION_S
        while (roster := await self._wait_for_roster(taken.manifest)).seat_of(self._transport.id) is None:
            proposal = Proposal(joiner=taken.seat)
            try:
                await propose(self._transport, chain, self._home.account_key, taken.manifest, roster, proposal)
            except (Conflict, Late, Unavailable) as error:
                log.info("admission_waits", code=error.code, reason=error.message)
                if anyio.current_time() > deadline:
                    raise Late(f"the workers did not let us in within {ADMISSION_S:.0f} s: {error.message}") from error
            await anyio.sleep(ASK_S)  # the host sees it on the chain when it is asked for the roster
        await check_contracts(chain, taken.manifest, roster)
        log.info("admitted", stage=taken.seat.stage, workers=len(roster.seats))
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
            averaging=manifest.averaging,
        )


def _check_remembered(folder: Path, roster: Roster) -> None:
    """Whoever worked for one contract must not be moved to another under the same run id."""
    try:
        _, before = recall_run(folder)
    except Missing:
        return
    if not roster.follows(before):
        raise Misbehaviour(
            f"the host now names contract {roster.run} and {len(roster.seats)} workers; "
            f"when this run was joined, they were {before.run} and others: do not follow it",
            evidence={"before": before.to_value(), "now": roster.to_value()},
        )
