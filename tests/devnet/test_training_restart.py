"""Whole workers: from an invitation to claimed income, with one of them killed in the middle and started again.

Real stages, real chain, in-memory links, virtual time. The killed worker comes back with nothing but its state
directory and its invitation; the run must end with the parameters, receipts and shares of an undisturbed one.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch

from tessera.chain.faces import Coin, ModelShare
from tessera.core.errors import Misbehaviour
from tessera.core.ids import RunId
from tessera.models.dataset import Dataset
from tessera.models.presets import tiny_spec
from tessera.p2p.blobs import BlobStore, serve_blobs
from tessera.p2p.memory import MemoryNetwork, VirtualClock, run_virtual
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.epochs import compute_epoch
from tessera.training.home import Home
from tessera.training.host import RunHost, WorkerReport
from tessera.training.invitation import Invitation
from tessera.training.manifest import DataRecipe, Manifest, Schedule
from tessera.training.roster import Roster
from tessera.training.rpc_link import serve_rpc
from tessera.training.worker import Seated
from training_run import HOST_KEY, OPERATOR, Ledger, invitation_to, make_worker, seat_book
from training_world import account_keys, small_manifest

STAGES, STEPS = 4, 15
INCOME = 1_000_003


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_data(folder: Path) -> Manifest:
    """A run over random text, whose blobs lie in `folder`."""
    rng = np.random.default_rng(0)
    train, validation = (rng.integers(0, 300, size).astype(np.uint16) for size in (4000, 400))
    blobs = BlobStore(folder / "blobs")
    dataset, tokenizer = blobs.put(Dataset(300, train, validation).to_bytes()), blobs.put(b"any tokenizer")
    return small_manifest().model_copy(
        update={
            "model": tiny_spec(STAGES),
            "data": DataRecipe(dataset=dataset, tokenizer=tokenizer),
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
        self.reports: dict[int, WorkerReport] = {}
        self.validations: dict[int, float] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[anyio.abc.TaskGroup]:
        async with self.network.start(HOST_KEY) as transport, anyio.create_task_group() as tasks:
            self.coin = await self.ledger.coin()
            self.host = RunHost(
                self.manifest,
                transport=transport,
                chain=self.ledger.chain,
                coin=self.coin,
                operator=OPERATOR,
                book=seat_book(self.folder),
                on_report=self._on_report,
                pace=lambda: (0, 0.0),
                clock=self.clock,
            )
            serve_blobs(transport, BlobStore(self.folder / "blobs"))
            serve_rpc(transport, self.ledger.exchange)
            self.host.serve()
            self.invitation = invitation_to(self.manifest, transport.record()).to_text()
            for number, worker in enumerate(self.workers):
                tasks.start_soon(worker.live)
                while len(self.host.seats) <= number:
                    await anyio.sleep(0.1)
            self.roster = await self.host.seat_everyone()
            yield tasks
            await self.host.close()

    async def at_step(self, step: int) -> None:
        with anyio.fail_after(600):
            while not all(s in self.reports and self.reports[s].step >= step for s in range(STAGES)):
                await anyio.sleep(0.01)

    async def settled(self) -> None:
        with anyio.fail_after(600):
            while not all(s in self.reports and self.reports[s].settled for s in range(STAGES)):
                await anyio.sleep(0.1)

    def _on_report(self, stage: int, report: WorkerReport) -> None:
        self.reports[stage] = report
        self.validations.update(report.validations)


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
            receipts.add((receipt.step, stage, receipt.direction, receipt.tokens, receipt.digest))
        book.close()
    return Outcome(
        [Checkpoints(folder / "checkpoints").load(STEPS) for folder in folders],
        receipts,
        [await share.balanceOf(account) for account in roster.accounts],
        await share.totalSupply(),
        run.validations,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("undisturbed")

    async def main() -> Outcome:
        run = WholeRun(write_data(folder), folder)
        async with run.open():
            await run.settled()
            await pay(run)
            return await outcome(run, run.roster)

    return run_virtual(main)


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


def test_an_undisturbed_run_pays_for_every_token(undisturbed: Outcome, tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    accounts = [key.account for key in account_keys(STAGES)]
    leaves = [compute_epoch(manifest, e, accounts, [5 * manifest.tokens_per_step] * STAGES) for e in range(3)]
    assert undisturbed.shares == [sum(e.shares_of(account) for e in leaves if e) for account in accounts]
    assert undisturbed.total == sum(e.total for e in leaves if e)
    assert len(undisturbed.receipts) == STEPS * 2 * (STAGES - 1)
    assert sorted(undisturbed.validations) == [0, 5, 10, 15]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_worker_killed_in_the_middle_comes_back_and_nothing_differs(
    stage: int, undisturbed: Outcome, tmp_path: Path
) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            victim = run.workers[stage]
            await run.at_step(12)
            await victim.die()
            await anyio.sleep(30)
            assert not any(report.trained for report in run.reports.values())
            tasks.start_soon(victim.live)
            await run.settled()
            await pay(run)
            assert await outcome(run, run.roster) == undisturbed
            assert run.reports[stage].sessions == 1  # of its second life

    run_virtual(main)


def test_whoever_serves_knows_where_a_restarted_worker_is(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open() as tasks:
            await run.settled()
            await run.workers[2].die()
            before = run.host.roster().records
            tasks.start_soon(run.workers[2].live)
            await anyio.sleep(20)
            assert run.host.roster().records[2] != before[2]
            for worker in run.workers:
                assert worker.seated is not None
                assert worker.seated.roster.records == run.host.roster().records

    run_virtual(main)


def test_a_host_that_names_another_contract_is_not_followed(tmp_path: Path) -> None:
    async def main() -> None:
        run = WholeRun(write_data(tmp_path), tmp_path)
        async with run.open():
            await run.at_step(1)
            victim = run.workers[1]
            await victim.die()
            accounts = run.roster.accounts
            run.host._share = await run.ledger.share(run.coin, accounts)
            with pytest.raises(Misbehaviour, match="do not follow it"):
                await victim.live()

    run_virtual(main)


def test_the_run_is_the_same_for_everybody_who_has_the_same_text(tmp_path: Path) -> None:
    first, second = write_data(tmp_path / "a"), write_data(tmp_path / "b")
    assert first.run_id == second.run_id != RunId("0" * 64)
