"""A run of many strangers over days of virtual time: they come and go, links are bad, some are hostile.

`ROWS` pipelines of five stages train in rounds. In each round neighbours send each other real amounts of bytes, sign
receipts for what came, and flood them; each day is an epoch, and some time after its end every honest member that is up
computes the leaves alone. The world knows more than its members: every receipt that was ever published, and who had it.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from flood_attackers import ATTACKS
from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, TesseraError
from tessera.core.hashing import sha256
from tessera.core.ids import Account, PeerId, RunId, account_from_bytes
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.flood import Flood, FloodConfig
from tessera.p2p.flood_item import Item, MemoryItemStore
from tessera.p2p.flood_peers import PeerLimits
from tessera.p2p.flood_state import StateLimits
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, VirtualClock
from tessera.p2p.transport import PeerRecord
from tessera.training.epochs import EpochLeaves, compute_epoch
from tessera.training.receipts import Credit, Direction, Receipt, credited
from training_world import small_manifest

DAY_S, HOUR_S, MINUTE_S = 86_400.0, 3_600.0, 60.0
STAGES = 5
WORK = "work/1"
CODES_BYTES = 150_000  # one way, in one round
GRACE_S = 2 * HOUR_S  # from the end of an epoch to its settlement
SETTLED_S = 30 * MINUTE_S  # who has been up for so long has caught up

CONFIG = FloodConfig(
    ttl_s=2 * DAY_S,
    sync_s=HOUR_S,
    gather_s=15.0,
    members=64,
    state=StateLimits(origin_items=64, origin_bytes=128 * 1024, max_ttl_s=3 * DAY_S, seen=2048),
    peers=PeerLimits(calls=100.0, calls_per_s=2.0, news_bytes=128 * 1024.0, news_bytes_per_s=10.0),
)


@dataclass
class Node:
    """One member's machine: what survives a crash, and the process that runs now, if any."""

    number: int
    key: PeerKey
    account: Account
    hostile: bool
    store: MemoryItemStore = field(default_factory=MemoryItemStore)
    records: dict[PeerId, PeerRecord] = field(default_factory=dict)  # on its disk: where it last saw the others
    transport: MemoryTransport | None = None
    flood: Flood | None = None
    up_since: float = 0.0

    @property
    def id(self) -> PeerId:
        return self.key.id

    @property
    def up(self) -> bool:
        return self.transport is not None and self.transport.alive


@dataclass
class Tally:
    """What happened."""

    rounds: int = 0
    starts: int = 0
    crashes: int = 0
    partitions: int = 0
    steps_lost: int = 0  # a row's round that could not be worked, somebody being away
    bulk_bytes: int = 0
    epochs: int = 0
    leaves_computed: int = 0
    microbatches: int = 0  # that were paid for
    items_peak: int = 0
    bytes_peak: int = 0
    queue_peak: int = 0
    tasks_peak: int = 0
    late: int = 0  # receipts that only a machine that was off held when their epoch was settled
    voided: int = 0
    barred: int = 0
    framed: list[str] = field(default_factory=list)  # honest members that somebody took for liars
    proofs: dict[PeerId, int] = field(default_factory=dict)


