"""What a worker records of each step so that the others of his stage can audit it: parameters, messages, a promise.

Messages are taken from the step's log when the step ends, in one go: what counts is who serves a microbatch then,
whoever did before. A worker who is alone at his stage records nothing, and pays nothing for it.

Invariants: parameters are copied before anything of the step is computed; the promise is signed before the sums of the
step are used, and so before anybody draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import anyio
from anyio import to_thread
from torch import Tensor

from tessera.core.ids import PeerId
from tessera.core.signing import PeerKey
from tessera.models.replay import Snapshot, pack_loss, pack_sums
from tessera.models.stage import Stage
from tessera.training.audit_evidence import Role
from tessera.training.audit_log import AuditLog
from tessera.training.manifest import Manifest
from tessera.training.receipts import NO_VERSION
from tessera.training.step_log import Passage, StepLog
from tessera.training.work import Compute

__all__ = ["AuditRecords", "RecordedTrainer"]


class RecordedTrainer(Protocol):
    """What is recorded of a `StageTrainer`."""

    def whole_stage(self) -> Stage: ...
    def sums(self) -> dict[str, Tensor]: ...
    def loss_of(self, index: int) -> float | None: ...


class AuditRecords:
    """One worker's, in `log`.

    Args:
        alone: whether nobody else holds our stage now.
        compute: how a call that takes a while is made, beside the event loop.

    Cost: for each step one copy and one hash of the parameters and, when whole steps are audited, of the gradients.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        stage: int,
        key: PeerKey,
        trainer: RecordedTrainer,
        alone: Callable[[], bool],
        compute: Compute = to_thread.run_sync,
    ) -> None:
        self._spec, self._stage, self._key, self._trainer = manifest.model, stage, key, trainer
        self._alone, self._compute = alone, compute
        self._sums_too = manifest.audit.update_bps > 0
        self._recorded = False  # the open step is
        self.log = AuditLog(manifest.run_id, manifest.audit.window_steps)

    async def open(self, step: int) -> bytes:
        self._recorded = not self._alone()
        if not self._recorded:
            await anyio.lowlevel.checkpoint()
            return NO_VERSION
        snapshot = await self._compute(self._snapshot)
        self.log.open(step, snapshot)
        return snapshot.version

    async def close(self, log: StepLog) -> None:
        done = log.done()
        if not self._recorded or not done:
            await anyio.lowlevel.checkpoint()
            return
        for passage in done:
            self._keep(log.step, passage)
        update = await self._compute(self._update) if self._sums_too else b""
        await self._compute(self.log.commit, log.step, self._key, update)

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._trainer.whole_stage())

    def _update(self) -> bytes:
        return pack_sums(self._spec, self._stage, self._trainer.sums())

    def _keep(self, step: int, passage: Passage) -> None:
        messages: Mapping[Role, tuple[bytes | None, PeerId | None]] = {
            "code_in": (passage.code_in, passage.source),
            "code_out": (passage.code_out, passage.target),
            "gradient_in": (passage.gradient_in, passage.target),
            "gradient_out": (passage.gradient_out, passage.source),
        }
        for role, (message, peer) in messages.items():
            if message is not None and peer is not None:
                self.log.keep(step, passage.index, role, message, peer)
        loss = self._trainer.loss_of(passage.index)
        if loss is not None:
            self.log.keep_loss(step, passage.index, pack_loss(loss))
