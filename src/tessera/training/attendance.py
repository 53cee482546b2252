"""Which of a run's workers answer: each asks all others now and then, and believes nobody else about it."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import structlog

from tessera.core.errors import TesseraError
from tessera.core.ids import PeerId
from tessera.p2p.calls import call
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.protocols import CALL_S, MEMBERSHIP, SMALL

__all__ = ["Attendance"]

log = structlog.get_logger()

ASK_S = 30.0


class Attendance:
    """When each worker last answered, by this process's own clock. Memory: a number for each worker.

    Args:
        workers: the present ones; ourselves may be among them.
    """

    def __init__(self, transport: Transport, workers: Callable[[], list[PeerRecord]]) -> None:
        self._transport, self._workers = transport, workers
        self._heard: dict[PeerId, float] = {}

    def absent_s(self, peer: PeerId) -> float:
        """Since its last answer; since we began to ask, if it never gave one; 0 for who is not asked yet."""
        return anyio.current_time() - self._heard.get(peer, anyio.current_time())

    async def run(self) -> None:
        """Ask until cancelled. Cost: a small call for each worker in 30 s."""
        while True:
            workers = [record for record in self._workers() if record.id != self._transport.id]
            for gone in self._heard.keys() - {record.id for record in workers}:
                del self._heard[gone]
            async with anyio.create_task_group() as tasks:
                for record in workers:
                    self._heard.setdefault(record.id, anyio.current_time())
                    tasks.start_soon(self._ask, record)
            await anyio.sleep(ASK_S)

    async def _ask(self, record: PeerRecord) -> None:
        try:
            await call(self._transport, record, MEMBERSHIP, {"op": "here"}, timeout_s=CALL_S, reply_limit=SMALL)
        except TesseraError as error:
            log.debug("worker_silent", peer_id=record.id, code=error.code, reason=error.message)
            return
        self._heard[record.id] = anyio.current_time()