class Week:
    """`await Week(seed, …).run()`, under `run_virtual`."""

    def __init__(self, seed: int, *, rows: int = 10, days: int = 7, rounds: int = 4, hostile: int = 3) -> None:
        self.rng = random.Random(seed)
        self.days, self.rounds, self.tally = days, rounds, Tally()
        plain = small_manifest(STAGES, steps=days * rounds, epoch_steps=rounds)
        schedule = plain.schedule.model_copy(update={"microbatches": rows})  # a row does one of a step
        self.manifest = plain.model_copy(update={"schedule": schedule})
        self.network = MemoryNetwork(random.Random(seed + 1), clock=VirtualClock())
        bad = {row * STAGES + self.rng.randrange(STAGES) for row in self.rng.sample(range(rows), hostile)}
        self.nodes = [self._node(number, number in bad) for number in range(rows * STAGES)]
        self.by_id = {node.id: node for node in self.nodes}
        self.published: dict[bytes, Node] = {}  # receipt items of honest members, by id
        self.items: dict[bytes, Item] = {}
        self.halves: set[PeerId] | None = None
        self._shape_links()

    def _node(self, number: int, hostile: bool) -> Node:
        seed = sha256(b"week", number.to_bytes(2, "big"))
        return Node(number, PeerKey(seed), account_from_bytes(seed[:20]), hostile)

    def _shape_links(self) -> None:
        for node in self.nodes:
            self.network.uplink(node.id, self.rng.uniform(20e6, 200e6) / 8)
        for a in self.nodes:
            for b in self.nodes[: a.number]:
                delay_s, loss = self.rng.uniform(0.005, 0.08), self.rng.choice((0.0, 0.005, 0.02))
                self.network.shape(a.id, b.id, delay_s=delay_s, loss=loss)

    # --- the course of things ---------------------------------------------------------------------------------------

    async def run(self) -> Tally:
        async with anyio.create_task_group() as tasks:
            for node in self.nodes:
                await tasks.start(self._live, node)
            for node in self.nodes:  # how they first met: an invitation, say
                node.records.update((other.id, _record(other)) for other in self.nodes)
            tasks.start_soon(self._partition)
            for day in range(self.days):
                await self._day(day, tasks)
            for node in self.nodes:
                self._collect(node)
            tasks.cancel_scope.cancel()
        return self.tally

    async def _day(self, day: int, tasks: anyio.abc.TaskGroup) -> None:
        for number in range(self.rounds):
            at = day * DAY_S + GRACE_S + number * (DAY_S - 2 * GRACE_S) / (self.rounds - 1)
            await anyio.sleep_until(at)
            for row in range(len(self.nodes) // STAGES):
                tasks.start_soon(self._round, self.nodes[row * STAGES : (row + 1) * STAGES], day * self.rounds + number)
            self.tally.rounds += 1
            await anyio.sleep(10 * MINUTE_S)
            self._measure()
        await anyio.sleep_until((day + 1) * DAY_S)
        self._settle(day)

    async def _live(self, node: Node, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """On for hours, off for minutes, for ever; by its own will or not."""
        await self._session(node, task_status)
        while True:
            await anyio.sleep(self.rng.uniform(2, 90) * MINUTE_S)
            await self._session(node, None)

    async def _session(self, node: Node, task_status: anyio.abc.TaskStatus[None] | None) -> None:
        self.tally.starts += 1
        async with self.network.start(node.key) as transport:
            node.transport, node.up_since = transport, anyio.current_time()
            node.records[node.id] = transport.record()
            if task_status is not None:
                task_status.started()
                await anyio.sleep(1)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._attacker if node.hostile else self._member, node, transport)
                await anyio.sleep(max(HOUR_S, self.rng.expovariate(1 / (36 * HOUR_S))))
                if self.rng.random() < 0.5:
                    self.tally.crashes += 1
                    self.network.kill(node.id)
                tasks.cancel_scope.cancel()
        self._collect(node)
        node.transport = node.flood = None

    async def _member(self, node: Node, transport: MemoryTransport) -> None:
        flood = node.flood = self._flood(node, transport)
        flood.subscribe("seats", functools.partial(_take_seat, node))
        serve_calls(transport, WORK, _work, request_limit=CODES_BYTES + 1000)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flood.run)
            await anyio.lowlevel.checkpoint()
            flood.publish("seats", transport.record().to_text().encode(), "seat")
            await anyio.sleep_forever()

    async def _attacker(self, node: Node, transport: MemoryTransport) -> None:
        for other in self.nodes:  # who works with it heard of its new address in another way
            if other.records:
                other.records[node.id] = _record(node)
        serve_calls(transport, WORK, _work, request_limit=CODES_BYTES + 1000)
        attack = ATTACKS[[other for other in self.nodes if other.hostile].index(node) % len(ATTACKS)]
        await attack(self.network, transport, node.key, self.group, node.records, self.rng)

    def _flood(self, node: Node, transport: MemoryTransport) -> Flood:
        def members() -> list[PeerRecord]:
            return list(node.records.values())

        return Flood(
            transport, self.group, members, node.key, VirtualClock(), random.Random(node.number), CONFIG,
            store=node.store, on_misbehaviour=self._accuse,
        )  # fmt: skip

    @property
    def group(self) -> RunId:
        return self.manifest.run_id

    async def _partition(self) -> None:
        """Once a day the network falls into two for some hours."""
        for day in range(self.days):
            await anyio.sleep_until(day * DAY_S + self.rng.uniform(3, 12) * HOUR_S)
            ids = [node.id for node in self.nodes]
            cut = set(self.rng.sample(ids, self.rng.randrange(2, len(ids) // 2)))
            pairs = [(a, b) for a in sorted(cut) for b in ids if b not in cut]
            for a, b in pairs:
                self.network.partition(a, b)
            self.tally.partitions += 1
            await anyio.sleep(self.rng.uniform(0.01, 4) * HOUR_S)
            for a, b in pairs:
                self.network.heal(a, b)

    # --- work -------------------------------------------------------------------------------------------------------

    async def _round(self, row: list[Node], step: int) -> None:
        await anyio.sleep(self.rng.uniform(0, 20))
        if not all(node.up for node in row):
            self.tally.steps_lost += 1
            return
        mine: dict[PeerId, list[Receipt]] = {node.id: [] for node in row}
        try:
            for upper, lower in itertools.pairwise(row):
                mine[lower.id].append(await self._work_pair(upper, lower, "forward", step))
                mine[upper.id].append(await self._work_pair(lower, upper, "backward", step))
        except TesseraError:
            self.tally.steps_lost += 1  # somebody died on us; what was signed before stands
        for node in row:
            if node.up and node.flood is not None and mine[node.id]:
                payload = encoding.encode([receipt.to_row() for receipt in mine[node.id]])
                item = node.flood.publish("receipts", payload)
                self.published[item.id], self.items[item.id] = node, item

    async def _work_pair(self, worker: Node, signer: Node, direction: Direction, step: int) -> Receipt:
        if worker.transport is None or signer.transport is None:
            raise Invalid("one of them has left")
        codes = self.rng.randbytes(CODES_BYTES)
        record = worker.records.get(signer.id) or _record(signer)
        reply, _ = await call(worker.transport, record, WORK, {}, codes, timeout_s=60, reply_limit=1000, bulk=True)
        self.tally.bulk_bytes += len(codes)
        digest = bytes.fromhex(reply["digest"])
        done = (worker.number // STAGES,)
        return Receipt(self.group, step, worker.id, signer.id, direction, done, digest).signed_by(signer.key)

    # --- the world's own books --------------------------------------------------------------------------------------

    def _settle(self, day: int) -> None:
        """Everybody who has been up for a while computes the same; nothing that any of them holds is left out."""
        now = anyio.current_time()
        ready = [n for n in self.nodes if not n.hostile and n.up and n.flood and now - n.up_since > SETTLED_S]
        assert len(ready) > len(self.nodes) / 2
        steps = self.manifest.schedule.epoch_range(day)
        known = {node.number: self._known(node) for node in ready}
        everything = known[ready[0].number]
        self._count_late(everything)
        roots = set()
        for node in ready:
            assert known[node.number] == everything, f"{node.number} and {ready[0].number} hold different receipts"
            leaves = self._leaves(node, day, steps)
            roots.add(None if leaves is None else leaves.root)
            self.tally.leaves_computed += 1
        assert len(roots) == 1
        self.tally.epochs += 1
        self._check_shares(day, steps, everything, self._leaves(ready[0], day, steps))

    def _known(self, node: Node) -> frozenset[bytes]:
        """The honest receipts that `node` holds. A flooder's own items may differ from member to member for a time."""
        assert node.flood is not None
        return frozenset(item.id for item in node.flood.items("receipts") if item.id in self.published)

    def _count_late(self, everything: frozenset[bytes]) -> None:
        """Whatever is not known is on a machine that was off until now, and nowhere else."""
        now = anyio.current_time()
        for id, origin in self.published.items():
            if id not in everything and self.items[id].expires > VirtualClock().time():
                assert not origin.up or now - origin.up_since < SETTLED_S, f"the receipts of {origin.number} are lost"
                assert self.items[id] in origin.store.load(), f"{origin.number} has lost what it said"
                self.tally.late += 1

    def _leaves(self, node: Node, day: int, steps: range) -> EpochLeaves | None:
        """What this member computes from what it holds, and nothing else."""
        assert node.flood is not None
        receipts = [receipt for item in node.flood.items("receipts") for receipt in _receipts(self.group, item)]
        return self._compute(day, receipts, steps)

    def _compute(self, day: int, receipts: list[Receipt], steps: range) -> EpochLeaves | None:
        credit = self._credit(receipts, steps)
        work = [(node.account, node.number % STAGES, len(credit.get(node.id, ()))) for node in self.nodes]
        return compute_epoch(self.manifest, day, work)

    def _credit(self, receipts: list[Receipt], steps: range) -> Credit:
        stage_of = {node.id: node.number % STAGES for node in self.nodes}
        return credited(receipts, stage_of, STAGES, steps, self.manifest.schedule.microbatches)

    def _check_shares(self, day: int, steps: range, known: frozenset[bytes], leaves: EpochLeaves | None) -> None:
        """From the world's own list, without any flood: who must have been paid what, to the last unit."""
        signed = [receipt for id in known for receipt in _receipts(self.group, self.items[id])]
        assert leaves == self._compute(day, signed, steps)
        self.tally.microbatches += sum(map(len, self._credit(signed, steps).values()))

    def _accuse(self, fault: Misbehaviour) -> None:
        guilty = self.by_id[PeerId(str(fault.fields["peer"]))]
        if not guilty.hostile:
            self.tally.framed.append(f"{guilty.number}: {fault.message}")
        self.tally.proofs[guilty.id] = self.tally.proofs.get(guilty.id, 0) + 1

    def _collect(self, node: Node) -> None:
        if node.flood is not None:
            counts = node.flood.counts()
            self.tally.voided += counts.voided
            self.tally.barred += counts.barred

    def _measure(self) -> None:
        tally = self.tally
        for node in self.nodes:
            if node.flood is not None:
                counts = node.flood.counts()
                tally.items_peak = max(tally.items_peak, counts.items, len(node.store))
                tally.bytes_peak = max(tally.bytes_peak, counts.size_bytes)
                tally.queue_peak = max(tally.queue_peak, counts.wanted, counts.to_offer)
        tally.tasks_peak = max(tally.tasks_peak, len(asyncio.all_tasks()))


def _record(node: Node) -> PeerRecord:
    return node.records[node.id]


async def _work(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    return {"digest": sha256(body).hex()}, b""


def _take_seat(node: Node, item: Item) -> None:
    """A member's new address, in its own words."""
    record = PeerRecord.from_text(item.payload.decode())
    if record.id == item.origin and item.origin in node.records:
        node.records[record.id] = record


@functools.lru_cache(100_000)
def _parse_receipts(group: RunId, payload: bytes) -> tuple[Receipt, ...]:
    try:
        rows = json.loads(payload)
        receipts = tuple(Receipt.from_row(group, row) for row in rows)
        for receipt in receipts:
            receipt.check()
    except (TesseraError, ValueError, TypeError):
        return ()
    return receipts


def _receipts(group: RunId, item: Item) -> tuple[Receipt, ...]:
    """What counts in an item: receipts that its origin signed itself, and whose signatures are right."""
    return tuple(receipt for receipt in _parse_receipts(group, item.payload) if receipt.signer == item.origin)
