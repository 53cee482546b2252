"""Pipelines of any number of workers per stage, with trainers that compute nothing, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from tessera.core.clock import Clock
from tessera.core.errors import Late
from tessera.core.ids import PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, VirtualClock
from tessera.p2p.pacer import Pacer
from tessera.training.book import ReceiptBook
from tessera.training.checkpoints import Checkpoints
from tessera.training.copies import NoCopies, StageCopies
from tessera.training.gate import AlwaysOpen
from tessera.training.manifest import Manifest
from tessera.training.pipeline import Gate, Pipeline
from tessera.training.receipts import Receipt, credited
from tessera.training.roster import Roster, Seat, seat_binding
from tessera.training.work import Batches, NoRecords
from training_world import FakeBatches, FakeTrainer, Told


class Board:
    """What workers show each other, as long as they live: one for a whole world."""

    def __init__(self) -> None:
        self.parts: dict[tuple[tuple[int, ...], PeerId], bytes] = {}

    def of(self, peer: PeerId) -> BoardSums:
        return BoardSums(self, peer)


@dataclass
class BoardSums:
    """`StageSums` without a network."""

    board: Board
    me: PeerId

    async def offer(self, term: int, step: int, attempt: int, part: bytes) -> None:
        self.board.parts[(term, step, attempt), self.me] = part

    async def collect(
        self, term: int, step: int, attempt: int, owners: Sequence[PeerId], patience_s: float
    ) -> list[bytes]:
        with anyio.move_on_after(patience_s):
            return [await self._wait((term, step, attempt), owner) for owner in owners]
        raise Late(f"sums of step {step} are missing")

    async def offer_round(self, round_: int, part: bytes) -> None:
        self.board.parts[(round_,), self.me] = part

    async def collect_round(self, round_: int, owners: Sequence[PeerId], patience_s: float) -> list[bytes]:
        found: list[bytes] = []
        with anyio.move_on_after(patience_s):
            for owner in owners:
                found.append(await self._wait((round_,), owner))
        return found

    async def _wait(self, name: tuple[int, ...], owner: PeerId) -> bytes:
        while (name, owner) not in self.board.parts:
            await anyio.sleep(0.05)
        return self.board.parts[name, owner]


@dataclass
class Node:
    """One worker. `run` is one life of its process; a second life starts from the same folder."""

    world: CrewWorld
    number: int
    stage: int
    lives: int = 0
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    up: anyio.Event = field(default_factory=anyio.Event)
    transport: MemoryTransport = field(init=False)
    pipeline: Pipeline = field(init=False)
    trainer: Any = field(init=False)
    told: Told = field(default_factory=Told)
    book: ReceiptBook = field(init=False)
    gate: Gate = field(default_factory=AlwaysOpen)
    slowness: float = 1.0

    @property
    def key(self) -> PeerKey:
        return PeerKey(bytes([self.number + 1]) * 32)

    @property
    def account(self) -> AccountKey:
        return AccountKey(bytes([self.number + 1]) * 32)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.world.folder / f"worker-{self.number}")

    async def run(self) -> None:
        self.lives += 1
        world = self.world
        self.book = ReceiptBook(world.folder / f"book-{self.number}.sqlite")
        self.trainer = world.make_trainer(self)
        self.scope = anyio.CancelScope()
        try:
            with self.scope:
                async with world.network.start(self.key, pacer=world.make_pacer()) as self.transport:
                    world.sit_down(self)
                    self.pipeline = Pipeline(
                        world.manifest,
                        stage=self.stage,
                        key=self.key,
                        transport=self.transport,
                        trainer=self.trainer,
                        batches=world.make_batches(),
                        book=self.book,
                        checkpoints=self.checkpoints,
                        sums=world.board.of(self.key.id),
                        roster=world.roster,
                        refresh=anyio.lowlevel.checkpoint,
                        watcher=self.told,
                        gate=self.gate,
                        clock=world.clock,
                        records=NoRecords(),
                        copies=world.make_copies(self),
                        compute=self.compute,
                    )
                    self.up.set()
                    await self.pipeline.run()
        finally:
            self.book.close()

    async def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call of the trainer, or of the disk, in virtual time."""
        name = getattr(function, "__name__", "")
        await anyio.sleep(self.world.cost_s(self, name, arguments) * self.slowness)
        return function(*arguments)

    def kill(self) -> None:
        """Like SIGKILL: nobody is told."""
        self.world.network.kill(self.key.id)
        self.scope.cancel()


