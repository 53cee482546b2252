"""All stages in one process, exchanging the same bytes that peers would: for tests, benchmarks and single machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.config import ModelSpec
from tessera.models.dataset import Dataset, rows
from tessera.models.dataset_order import WindowOrder
from tessera.models.decode import StageDecoder
from tessera.models.presets import Batch
from tessera.models.trainer import StageTrainer

__all__ = ["Pipeline", "greedy"]

EVALUATION_ROWS = 16  # windows that pass at once


def greedy(logits: Tensor) -> int:
    """The most likely token; the lowest of equals."""
    return int(logits.argmax())


class Pipeline:
    """Every stage of `spec`, one after the other."""

    def __init__(self, spec: ModelSpec, *, steps: int, device: str = "cpu") -> None:
        self.spec = spec
        self.trainers = [StageTrainer(spec, stage, steps=steps, device=device) for stage in range(spec.stages)]

    @property
    def parameters(self) -> int:
        """Trained numbers in all stages together."""
        return sum(p.numel() for t in self.trainers for p in t.stage.parameters())

    def train_step(self, step: int, microbatches: Sequence[Any]) -> float:
        """One step over token ids [B, T+1] each; returns the mean loss in nats per token."""
        tokens = 0
        for index, ids in enumerate(microbatches):
            payload: bytes | None = None
            for trainer in self.trainers:
                payload = trainer.forward(step, index, ids, payload)
            for trainer in reversed(self.trainers):
                payload = trainer.backward(step, index, payload)
            tokens += len(ids) * (len(ids[0]) - 1)
        losses = [trainer.finish_step(step, tokens) for trainer in self.trainers]
        return _number(losses[-1])

    def train(self, dataset: Dataset, shape: Batch, on_step: Callable[[int, float], None] | None = None) -> None:
        """A whole run over `dataset` as one shard, in the order that the model's seed names."""
        order = WindowOrder([dataset.train.size], length=shape.length, active=1, name=("local", self.spec.seed))
        for step in range(shape.steps):
            first = step * shape.microbatches * shape.sequences
            numbers = range(first, first + shape.microbatches * shape.sequences)
            ids = rows(dataset.train, [order.locate(number).start for number in numbers], shape.length)
            loss = self.train_step(step, np.split(ids, shape.microbatches))
            if on_step is not None:
                on_step(step, loss)

    def evaluate(self, windows: NDArray[np.int64]) -> float:
        """Mean loss in nats per token over windows [n, T+1]."""
        total, count = 0.0, 0
        for start in range(0, len(windows), EVALUATION_ROWS):
            result: bytes | tuple[float, int] | None = None
            for trainer in self.trainers:
                payload = result if isinstance(result, bytes) else None
                result = trainer.evaluate(windows[start : start + EVALUATION_ROWS], payload)
            if not isinstance(result, tuple):
                raise RuntimeError("the last stage gave no loss")
            total, count = total + result[0], count + result[1]
        return total / count

    def generate(self, prompt: list[int], count: int, choose: Callable[[Tensor], int] = greedy) -> list[int]:
        """Up to `count` tokens after `prompt`, as far as the context reaches.

        Raises: Invalid: an empty prompt, or one that fills the context.
        """
        if not 1 <= len(prompt) < self.spec.model.context:
            raise Invalid(f"a prompt has 1 to {self.spec.model.context - 1} tokens, not {len(prompt)}")
        decoders = [StageDecoder(trainer, max_sessions=1) for trainer in self.trainers]
        new, out = list(prompt), list[int]()
        for _ in range(min(count, self.spec.model.context - len(prompt))):
            result: bytes | Tensor | None = None
            for decoder in decoders:
                result = decoder.step("local", new, result if isinstance(result, bytes) else None)
            if not isinstance(result, Tensor):
                raise RuntimeError("the last stage gave no logits")
            new = [choose(result)]
            out += new
        return out


def _number(loss: float | None) -> float:
    if loss is None:
        raise RuntimeError("the last stage gave no loss")
    return loss
