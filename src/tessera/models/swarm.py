"""A model with several replicas of each stage in one process: for tests and benchmarks, as `Pipeline` is for one each.

Microbatch m starts at replica m mod n of stage 0, and changes replicas at each boundary by as many places as the step
and m / n say: in turn, every pair of neighbours works together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tessera.models.config import AveragingConfig, ModelSpec
from tessera.models.trainer import StageTrainer

__all__ = ["Swarm"]


class Swarm:
    """`trainers[stage][replica]`."""

    def __init__(self, spec: ModelSpec, replicas: int, *, steps: int, averaging: AveragingConfig | None = None) -> None:
        self.spec, self.replicas = spec, replicas
        self.trainers = [
            [StageTrainer(spec, stage, steps=steps, averaging=averaging) for _ in range(replicas)]
            for stage in range(spec.stages)
        ]

    def route(self, step: int, index: int) -> list[StageTrainer]:
        """Whom microbatch `index` of `step` meets, stage by stage."""
        turn, start = divmod(index, self.replicas)
        return [row[(start + (step + turn) * stage) % self.replicas] for stage, row in enumerate(self.trainers)]

    def learn(self, step: int, index: int, ids: Any) -> None:
        """One microbatch forward and back. The step is not finished by it."""
        route, payload = self.route(step, index), None
        for trainer in route:
            payload = trainer.forward(step, index, ids, payload)
        for trainer in reversed(route):
            payload = trainer.backward(step, index, payload)

    def train_step(self, step: int, microbatches: Sequence[Any]) -> float:
        """All replicas of a stage move by all its gradients, and stay equal. Returns the mean loss in nats."""
        for index, ids in enumerate(microbatches):
            self.learn(step, index, ids)
        losses: list[float | None] = []
        for row in self.trainers:
            parts = [trainer.gradient() for trainer in row]
            losses = [trainer.finish_step_with(step, parts) for trainer in row]
        if losses[0] is None:
            raise RuntimeError("the last stage gave no loss")
        return losses[0]

    def evaluate(self, windows: NDArray[np.int64]) -> float:
        """Mean loss in nats per token over windows [n, T+1], and over routes that pair all neighbours."""
        total, count = 0.0, 0
        for index in range(self.replicas**2):
            result: bytes | tuple[float, int] | None = None
            for trainer in self.route(0, index):
                result = trainer.evaluate(windows, result if isinstance(result, bytes) else None)
            if not isinstance(result, tuple):
                raise RuntimeError("the last stage gave no loss")
            total, count = total + result[0], count + result[1]
        return total / count