class CrewWorld:
    """Workers who train. Everybody always knows everybody's newest address.

    Args:
        replicas: workers of each stage.
        compute_s: virtual seconds of each call of a trainer, by its name.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        replicas: int = 1,
        *,
        clock: Clock | None = None,
        delay_s: float = 0.005,
        rate_bytes_per_s: float | None = None,
        compute_s: dict[str, float] | None = None,
    ) -> None:
        self.compute_s = compute_s or {}
        self.manifest, self.folder = manifest, folder
        self.clock = clock or VirtualClock()
        self.network = MemoryNetwork(
            random.Random(0), delay_s=delay_s, rate_bytes_per_s=rate_bytes_per_s, clock=VirtualClock()
        )
        stages = manifest.model.stages
        self.nodes = [Node(self, number, number % stages) for number in range(stages * replicas)]
        self.board = Board()
        self._seats: dict[int, Seat] = {}

    def cost_s(self, node: Node, name: str, arguments: tuple[Any, ...]) -> float:
        """Virtual seconds of a call."""
        return self.compute_s.get(name, 0.0)

    def make_trainer(self, node: Node) -> Any:
        return FakeTrainer(self.manifest, node.stage)

    def make_copies(self, node: Node) -> StageCopies:
        return NoCopies()

    def make_pacer(self) -> Pacer | None:
        return None

    def make_batches(self) -> Batches:
        return FakeBatches()

    def of_stage(self, stage: int) -> list[Node]:
        return [node for node in self.nodes if node.stage == stage]

    def add(self, stage: int) -> Node:
        """One more worker, not started."""
        self.nodes.append(Node(self, len(self.nodes), stage))
        return self.nodes[-1]

    def sit_down(self, node: Node) -> None:
        binding = seat_binding(self.manifest.run_id, node.key.id, node.stage, node.account)
        self._seats[node.number] = Seat(node.stage, node.transport.record(), node.account.account, binding)

    def roster(self) -> Roster:
        seats = sorted(self._seats.items(), key=lambda item: (item[1].stage, item[0]))
        share = self.nodes[0].account.account
        return Roster(self.manifest.run_id, self.manifest.model.stages, tuple(s for _, s in seats), share, share, share)

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[anyio.abc.TaskGroup]:
        """All nodes run."""
        async with anyio.create_task_group() as tasks:
            for node in reversed(self.nodes):
                await self.start(tasks, node)
            yield tasks
            tasks.cancel_scope.cancel()

    async def start(self, tasks: anyio.abc.TaskGroup, node: Node) -> None:
        node.up = anyio.Event()
        tasks.start_soon(node.run)
        await node.up.wait()

    async def trained(self, within_s: float = 600) -> None:
        with anyio.fail_after(within_s):
            while not all(node.pipeline.trained.is_set() for node in self.nodes if not node.scope.cancel_called):
                await anyio.sleep(0.1)

    async def at_step(self, step: int, within_s: float = 600) -> None:
        with anyio.fail_after(within_s):
            while max(node.pipeline.steps_done for node in self.nodes) < step:
                await anyio.sleep(0.01)

    def params(self, stage: int) -> list[bytes]:
        """Of every living worker of a stage."""
        return [node.trainer.params for node in self.of_stage(stage) if not node.scope.cancel_called]

    def receipts(self, steps: range) -> list[Receipt]:
        """All that anybody holds."""
        held: dict[tuple[int, str, str, str], Receipt] = {}
        for node in self.nodes:
            book = ReceiptBook(self.folder / f"book-{node.number}.sqlite")
            for receipt in book.of_steps(self.manifest.run_id, steps):
                held[receipt.step, receipt.worker, receipt.signer, receipt.direction] = receipt
            book.close()
        return list(held.values())

    def credit_of(self, stage: int, steps: range) -> int:
        """Microbatches that workers of a stage are paid for, all together."""
        schedule = self.manifest.schedule
        stage_of = {node.key.id: node.stage for node in self.nodes}
        credit = credited(self.receipts(steps), stage_of, self.manifest.model.stages, steps, schedule.microbatches)
        return sum(len(work) for peer, work in credit.items() if stage_of[peer] == stage)
