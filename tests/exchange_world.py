"""Replicas of one stage on a memory network in virtual time, with their exchanges."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from p2p_world import key
from tessera.core.errors import Invalid
from tessera.core.ids import PeerId, RunId
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, run_virtual
from tessera.p2p.transport import PeerRecord
from tessera.training.exchange import Collected, Exchange
from tessera.training.exchange_part import PartName

RUN = RunId("ab" * 32)
SIZE = 5 * 2**20 + 7  # bytes: two pieces and a bit
LIMIT = 8 * 2**20


def part(number: int, size: int = SIZE) -> bytes:
    """What replica `number` sends."""
    return bytes([number]) * size


def honest(data: bytes) -> None:
    """What a trainer would check."""
    if len(set(data[::4096])) != 1 or data[0] > 100:
        raise Invalid("a part holds numbers that are not finite")


class Replicas:
    """Replica n has the key of number n + 1; `exchanges[n]` is its end."""

    def __init__(self, network: MemoryNetwork, transports: list[MemoryTransport], **options: Any) -> None:
        self.network, self.transports = network, transports
        self.ids = [transport.id for transport in transports]
        self.members: dict[PeerId, PeerRecord] = {t.id: t.record() for t in transports}
        self.exchanges = [
            Exchange(t, key(n + 1), RUN, lambda: self.members, limit_bytes=LIMIT, **options)
            for n, t in enumerate(transports)
        ]
        for exchange in self.exchanges:
            exchange.serve()

    def name(self, number: int = 0, attempt: int = 0, kind: str = "gradient") -> PartName:
        return PartName(RUN, kind, number, attempt)

    async def collect(
        self, n: int, deadline_s: float = 30.0, name: PartName | None = None, **options: Any
    ) -> Collected:
        """What replica `n` gets of everybody's."""
        options = {"size_bytes": SIZE, "check": honest, **options}
        return await self.exchanges[n].collect(name or self.name(), self.ids, deadline_s, **options)

    async def all_collect(self, who: list[int], deadline_s: float = 30.0) -> dict[int, Collected]:
        found: dict[int, Collected] = {}

        async def one(n: int) -> None:
            found[n] = await self.collect(n, deadline_s)

        async with anyio.create_task_group() as tasks:
            for n in who:
                tasks.start_soon(one, n)
        return found


@asynccontextmanager
async def replicas(
    count: int, *, delay_s: float = 0.05, rate: float | None = 1e7, **options: Any
) -> AsyncIterator[Replicas]:
    network = MemoryNetwork(random.Random(7), delay_s=delay_s, rate_bytes_per_s=rate)
    async with AsyncExitStack() as stack:
        transports = [await stack.enter_async_context(network.start(key(n + 1))) for n in range(count)]
        yield Replicas(network, transports, **options)


def in_virtual_time(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """pytest runs the result; it takes the name of `test`."""

    def run() -> None:
        run_virtual(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run
