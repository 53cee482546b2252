"""A run's workers as far as snapshots see them: stages that train by hashing, checkpoints on disk, a memory network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, VirtualClock
from tessera.p2p.transport import PeerRecord
from tessera.training.checkpoints import Checkpoints
from tessera.training.protocols import SMALL, SNAPSHOT
from tessera.training.snapshot_code import Sealed, seal_snapshot
from tessera.training.snapshot_header import Moment
from tessera.training.snapshot_restore import Restored, restore
from tessera.training.snapshots import CHUNK_BYTES, SnapshotConfig, Snapshots, choose_holders, choose_maker, needed_of

RUN = RunId("ab" * 32)
SAVE_EVERY = 10
STATE_BYTES = 3_000
CONFIG = SnapshotConfig(every=20, quota_bytes=1 << 20, patience_s=120.0)


def state_of(stage: int, session: int, step: int, size: int = STATE_BYTES) -> bytes:
    """What `stage` has become after `step` steps. Incompressible, and another one in every session."""
    return random.Random(f"{stage} {session} {step}").randbytes(size)


@dataclass
class Node:
    """One worker."""

    stage: int
    key: PeerKey
    folder: Path
    transport: MemoryTransport
    checkpoints: Checkpoints
    snapshots: Snapshots = field(init=False)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    @property
    def record(self) -> PeerRecord:
        return self.transport.record()

    async def work(self) -> None:
        with self.scope:
            await self.snapshots.run()


@dataclass
class World:
    """`stages` × `replicas` workers. `moment` is how far the run is."""

    folder: Path
    network: MemoryNetwork
    stack: AsyncExitStack
    tasks: anyio.abc.TaskGroup
    config: SnapshotConfig
    stages: int
    nodes: list[Node] = field(default_factory=list)
    moment: Moment = field(default_factory=lambda: Moment(1, 0))
    size: int = STATE_BYTES

    async def add(self, stage: int, seed: int) -> Node:
        """A worker with an empty disk."""
        key = PeerKey(bytes([seed]) * 32)
        folder = self.folder / f"node-{seed}"
        transport = await self.stack.enter_async_context(self.network.start(key))
        node = Node(stage, key, folder, transport, Checkpoints(folder / "checkpoints", keep=2))
        node.snapshots = self.snapshots_of(node)
        self.nodes.append(node)
        node.snapshots.serve()
        self.tasks.start_soon(node.work)
        return node

    def snapshots_of(self, node: Node, config: SnapshotConfig | None = None) -> Snapshots:
        return Snapshots(
            config or self.config,
            run_id=RUN,
            stage=node.stage,
            stages=self.stages,
            key=node.key,
            transport=node.transport,
            folder=node.folder / "snapshots",
            checkpoints=node.checkpoints,
            checkpoint_every=SAVE_EVERY,
            members=lambda: self.nodes,
            maker_of=lambda stage, step: choose_maker(RUN, stage, self.nodes, step, self.config.every),
            admitted=self.admitted,
            reached=lambda: self.moment,
        )

    def admitted(self, peer: PeerId, stage: int) -> bool:
        return any(node.transport.id == peer and node.stage == stage for node in self.nodes)

    def at(self, stage: int) -> list[Node]:
        return [node for node in self.nodes if node.stage == stage]

    async def train(self, until: int, *, first: int | None = None) -> None:
        """Every worker saves what its stage has become, and offers it; then everybody has time."""
        start = self.moment.step + SAVE_EVERY if first is None else first
        for step in range(start, until + 1, SAVE_EVERY):
            self.moment = Moment(self.moment.session, step)
            for node in self.nodes:
                node.checkpoints.save(step, state_of(node.stage, self.moment.session, step, self.size))
            for node in self.nodes:
                node.snapshots.offer(self.moment)
            await anyio.sleep(10)

    def go_back(self, step: int, *, told: bool = True) -> None:
        """The run loads `step` everywhere, and goes on in a new session."""
        self.moment = Moment(self.moment.session + 1, step)
        for node in self.nodes:
            node.checkpoints.drop_after(step)
            if told:
                node.snapshots.went_back(self.moment)

    async def lose(self, node: Node) -> None:
        """The machine is gone, with its disk."""
        self.nodes.remove(node)
        node.scope.cancel()
        self.network.kill(node.transport.id)
        await anyio.sleep(5)

    def sealed(self, maker: Node, moment: Moment, **changed: Any) -> Sealed:
        """A snapshot as `maker` makes it."""
        holders = [r.id for r in choose_holders(RUN, maker.stage, self.nodes, self.config.holders)]
        given: dict[str, Any] = {"run_id": RUN, "stage": maker.stage, "moment": moment, "holders": holders}
        given |= {"needed": needed_of(len(holders)), "key": maker.key, "secret": sha256(repr(moment).encode())}
        state = changed.pop("state", state_of(maker.stage, moment.session, moment.step))
        return seal_snapshot(state, **{**given, **changed})

    async def restore(self, by: Node, stage: int, step: int | None = None, **changed: Any) -> Restored:
        holders = [node.record for node in self.nodes if node.stage != stage]
        given: dict[str, Any] = {"made_by": lambda peer, stage: True, "size_limit": 1 << 20}
        return await restore(by.transport, holders, RUN, stage, step, **{**given, **changed})


async def ask(
    sender: MemoryTransport, receiver: Node, body: bytes = b"", **request: Any
) -> tuple[dict[str, Any], bytes]:
    limit = CHUNK_BYTES + SMALL
    return await call(sender, receiver.record, SNAPSHOT, request, body, timeout_s=30, reply_limit=limit)


async def put(maker: Node, sealed: Sealed, holder: Node, fragment: bytes | None = None) -> dict[str, Any]:
    """Bring `holder` his piece, or `fragment` in its place."""
    number = sealed.header.number_of(holder.transport.id)
    await ask(maker.transport, holder, op="put", header=sealed.header.to_value(), share=sealed.shares[number])
    body = sealed.fragments[number] if fragment is None else fragment
    reply, _ = await ask(maker.transport, holder, body, op="chunk", snapshot=sealed.header.digest, offset=0)
    return reply


async def put_all(maker: Node, sealed: Sealed, holders: Sequence[Node]) -> None:
    for holder in holders:
        assert (await put(maker, sealed, holder))["whole"]


@asynccontextmanager
async def world(
    folder: Path,
    *,
    stages: int = 4,
    replicas: int = 1,
    config: SnapshotConfig = CONFIG,
    rate_bytes_per_s: float | None = None,
) -> AsyncIterator[World]:
    network = MemoryNetwork(random.Random(3), delay_s=0.01, rate_bytes_per_s=rate_bytes_per_s, clock=VirtualClock())
    async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
        made = World(folder, network, stack, tasks, config, stages)
        for number in range(stages * replicas):
            await made.add(number % stages, number + 1)
        yield made
        tasks.cancel_scope.cancel()
