"""A model with several replicas of each stage in one process: what tests and benchmarks of replicas share.

Microbatch m starts at replica m mod n of stage 0, and changes replicas at each boundary by as many places as the step
and m / n say: in turn, every pair of neighbours works together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessera.models.config import AveragingConfig, ModelSpec
from tessera.models.trainer import StageTrainer


class Swarm:
    """`trainers[stage][replica]`."""

    def __init__(self, spec: ModelSpec, replicas: int, *, steps: int, averaging: AveragingConfig) -> None:
        self.spec, self.replicas = spec, replicas
        self.trainers = [
            [StageTrainer(spec, stage, steps=steps, averaging=averaging) for _ in range(replicas)]
            for stage in range(spec.stages)
        ]

    def route(self, step: int, index: int) -> list[StageTrainer]:
        """Whom microbatch `index` of `step` meets, stage by stage."""
        turn, start = divmod(index, self.replicas)
        return [row[(start + (step + turn) * stage) % self.replicas] for stage, row in enumerate(self.trainers)]

    def pass_through(self, step: int, microbatches: Sequence[Any]) -> int:
        """Forwards and backwards of a step; returns its tokens."""
        tokens = 0
        for index, ids in enumerate(microbatches):
            route, payload = self.route(step, index), None
            for trainer in route:
                payload = trainer.forward(step, index, ids, payload)
            for trainer in reversed(route):
                payload = trainer.backward(step, index, payload)
            tokens += len(ids) * (len(ids[0]) - 1)
        return tokens

    def step(self, step: int, microbatches: Sequence[Any]) -> float:
        """One exact step: all replicas of a stage move by all its gradients. Returns the mean loss."""
        self.pass_through(step, microbatches)
        losses = []
        for row in self.trainers:
            parts = [trainer.gradient() for trainer in row]
            losses = [trainer.finish_step_with(step, parts) for trainer in row]
        if losses[0] is None:
            raise RuntimeError("the last stage gave no loss")
        return losses[0]
