"""Computing with one stage: tensors in, tensors out, no bytes and no names of peers.

A trainer checks what comes from outside and keeps the order of calls; an engine only computes. `Placement` says where
the stage's parameters lie: on one device (`Alone`), or on several (`tessera.models.parallel`).

Invariants: a microbatch that was not kept leaves nothing behind; gradients are sums over tokens until `finish`.

Legend: B sequences, T tokens, W message width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.optim import StageOptimizer
from tessera.models.rotation import turned
from tessera.models.stage import Stage

__all__ = ["Alone", "Engine", "LocalEngine", "Placement"]

Inputs = tuple[Tensor, Tensor | None]  # token ids [B, T+1], and the message [B, T, W] that entered


class Engine(Protocol):
    """What a trainer asks for. Arguments are checked already; results lie anywhere."""

    stage: Stage

    def forward(self, index: int, tokens: Tensor, message: Tensor | None, *, keep: bool) -> Tensor | float:
        """The message that leaves, or the sum of losses on the last stage, whose gradient is computed at once.

        Args:
            keep: the graph, for `backward`; without it, `backward` gets the inputs again.
        """
        ...

    def backward(self, index: int, gradient: Tensor | None, again: Inputs | None) -> Tensor | None:
        """The gradient of the message that entered; None on stage 0."""
        ...

    def drop(self, index: int) -> None: ...
    def finish(self, step: int, tokens: int) -> None: ...

    def sums(self) -> dict[str, Tensor]:
        """The gradients of the open step so far, by parameter; zeros where none is. Changes nothing."""
        ...

    def finish_with(self, step: int, tokens: int, sums: Mapping[str, Tensor]) -> None:
        """As `finish`, from these gradients in place of those that are here. `sums` may be overwritten."""
        ...

    def clear(self) -> None: ...
    def evaluate(self, tokens: Tensor, message: Tensor | None) -> Tensor | float: ...
    def layout(self) -> dict[str, Tensor]: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: dict[str, Tensor]) -> None: ...
    def rotate(self, turns: Mapping[str, Tensor]) -> None:
        """Turns the codec's `encode`, `decode` or both by rotations [k, k], with what the optimiser knows of them."""
        ...

    def whole_stage(self) -> Stage: ...


class Placement(Protocol):
    """Where parameters, gradients and the optimiser's state lie."""

    stage: Stage
    optimizer: StageOptimizer

    def before_step(self) -> None:
        """Make every gradient the sum over all ranks."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """What lies here of the sums over all ranks, by name; zeros where there is none. Changes nothing."""
        ...

    def after_use(self) -> None:
        """The stage was used and nothing follows at once: let go of what was gathered for it."""
        ...

    def total(self, value: float) -> float:
        """The sum over all ranks."""
        ...

    def whole(self, name: str, own: Tensor) -> Tensor:
        """The whole of a state tensor, of which `own` is what lies here."""
        ...

    def own(self, name: str, own: Tensor, whole: Tensor | None) -> Tensor:
        """The other way round: the new numbers of `own`. Rank 0 brings the whole, the others None."""
        ...

    def shape(self, name: str, own: Tensor) -> torch.Size:
        """Of the whole of a state tensor."""
        ...

    def clear(self) -> None:
        """Forget all gradients."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """What lies here of the parameters, by name."""
        ...


class Alone:
    """Everything on one device."""

    def __init__(self, stage: Stage, steps: int) -> None:
        self.stage, self.optimizer = stage, StageOptimizer(stage, steps)

    def before_step(self) -> None:
        return

    def gradients(self) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.stage.named_parameters()}

    def after_use(self) -> None:
        return

    def total(self, value: float) -> float:
        return value

    def whole(self, name: str, own: Tensor) -> Tensor:
        return own

    def own(self, name: str, own: Tensor, whole: Tensor | None) -> Tensor:
        if whole is None:
            raise RuntimeError(f"nobody else could bring {name}")
        return whole

    def shape(self, name: str, own: Tensor) -> torch.Size:
        return own.shape

    def clear(self) -> None:
        self.optimizer.clear()

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.stage.named_parameters()}


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A microbatch between its forward and its backward."""

    entered: Tensor | None  # the message received, a leaf that collects its gradient; None on stage 0
    left: Tensor | None  # the message sent, before rounding; None on the last stage, which is done with it


