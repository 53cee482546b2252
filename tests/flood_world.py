"""What the tests of flooding share: members on one memory network, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from p2p_world import key
from tessera.core.errors import Misbehaviour
from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.p2p.flood import Flood, FloodConfig
from tessera.p2p.flood_item import MemoryItemStore
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, VirtualClock
from tessera.p2p.transport import PeerRecord

GROUP = "a run"


@dataclass
class FloodWorld:
    """`records` is what all of them take for the list of members."""

    network: MemoryNetwork = field(
        default_factory=lambda: MemoryNetwork(random.Random(3), delay_s=0.02, clock=VirtualClock())
    )
    records: dict[PeerId, PeerRecord] = field(default_factory=dict)
    stores: dict[PeerId, MemoryItemStore] = field(default_factory=dict)
    faults: list[Misbehaviour] = field(default_factory=list)
    config: FloodConfig = field(default_factory=FloodConfig)

    @asynccontextmanager
    async def member(self, number: int, config: FloodConfig | None = None) -> AsyncIterator[Flood]:
        """An honest member with the key of this number, until the body ends."""
        async with self.network.start(key(number)) as transport:
            self.records[transport.id] = transport.record()
            flood = self.flood(transport, key(number), config)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(flood.run)
                yield flood
                tasks.cancel_scope.cancel()

    def flood(self, transport: MemoryTransport, own: PeerKey, config: FloodConfig | None = None) -> Flood:
        return Flood(
            transport, GROUP, lambda: list(self.records.values()), own, VirtualClock(), random.Random(own.seed),
            config or self.config, store=self.stores.setdefault(own.id, MemoryItemStore()),
            on_misbehaviour=self.faults.append,
        )  # fmt: skip

    def guilty(self) -> set[object]:
        """Who was accused so far."""
        return {fault.fields["peer"] for fault in self.faults}


def payloads(flood: Flood, topic: str = "news") -> list[bytes]:
    return [item.payload for item in flood.items(topic)]
