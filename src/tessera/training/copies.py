"""What is kept of a stage with owners of other stages, as a pipeline sees it: offered, left behind, brought back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import structlog
from anyio import to_thread

from tessera.core.errors import Missing
from tessera.core.ids import PeerId
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.checkpoints import Checkpoints
from tessera.training.roster import Roster
from tessera.training.snapshot_header import Moment
from tessera.training.snapshot_restore import find_snapshots, restore
from tessera.training.snapshots import Snapshots

__all__ = ["NoCopies", "StageCopies", "StageSnapshots"]

log = structlog.get_logger()


class StageCopies(Protocol):
    """The copies of one stage."""

    def offer(self, past: int, step: int) -> None:
        """The checkpoint of `step` is saved."""
        ...

    def went_back(self, past: int, step: int) -> None:
        """The run goes on from the checkpoint of `step`; what was ahead of it is void."""
        ...

    async def restore(self) -> bool:
        """Bring checkpoints of a stage that nobody here has. False when there has never been a copy of it.

        Raises: Missing: there are copies, or may be, and too few pieces of them are here now.
        """
        ...


class NoCopies:
    """Nothing is kept: who is alone at his stage takes it along."""

    def offer(self, past: int, step: int) -> None:
        return

    def went_back(self, past: int, step: int) -> None:
        return

    async def restore(self) -> bool:
        return False


class StageSnapshots:
    """Snapshots with owners of other stages.

    Args:
        roster: the present one, as the chain has it.
        size_limit: bytes of a state, at most.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        transport: Transport,
        checkpoints: Checkpoints,
        *,
        stage: int,
        roster: Callable[[], Roster],
        size_limit: int,
    ) -> None:
        self._snapshots, self._transport, self._checkpoints = snapshots, transport, checkpoints
        self._stage, self._roster, self._size_limit = stage, roster, size_limit

    def offer(self, past: int, step: int) -> None:
        self._snapshots.offer(Moment(past, step))

    def went_back(self, past: int, step: int) -> None:
        self._snapshots.went_back(Moment(past, step))

    async def restore(self) -> bool:
        roster, stage = self._roster(), self._stage
        others = [seat.record for seat in roster.seats if seat.stage != stage]
        inventory = await find_snapshots(self._transport, others, roster.run_id, stage, made_by=self._made_by)
        if not inventory.found:
            if inventory.away or inventory.wrong:
                raise Missing(f"{len(inventory.away)} workers who may hold pieces of stage {stage} are away")
            return False
        brought = [await self._bring(others, found.header.step) for found in inventory.found]
        if not any(brought):
            raise Missing(f"too few pieces of stage {stage} are here now")
        return True

    async def _bring(self, others: list[PeerRecord], step: int) -> bool:
        try:
            restored = await restore(
                self._transport,
                others,
                self._roster().run_id,
                self._stage,
                step,
                made_by=self._made_by,
                size_limit=self._size_limit,
            )
        except Missing as error:
            log.info("snapshot_not_restored", step=step, reason=error.message)
            return False
        await to_thread.run_sync(self._checkpoints.save, restored.step, restored.state)
        return True

    def _made_by(self, peer: PeerId, stage: int) -> bool:
        return self._roster().stage_by_peer.get(peer) == stage
