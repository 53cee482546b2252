"""A whole run for tests: real stages, real chain, in-memory links, virtual time; workers that die and come back."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import numpy as np

from data_world import put_dataset
from tessera.chain.faces import Coin, ModelShare
from tessera.models.presets import tiny_spec
from tessera.p2p.blobs import BlobStore, serve_blobs
from tessera.p2p.memory import MemoryNetwork, VirtualClock
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.home import Home
from tessera.training.host import RunHost, WorkerReport
from tessera.training.invitation import Invitation
from tessera.training.manifest import DataRecipe, DataSet, Manifest, Schedule
from tessera.training.roster import Roster, Seat
from tessera.training.rpc_link import serve_rpc
from tessera.training.seating import Seated
from training_run import HOST_KEY, OPERATOR, Ledger, invitation_to, make_worker, seat_book
from training_world import DATA_OWNER, small_manifest

STAGES, STEPS = 4, 15
INCOME = 1_000_003


def write_data(folder: Path) -> Manifest:
    """A run over random text, whose blobs lie in `folder`."""
    rng = np.random.default_rng(0)
    train, validation = (rng.integers(0, 300, size).astype(np.uint16) for size in (4000, 400))
    blobs = BlobStore(folder / "blobs")
    tokenizer = blobs.put(b"any tokenizer")
    index = put_dataset(blobs, 300, tokenizer, [train], validation)
    return small_manifest().model_copy(
        update={
            "model": tiny_spec(STAGES),
            "data": DataRecipe(tokenizer=tokenizer, sets=(DataSet(index=index, weight=1, account=DATA_OWNER),)),
            "schedule": Schedule(
                steps=STEPS, microbatches=3, sequences=2, length=16, evaluate_every=5, evaluate_batches=2, epoch_steps=5
            ),
        }
    )


@dataclass
class Life:
    """One worker: its folder, and the process that works in it now."""

    run: WholeRun
    number: int
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    over: anyio.Event = field(default_factory=anyio.Event)
    seated: Seated | None = None

    @property
    def home(self) -> Home:
        return Home(self.run.folder / f"worker-{self.number}")

    async def live(self) -> None:
        self.scope, self.over = anyio.CancelScope(), anyio.Event()
        home = self.home
        with self.scope, home.locked():
            async with self.run.network.start(home.peer_key) as transport:
                invitation = Invitation.parse(self.run.invitation, self.run.clock)
                await make_worker(home, invitation, transport, self.run.clock, self.serve).run()
        self.over.set()

    async def serve(self, seated: Seated) -> None:
        self.seated = seated
        await anyio.sleep_forever()

    async def die(self) -> None:
        """Like SIGKILL: nobody is told."""
        self.run.network.kill(self.home.peer_key.id)
        self.scope.cancel()
        await self.over.wait()


class WholeRun:
    """Host, chain and four workers."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.manifest, self.folder = manifest, folder
        self.clock, self.ledger = VirtualClock(), Ledger(manifest)
        self.network = MemoryNetwork(random.Random(0), delay_s=0.05, clock=self.clock)
        self.workers = [Life(self, number) for number in range(STAGES)]
        self.reports: dict[int, WorkerReport] = {}  # of the worker who trains the stage
        self.validations: dict[int, float] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[anyio.abc.TaskGroup]:
        async with self.network.start(HOST_KEY) as transport, anyio.create_task_group() as tasks:
            self.coin = await self.ledger.coin()
            self.transport = transport
            self.host = self.new_host()
            serve_blobs(transport, BlobStore(self.folder / "blobs"))
            serve_rpc(transport, self.ledger.exchange)
            await self.host.open()
            self.invitation = invitation_to(self.manifest, transport.record()).to_text()
            for number, worker in enumerate(self.workers):
                tasks.start_soon(worker.live)
                while len(self.host.seats) <= number:
                    await anyio.sleep(0.1)
            self.roster = await self.host.seat_everyone()
            self.workers.sort(key=lambda life: self.roster.peers.index(life.home.peer_key.id))  # by stage
            yield tasks
            await self.host.close()

    def new_host(self) -> RunHost:
        """The host as it is after a start: all that it knows lies in its book."""
        return RunHost(
            self.manifest,
            transport=self.transport,
            chain=self.ledger.chain,
            coin=self.coin,
            operator=OPERATOR,
            book=seat_book(self.folder),
            on_report=self._on_report,
            pace=lambda: (0, 0.0),
            clock=self.clock,
        )

    async def at_step(self, step: int) -> None:
        with anyio.fail_after(600):
            while not all(s in self.reports and self.reports[s].step >= step for s in range(STAGES)):
                await anyio.sleep(0.01)

    async def settled(self) -> None:
        with anyio.fail_after(600):
            while not all(s in self.reports and self.reports[s].settled for s in range(STAGES)):
                await anyio.sleep(0.1)

    def _on_report(self, seat: Seat, report: WorkerReport) -> None:
        self.validations.update(report.validations)
        first = next(other for other in self.host.seats if other.stage == seat.stage)
        if seat.peer == first.peer:
            self.reports[seat.stage] = report


@dataclass
class Outcome:
    """What a run leaves behind, without what differs between two of them: keys."""

    params: list[bytes]
    receipts: set[tuple[int, int, str, int, bytes]]
    shares: list[int]
    total: int
    validations: dict[int, float]


async def outcome(run: WholeRun, roster: Roster) -> Outcome:
    folders = [worker.home.run_folder(run.manifest.run_id) for worker in run.workers]
    share = ModelShare(run.ledger.chain, roster.share)
    receipts = set()
    for folder in folders:
        book = ReceiptBook(folder / "book.sqlite")
        for receipt in book.of_steps(run.manifest.run_id, range(STEPS)):
            receipt.check()
            stage = roster.peers.index(receipt.worker)
            receipts.add((receipt.step, stage, receipt.direction, len(receipt.microbatches), receipt.digest))
        book.close()
    return Outcome(
        [Checkpoints(folder / "checkpoints").load(STEPS) for folder in folders],
        receipts,
        [await share.balanceOf(account) for account in roster.accounts],
        await share.totalSupply(),
        run.validations,
    )


async def pay(run: WholeRun) -> None:
    """Income arrives; every worker claims its part by itself."""
    coin, share = Coin(run.ledger.chain, run.coin), ModelShare(run.ledger.chain, run.roster.share)
    await coin.mint(OPERATOR, run.roster.share, INCOME)
    await share.distribute(OPERATOR)
    await anyio.sleep(5)
    total = await share.totalSupply()
    for account in run.roster.accounts:
        assert await coin.balanceOf(account) == INCOME * await share.balanceOf(account) // total
        assert await share.claimable(account) == 0
