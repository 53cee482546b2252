"""What the audit tests share: a small trained run, steps done by real trainers, and auditors on a memory network.

The workers and their cheats are those of the benchmark.
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from audit_cases import (
    KINDS,
    MICROBATCHES,
    RUN,
    Cheat,
    Crew,
    Run,
    Step,
    auditor_key,
    small_spec,
    stage_of,
    worker_key,
)

from tessera.core.ids import PeerId
from tessera.models.replay import Replayer, Snapshot
from tessera.p2p.memory import MemoryNetwork
from tessera.p2p.transport import Transport
from tessera.training.audit import AuditConfig, Draw, draw
from tessera.training.audit_judge import Finding, judge
from tessera.training.audit_log import AuditLog, serve_audits
from tessera.training.audit_service import Auditor

__all__ = [
    "KINDS",
    "MICROBATCHES",
    "RUN",
    "STEP",
    "Cheat",
    "Crew",
    "Run",
    "Scene",
    "Step",
    "auditor_key",
    "crew",
    "honest_step",
    "judged",
    "lot",
    "message_bytes",
    "replayer",
    "scene",
    "small_spec",
    "stage_of",
    "worker_key",
]  # fmt: skip

STEP = 3  # the last that the small runs keep


@cache
def crew(compute: Literal["float32", "bfloat16"] = "float32") -> Crew:
    """Workers of a run that has learned for a few steps, so that its codes are not trivial."""
    return Crew(Run(small_spec(compute), STEP + 1, keep=2))


@cache
def honest_step() -> Step:
    return crew().step(STEP)


def replayer(done: Step, stage: int) -> Replayer:
    return Replayer(done.run.spec, stage, done.logs[stage].params(done.step).pack())


def judged(done: Step, stage: int, index: int | None = 0) -> Finding:
    evidence = done.evidence(stage, index)
    return judge(evidence, replayer(done, stage), stage_of=done.run.stage_of, ids=done.run.ids)


def lot(stage: int, index: int | None = 0, step: int = STEP) -> Draw:
    return draw(auditor_key(stage), RUN, step, worker_key(stage).id, index)


def message_bytes(done: Step) -> int:
    return len(done.logs[0].messages(done.step, "code_out")[0])


@dataclass
class Scene:
    """A worker who answers out of his log, and his auditor, on one network."""

    auditor: Auditor
    worker: Transport
    stranger: Transport
    step: Step


@asynccontextmanager
async def scene(
    done: Step, stage: int, *, config: AuditConfig | None = None, own: Snapshot | None = None,
    serve: Callable[[Transport, AuditLog], None] | None = None, admitted: Sequence[PeerId] | None = None,
) -> AsyncIterator[Scene]:  # fmt: skip
    """Args:
    own: the auditor's parameters, when they are not the worker's.
    serve: how the worker answers, when not as he should.
    """
    key, auditor = worker_key(stage), auditor_key(stage)
    network = MemoryNetwork(random.Random(3), delay_s=0.02)
    own_log = AuditLog(RUN, 3)
    own_log.open(done.step, own or done.logs[stage].params(done.step))
    async with AsyncExitStack() as stack:
        transports = [await stack.enter_async_context(network.start(k)) for k in (key, auditor, worker_key(3))]
        worker, ours, stranger = transports
        if serve is None:
            serve_audits(worker, done.logs[stage], lambda peer: done.run.stage_of(peer) == stage)
        else:
            serve(worker, done.logs[stage])
        records: dict[PeerId, Any] = {t.record().id: t.record() for t in transports}
        service = Auditor(
            key=auditor, run_id=RUN, spec=done.run.spec, stage=stage, config=config or AuditConfig(),
            message_bytes=message_bytes(done), transport=ours, own=own_log, record_of=lambda peer: records[peer],
            stage_of=done.run.stage_of, ids=done.run.ids,
        )  # fmt: skip
        yield Scene(service, worker, stranger, done)
