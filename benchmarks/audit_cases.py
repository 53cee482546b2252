"""Workers, honest and not, whose steps can be audited: what `bench_audit.py` and the tests share.

A `Run` trains a small model for some steps and keeps its states. `Run.step` does one step again with real trainers,
one for each stage, any of them replaced by a `Cheat`; everything is logged, committed to and signed as in a session.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.models.config import CodecConfig, ModelConfig, ModelSpec
from tessera.models.replay import Snapshot, pack_gradients, pack_loss
from tessera.models.trainer import StageTrainer
from tessera.training.audit import draw
from tessera.training.audit_commitment import Commitment, Direction
from tessera.training.audit_evidence import Evidence, Flow, flow_role
from tessera.training.audit_log import AuditLog
from tessera.training.receipts import Receipt, payloads_digest

RUN = RunId("ab" * 32)
SEQUENCES, LENGTH, MICROBATCHES = 4, 64, 4
KINDS = ("skipped_layer", "stale_parameters", "lower_precision", "copied_output", "noise", "colluding_neighbours")
Mode = Literal["both", "forward", "backward"]


def small_spec(
    compute: Literal["float32", "bfloat16"] = "float32", *, stages: int = 3, width: int = 32, depth: int = 2
) -> ModelSpec:
    """`depth` layers a stage: two, so that skipping one is a temptation."""
    model = ModelConfig(
        vocab_size=300, width=width, layers=depth * stages, heads=2, kv_heads=1, ffn=2 * width, context=LENGTH,
        compute=compute,
    )  # fmt: skip
    return ModelSpec(model=model, codec=CodecConfig(kind="codec", k=8), stages=stages, seed=5)


def worker_key(stage: int) -> PeerKey:
    return PeerKey(bytes([1, stage]) + bytes(30))


def auditor_key(stage: int, number: int = 0) -> PeerKey:
    return PeerKey(bytes([2, stage, number]) + bytes(29))


def stage_of(peer: PeerId, stages: int) -> int | None:
    """The roster: a worker and some auditors for each stage."""
    stage = _SEATS.get(peer)
    return stage if stage is not None and stage < stages else None


_SEATS = {
    key.id: stage for stage in range(4) for key in (worker_key(stage), *(auditor_key(stage, n) for n in range(4)))
}


class Text:
    """A Markov chain's words, by name: what can be learned is which word follows which."""

    def __init__(self, words: int) -> None:
        self._known: dict[tuple[int, int], np.ndarray[Any, Any]] = {}  # drawing takes as long as a small step
        self._next = np.random.default_rng(0).dirichlet(np.full(words, 0.02), words).cumsum(1)

    def ids(self, step: int, index: int) -> np.ndarray[Any, Any]:
        if (step, index) not in self._known:
            self._known[step, index] = self._draw(np.random.default_rng((step, index)))
        return self._known[step, index]

    def _draw(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        ids = np.zeros((SEQUENCES, LENGTH + 1), np.int64)
        ids[:, 0] = rng.integers(0, len(self._next), SEQUENCES)
        for t in range(1, LENGTH + 1):
            ids[:, t] = (self._next[ids[:, t - 1]] < rng.random((SEQUENCES, 1))).sum(1).clip(0, len(self._next) - 1)
        return ids


class Run:
    """A model trained for `steps` steps of a text with structure; `states[t]` is what step t began with."""

    def __init__(self, spec: ModelSpec, steps: int, keep: int = 8) -> None:
        self.spec, self.total = spec, 4 * steps
        self.text = Text(spec.model.vocab_size)
        trainers = self.trainers()
        self.states: dict[int, list[bytes]] = {}
        self.first_loss = self.loss = 0.0
        for step in range(steps):
            if step >= steps - keep:
                self.states[step] = [trainer.save() for trainer in trainers]
            for index in range(MICROBATCHES):
                ids, payload = self.ids(step, index), None
                for trainer in trainers:
                    payload = trainer.forward(step, index, ids, payload)
                for trainer in reversed(trainers):
                    payload = trainer.backward(step, index, payload)
            tokens = MICROBATCHES * SEQUENCES * LENGTH
            self.loss = [trainer.finish_step(step, tokens) for trainer in trainers][-1] or 0.0
            self.first_loss = self.first_loss or self.loss

    def trainers(self) -> list[StageTrainer]:
        return [StageTrainer(self.spec, stage, steps=self.total) for stage in range(self.spec.stages)]

    def ids(self, step: int, index: int) -> np.ndarray[Any, Any]:
        return self.text.ids(step, index)

    def stage_of(self, peer: PeerId) -> int | None:
        return stage_of(peer, self.spec.stages)


@dataclass
class Cheat:
    """A worker of `stage` who does `kind` instead of the work, in the directions of `mode`."""

    kind: str
    stage: int
    mode: Mode = "both"
    precision: str = "int8"  # of lower_precision: int8, fp8, or compute (bfloat16 where float32 is declared)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))


class _PassThrough(nn.Module):
    """In the place of a layer."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class Worker:
    """One stage's side of a step: a real trainer, and where he cheats, a lazy one beside it."""

    def __init__(self, run: Run, stage: int) -> None:
        self.run, self.stage, self.key = run, stage, worker_key(stage)
        self.trainer = StageTrainer(run.spec, stage, steps=run.total)
        self.cheat: Cheat | None = None
        self._lazy: StageTrainer | None = None
        self._earlier: dict[str, bytes] = {}  # outputs of another microbatch

    def begin(self, step: int, cheat: Cheat | None) -> Snapshot:
        self.trainer.load(self.run.states[step][self.stage])
        self.cheat = cheat
        self._lazy = None if cheat is None else self._make_lazy(step, cheat)
        return Snapshot(self.trainer.stage)

    def forward(self, step: int, index: int, code: bytes | None) -> bytes | None:
        ids = self.run.ids(step, index)
        true = self.trainer.forward(step, index, ids, code)
        lazy = None if self._lazy is None else self._lazy.forward(step, index, ids, code)
        return self._shown("forward", step, index, true, lazy, code)

    def backward(self, step: int, index: int, gradient: bytes | None) -> bytes | None:
        true = self.trainer.backward(step, index, gradient)
        lazy = None if self._lazy is None else self._lazy.backward(step, index, gradient)
        return self._shown("backward", step, index, true, lazy, gradient)

    def _shown(
        self, way: Mode, step: int, index: int, true: bytes | None, lazy: bytes | None, came: bytes | None
    ) -> bytes | None:
        """What he sends: the truth, or what his cheat makes of it."""
        before = self._earlier.get(way)
        if true is not None:
            self._earlier[way] = true
        cheat = self.cheat
        if cheat is None or true is None or cheat.mode not in (way, "both"):
            return true
        if cheat.kind == "copied_output":
            return came if came is not None and index % 2 else before
        if cheat.kind == "noise":
            return self._noisy(true, way, step, index, cheat)
        if cheat.kind == "colluding_neighbours":  # nothing was computed, and the neighbour signs it all the same
            wire = self.trainer._wire
            shape = (SEQUENCES, LENGTH, wire.width)
            return wire.pack(torch.from_numpy(cheat.rng.standard_normal(shape).astype(np.float32)))
        return lazy

    def _noisy(self, true: bytes, way: Mode, step: int, index: int, cheat: Cheat) -> bytes:
        """Every number off by 1 % of its token's size."""
        wire = self.trainer._wire
        x = wire.unpack(true, SEQUENCES, LENGTH)
        size = x.square().mean(-1, keepdim=True).sqrt()
        x = x + 0.01 * size * torch.from_numpy(cheat.rng.standard_normal(tuple(x.shape)).astype(np.float32))
        return wire.pack(x, None if way == "forward" else ("gradient", self.run.spec.seed, step, index, self.stage - 1))

    def _make_lazy(self, step: int, cheat: Cheat) -> StageTrainer | None:
        if cheat.kind in ("copied_output", "noise", "colluding_neighbours"):
            return None
        spec = self.run.spec
        if cheat.kind == "lower_precision" and cheat.precision == "compute":
            spec = spec.model_copy(update={"model": spec.model.model_copy(update={"compute": "bfloat16"})})
        lazy = StageTrainer(spec, self.stage, steps=self.run.total)
        if cheat.kind == "stale_parameters":
            lazy.load(self.run.states[step - 1][self.stage])
        else:
            lazy.stage.load_state_dict(self.trainer.stage.state_dict())
        lazy.step = step
        if cheat.kind == "skipped_layer":
            lazy.stage.layers[next(iter(lazy.stage.layers))] = _PassThrough()
        if cheat.kind == "lower_precision" and cheat.precision != "compute":
            _quantise(lazy.stage, cheat.precision)
        return lazy


@torch.no_grad()
def _quantise(stage: nn.Module, precision: str) -> None:
    """Matrices as inference engines store them: one scale for each row."""
    for parameter in stage.parameters():
        if parameter.dim() != 2:
            continue
        if precision == "fp8":
            parameter.copy_(parameter.to(torch.float8_e4m3fn).to(parameter.dtype))
        else:
            scale = parameter.abs().amax(1, keepdim=True) / 127
            parameter.copy_(torch.where(scale > 0, (parameter / scale).round() * scale, 0.0))


@dataclass(frozen=True)
class Step:
    """One step, done, signed and committed to."""

    run: Run
    step: int
    logs: list[AuditLog]  # by stage
    receipts: list[Receipt]
    commitments: list[Commitment]  # by stage

    def evidence(self, stage: int, index: int | None, key: PeerKey | None = None) -> Evidence:
        """As an auditor gathers it. `index` None: of the whole step and its update."""
        worker, own = worker_key(stage).id, self.logs[stage]
        promise = self.commitments[stage]
        lot = draw(key or auditor_key(stage), RUN, self.step, worker, index)
        wanted = promise.microbatches if index is None else (index,)
        flows = []
        for receipt in self.receipts:
            if worker not in (receipt.worker, receipt.signer):
                continue
            logged = own.messages(self.step, flow_role(receipt, worker))
            payloads = {i: logged[i] for i in receipt.microbatches if i in wanted}
            flows.append(Flow(receipt, tuple(sha256(logged[i]) for i in receipt.microbatches), payloads))
        losses = tuple(own.losses(self.step)[i] for i in promise.microbatches) if own.losses(self.step) else ()
        return Evidence(lot, tuple(flows), promise, losses, own.update(self.step) if index is None else None)


class Crew:
    """A worker for each stage; does steps again, one after another."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.workers = [Worker(run, stage) for stage in range(run.spec.stages)]

    def step(self, step: int, cheat: Cheat | None = None, *, updates: Mapping[int, bytes] | None = None) -> Step:
        """Do `step`, from its state.

        Args:
            cheat: what one of them does instead of his work.
            updates: by stage, what stands for the sum of gradients instead.
        """
        logs = [AuditLog(RUN, 3) for _ in self.workers]
        for worker, log in zip(self.workers, logs, strict=True):
            own = cheat if cheat is not None and cheat.stage == worker.stage else None
            log.open(step, worker.begin(step, own))
        for index in range(MICROBATCHES):
            self._microbatch(step, index, logs)
        commitments = [
            log.commit(step, worker.key, (updates or {}).get(worker.stage) or pack_gradients(worker.trainer.stage))
            for worker, log in zip(self.workers, logs, strict=True)
        ]
        for worker in self.workers:
            worker.trainer.reset_step()
        return Step(self.run, step, logs, list(self._receipts(step, logs)), commitments)

    def _microbatch(self, step: int, index: int, logs: list[AuditLog]) -> None:
        message: bytes | None = None
        for (up, upper), (down, lower) in itertools.pairwise(zip(self.workers, logs, strict=True)):
            message = up.forward(step, index, message)
            assert message is not None
            upper.keep(step, index, "code_out", message, down.key.id)
            lower.keep(step, index, "code_in", message, up.key.id)
        last = self.workers[-1]
        before = last.trainer._loss_sum
        last.forward(step, index, message)
        logs[-1].keep_loss(step, index, pack_loss(last.trainer._loss_sum - before))
        message = None
        pairs = itertools.pairwise(zip(reversed(self.workers), reversed(logs), strict=True))
        for (down, lower), (up, upper) in pairs:
            message = down.backward(step, index, message)
            assert message is not None
            lower.keep(step, index, "gradient_out", message, up.key.id)
            upper.keep(step, index, "gradient_in", message, down.key.id)
        self.workers[0].backward(step, index, message)

    def _receipts(self, step: int, logs: list[AuditLog]) -> Iterator[Receipt]:
        """Each neighbour signs what arrived, whatever it is."""
        for up, down in itertools.pairwise(self.workers):
            ways: tuple[tuple[Direction, Worker, Worker, Any], ...] = (
                ("forward", up, down, "code_in"),
                ("backward", down, up, "gradient_in"),
            )
            for direction, worker, signer, role in ways:
                arrived = logs[signer.stage].messages(step, role)
                digest = payloads_digest({i: sha256(m) for i, m in arrived.items()})
                version = logs[signer.stage].params(step).version
                yield Receipt(
                    RUN, step, worker.key.id, signer.key.id, direction, tuple(sorted(arrived)), digest, version
                ).signed_by(signer.key)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