class LocalEngine:
    """The part of a stage's work that one process does."""

    def __init__(self, placement: Placement) -> None:
        self.stage, self._placement, self._optimizer = placement.stage, placement, placement.optimizer
        self._open: dict[int, _InFlight] = {}

    def forward(
        self, index: int, tokens: Tensor, message: Tensor | None, *, keep: bool, part: float = 1.0
    ) -> Tensor | float:
        """As `Engine`. `part` 0 computes as if the microbatch were real, and learns nothing of it."""
        tokens = tokens.to(self.stage.device)
        if self.stage.last:
            entered = self._enter(message)
            loss = self._learn(self.stage(tokens[:, :-1], entered), tokens, part)
            self._open[index] = _InFlight(entered, None)
            return loss
        if not keep:
            with torch.no_grad():
                out: Tensor = self.stage(tokens[:, :-1], self._enter(message))
            self._placement.after_use()
            return out
        self._open[index] = item = self._run(tokens, message)
        assert item.left is not None  # this is not the last stage
        return item.left.detach()

    def backward(self, index: int, gradient: Tensor | None, again: Inputs | None) -> Tensor | None:
        item = self._open.pop(index, None)
        if item is None:
            if again is None:
                raise RuntimeError(f"microbatch {index} was not kept, and its inputs are not given again")
            item = self._run(again[0].to(self.stage.device), again[1])
        if item.left is not None and gradient is not None:
            torch.autograd.backward(item.left, gradient.to(self.stage.device))
        if item.entered is None:
            return None
        if item.entered.grad is None:
            raise RuntimeError("the backward pass left no gradient for the received message")
        return item.entered.grad

    def drop(self, index: int) -> None:
        self._open.pop(index, None)

    def finish(self, step: int, tokens: int) -> None:
        self._placement.before_step()
        self._optimizer.step(step, tokens)

    def sums(self) -> dict[str, Tensor]:
        own = self._placement.gradients()
        return {name: self._placement.whole(f"params.{name}", gradient) for name, gradient in own.items()}

    def finish_with(self, step: int, tokens: int, sums: Mapping[str, Tensor] | None) -> None:
        """As `Engine`. None: another rank brings them."""
        own = {
            name: self._placement.own(f"params.{name}", here, None if sums is None else sums[name]).to(here.device)
            for name, here in self._placement.parameters().items()
        }
        self._optimizer.step(step, tokens, own)
        self._placement.clear()

    def clear(self) -> None:
        self._open.clear()
        self._placement.clear()
        self._placement.after_use()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, message: Tensor | None, *, part: float = 1.0) -> Tensor | float:
        tokens = tokens.to(self.stage.device)
        out: Tensor = self.stage(tokens[:, :-1], None if message is None else message.to(self.stage.device))
        self._placement.after_use()
        return self._placement.total(part * float(_loss_sum(out, tokens))) if self.stage.last else out

    def layout(self) -> dict[str, Tensor]:
        """Names, shapes and types of `state`, without its numbers."""
        return {
            name: torch.empty(self._placement.shape(name, own), dtype=own.dtype, device="meta")
            for name, own in self._own_state().items()
        }

    def state(self) -> dict[str, Tensor]:
        """Parameters as `params.<name>`, and the optimiser's state: whole, wherever it lies."""
        return {name: self._placement.whole(name, own) for name, own in self._own_state().items()}

    def whole_parameters(self) -> dict[str, Tensor]:
        """By name; see `Placement.whole`."""
        own = self._placement.parameters()
        return {name: self._placement.whole(f"params.{name}", parameter) for name, parameter in own.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Takes over what `state` gave, names and shapes checked already. None: another rank brings it."""
        new = {
            name: self._placement.own(name, own, None if state is None else state[name])
            for name, own in self._own_state().items()
        }
        for name, parameter in self._placement.parameters().items():
            parameter.copy_(new[f"params.{name}"])
        self._optimizer.load_state_dict(new)

    @torch.no_grad()
    def rotate(self, turns: Mapping[str, Tensor | None]) -> None:
        """As `Engine`. None: another rank brings the result.

        Cost: O(k² D) and, where several ranks share the stage, three tensors of k · D numbers over the link; no copy of
        the rest of the stage.
        """
        for name, own in self._own_state().items():
            end = name.rpartition(".")[2]
            if end not in turns or own.dim() == 0:  # AdamW's counter bears its parameter's name as well
                continue
            rotation, whole = turns[end], self._placement.whole(name, own)
            own.copy_(self._placement.own(name, own, None if rotation is None else turned(name, whole, rotation)))

    def whole_stage(self) -> Stage:
        return self.stage

    def _own_state(self) -> dict[str, Tensor]:
        params = {f"params.{name}": parameter for name, parameter in self._placement.parameters().items()}
        return params | self._optimizer.state_dict()

    def _enter(self, message: Tensor | None) -> Tensor | None:
        if message is None:
            return None
        return message.to(self.stage.device).detach().requires_grad_(torch.is_grad_enabled())

    def _run(self, tokens: Tensor, message: Tensor | None) -> _InFlight:
        entered = self._enter(message)
        return _InFlight(entered, self.stage(tokens[:, :-1], entered))

    def _learn(self, logits: Tensor, tokens: Tensor, part: float) -> float:
        loss = _loss_sum(logits, tokens)
        value = self._placement.total(part * float(loss.detach()))
        if not abs(value) < float("inf"):
            raise Invalid("the loss is not finite: the training diverged, lower its rates")
        torch.autograd.backward(loss if part == 1 else loss * part)
        return value


def _loss_sum(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
