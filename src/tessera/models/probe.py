"""How fast this machine is at one stage: a few real microbatches, timed, before anybody is promised anything.

Times are of computing alone, packing and unpacking of messages included; what a schedule and links make of them is the
forecast's business (`StageSpeed.pace`). On a processor, with one thread, processor seconds count: several workers that
probe at the same time do not slow each other's figures down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from tessera.core.errors import Invalid
from tessera.models.config import ModelSpec
from tessera.models.forecast import StagePace
from tessera.models.memory import estimate_memory
from tessera.models.noise import integers
from tessera.models.trainer import StageTrainer
from tessera.models.wire import Wire

__all__ = ["StageSpeed", "probe_stage"]

STEPS = 1_000_000  # of the trainer that is probed: its rates must not reach zero
ROUND = 2  # microbatches in a probed step
MAX_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """What a stage does here. The last stage's forward includes its backward, as the schedule has it."""

    tok_per_s_forward: float
    tok_per_s_backward: float
    tok_per_s_evaluate: float
    step_s: float  # one optimiser step
    memory_bytes: int  # at the peak of real training, by `estimate_memory`
    threads: int

    def seconds_per_token(self, tokens_per_step: int) -> float:
        """Forward, backward, and the token's part of the optimiser's step, which is a sixth of a small model's work."""
        return 1 / self.tok_per_s_forward + 1 / self.tok_per_s_backward + self.step_s / tokens_per_step

    def pace(self, *, machine: str = "", cores: int = 1) -> StagePace:
        """As the forecast takes it."""
        return StagePace(
            1 / self.tok_per_s_forward,
            1 / self.tok_per_s_backward,
            step_s=self.step_s,
            evaluate_s=1 / self.tok_per_s_evaluate,
            machine=machine,
            cores=cores,
            threads=min(self.threads, cores),
        )


def probe_stage(
    spec: ModelSpec,
    stage: int,
    *,
    sequences: int,
    length: int,
    microbatches: int = 1,
    device: str = "cpu",
    seconds: float = 3.0,
) -> StageSpeed:
    """Trains the stage on random tokens and messages for about `seconds`, and forgets it.

    Args:
        microbatches: of a real step; decides how many are in flight, for the memory alone.
        device: a torch device, see `pick_device`.

    Raises: Invalid: no such stage, or a shape that the model does not take.

    Cost: `seconds`, but at least two steps of two microbatches, and building the stage before that.
    """
    if not seconds > 0:
        raise Invalid(f"a probe takes some seconds, not {seconds}")
    probe = _Probe(StageTrainer(spec, stage, steps=STEPS, device=device), sequences, length)
    probe.step()  # the first one allocates
    probe.forget()
    deadline = time.monotonic() + seconds
    for _ in range(MAX_ROUNDS):
        probe.step()
        if time.monotonic() >= deadline:
            break
    tokens = sequences * length
    need = estimate_memory(spec, stage, sequences=sequences, length=length, microbatches=microbatches)
    return StageSpeed(
        tok_per_s_forward=tokens / probe.middle("forward"),
        tok_per_s_backward=tokens / probe.middle("backward"),
        tok_per_s_evaluate=tokens / probe.middle("evaluate"),
        step_s=probe.middle("step"),
        memory_bytes=need.together if torch.device(device).type == "cpu" else need.device,
        threads=torch.get_num_threads() if torch.device(device).type == "cpu" else 1,
    )


class _Probe:
    """A trainer with inputs of the right shape, and a watch."""

    def __init__(self, trainer: StageTrainer, sequences: int, length: int) -> None:
        spec, stage = trainer.spec, trainer.stage
        shape = (sequences, length + 1)
        self._ids = integers(shape[0] * shape[1], spec.model.vocab_size, spec.seed, "probe").reshape(shape)
        message = torch.randn(sequences, length, spec.message_width, generator=torch.Generator().manual_seed(0))
        wire = Wire(spec)
        self._entered = None if stage.first else wire.pack(message)
        self._gradient = None if stage.last else wire.pack(message * 1e-3, ("gradient", spec.seed))
        self._trainer, self._now = trainer, _stopwatch(trainer.device)
        self._tokens = sequences * length
        self._times: dict[str, list[float]] = {}

    def step(self) -> None:
        trainer, step = self._trainer, self._trainer.step
        for index in range(ROUND):
            self._timed("forward", trainer.forward, step, index, self._ids, self._entered)
            self._timed("backward", trainer.backward, step, index, self._gradient)
        self._timed("step", trainer.finish_step, step, ROUND * self._tokens)
        self._timed("evaluate", trainer.evaluate, self._ids, self._entered)

    def forget(self) -> None:
        self._times.clear()

    def middle(self, what: str) -> float:
        """Seconds; never zero, however coarse the clock."""
        return max(median(self._times[what]), 1e-9)

    def _timed(self, what: str, call: Callable[..., Any], *arguments: Any) -> None:
        started = self._now()
        call(*arguments)
        self._times.setdefault(what, []).append(self._now() - started)


def _stopwatch(device: torch.device) -> Callable[[], float]:
    """Seconds that computing took so far. A GPU works on after a call has returned: wait for it."""
    if device.type == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    finish = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize

    def now() -> float:
        finish()
        return time.perf_counter()

    return now
