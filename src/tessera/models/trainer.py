"""What a worker calls to train its stage: bytes in, bytes out, one optimiser step at a time.

    stage 0   forward(ids) ─▶ bytes ─▶ ... ─▶ last stage: loss and its backward at once
    stage 0   backward(bytes) ◀─ ... ◀─ bytes ◀─ backward(None) on the last stage
    finish_step on every stage, with the tokens of all microbatches

Invariants: the same calls with the same bytes give the same bytes (rounding noise is named by run seed, step,
microbatch and boundary), so a step can be replayed and audited. Gradients are sums over tokens until `finish_step`
divides them. A refused call changes nothing. Not safe for use from two threads at once.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.core.errors import Conflict, Invalid, Missing
from tessera.models.checkpoint import read_checkpoint, write_checkpoint
from tessera.models.config import ModelSpec
from tessera.models.optim import StageOptimizer
from tessera.models.stage import Stage
from tessera.models.wire import Wire

__all__ = ["MAX_IN_FLIGHT", "StageTrainer", "check_ids", "receive"]

MAX_IN_FLIGHT = 256  # microbatches; each holds its graph


@dataclass(frozen=True)
class _InFlight:
    """A microbatch between its forward and its backward."""

    shape: tuple[int, int]
    entered: Tensor | None  # the message received, a leaf that collects its gradient; None on stage 0
    left: Tensor | None  # the message sent, before rounding; None on the last stage, which is done with it


class StageTrainer:
    """One stage in training.

    Args:
        steps: of the whole run; rates decay to zero at its end.
        device: a torch device, see `pick_device`.

    Raises: Invalid: no such stage, or no steps.
    """

    def __init__(self, spec: ModelSpec, stage: int, *, steps: int, device: str = "cpu") -> None:
        self.spec = spec
        self.stage = Stage(spec, stage).to(device)
        self.device = torch.device(device)
        self.step = 0  # the step that is open: finished ones count 0 ... step - 1
        self._optimizer = StageOptimizer(self.stage, steps)
        self._wire = Wire(spec)
        self._open: dict[int, _InFlight] = {}
        self._seen: set[int] = set()
        self._loss_sum, self._loss_tokens = 0.0, 0

    def forward(self, step: int, index: int, ids: Any, payload: bytes | None) -> bytes | None:
        """Microbatch `index` of `step` through this stage.

        Args:
            ids: integers [B, T+1], the microbatch and one token more.
            payload: what the stage before sent; None on stage 0.

        Returns:
            What to send to the next stage; None on the last one, which has computed the loss and its gradient.

        Raises: Invalid: wrong ids or payload.  Conflict: another step is open, or this microbatch was here already.
        """
        self._check_step(step)
        if index in self._seen:
            raise Conflict(f"microbatch {index} of step {step} went through this stage already")
        if len(self._open) >= MAX_IN_FLIGHT:
            raise Conflict(f"{MAX_IN_FLIGHT} microbatches are in flight: send gradients first")
        tokens = self._tokens(ids)
        entered = self._receive(payload, tokens.size(0), tokens.size(1) - 1)
        shape = (tokens.size(0), tokens.size(1) - 1)
        if entered is not None:
            entered.requires_grad_()
        out = self.stage(tokens[:, :-1], entered)
        if self.stage.last:
            self._learn(out, tokens)
            self._keep(index, _InFlight(shape, entered, None))
            return None
        data = self._wire.pack(out)
        self._keep(index, _InFlight(shape, entered, out))
        return data

    def backward(self, step: int, index: int, payload: bytes | None) -> bytes | None:
        """The gradient of microbatch `index`, from the next stage to the one before.

        Args:
            payload: what the next stage sent; None on the last one.

        Returns:
            What to send to the stage before; None on stage 0.

        Raises: Invalid: wrong payload.  Missing: no such microbatch is in flight.  Conflict: another step is open.
        """
        self._check_step(step)
        item = self._open.get(index)
        if item is None:
            raise Missing(f"microbatch {index} of step {step} is not in flight on stage {self.stage.index}")
        if item.left is not None:
            torch.autograd.backward(item.left, self._gradient(payload, item.shape))
        elif payload is not None:
            raise Invalid("the last stage computes its gradient itself: no payload expected")
        del self._open[index]
        if item.entered is None:
            return None
        if item.entered.grad is None:
            raise RuntimeError("the backward pass left no gradient for the received message")
        boundary = self.stage.index - 1
        return self._wire.pack(item.entered.grad, ("gradient", self.spec.seed, step, index, boundary))

    def finish_step(self, step: int, tokens: int) -> float | None:
        """Moves the parameters by the mean gradient over `tokens`, all microbatches together.

        Returns: the mean loss in nats per token on the last stage, None elsewhere.

        Raises: Conflict: another step is open, microbatches are in flight, none came, or the run is over.
        """
        self._check_step(step)
        if tokens < 1:
            raise Invalid(f"a step has at least one token, not {tokens}")
        if self._open:
            raise Conflict(f"microbatches {sorted(self._open)} of step {step} are still in flight")
        if self.stage.last and tokens != self._loss_tokens:
            raise Conflict(f"step {step} is said to have {tokens} tokens, but {self._loss_tokens} came")
        loss = self._loss_sum / tokens if self.stage.last else None
        self._optimizer.step(step, tokens)
        self.step += 1
        self._forget()
        return loss

    def reset_step(self) -> None:
        """Drops everything of the open step: it can start again from its first microbatch."""
        self._optimizer.clear()
        self._forget()

    @torch.no_grad()
    def evaluate(self, ids: Any, payload: bytes | None) -> bytes | tuple[float, int]:
        """As `forward`, but learns nothing: the message, or (sum of losses in nats, tokens) on the last stage."""
        tokens = self._tokens(ids)
        out = self.stage(tokens[:, :-1], self._receive(payload, tokens.size(0), tokens.size(1) - 1))
        if not self.stage.last:
            return self._wire.pack(out)
        return float(_loss_sum(out, tokens)), tokens[:, 1:].numel()

    def payload_limit(self, batch: int, length: int) -> int:
        """Bytes of a message of `batch` × `length` tokens, in either direction: exactly that many are accepted."""
        return self._wire.size(batch, length)

    def save(self) -> bytes:
        """Parameters, optimiser and step, as a safetensors file. In-flight microbatches are not part of it."""
        return write_checkpoint(self._state(), {**self._facts(), "step": str(self.step)})

    def load(self, data: bytes) -> None:
        """Takes over what `save` wrote. Drops the open step.

        Raises: Invalid: corrupt, or of another model, stage or seed; nothing has changed then.
        """
        expected = self._state()
        tensors, facts = read_checkpoint(data, expected, self._facts())
        step = facts.get("step", "")
        if not (step.isascii() and step.isdecimal() and len(step) < 10):
            raise Invalid(f"the checkpoint's step is {step[:40]!r}, expected a number")
        with torch.no_grad():
            for name, parameter in self.stage.named_parameters():
                parameter.copy_(tensors[f"params.{name}"])
        self._optimizer.load_state_dict(tensors)
        self.step = int(step)
        self.reset_step()

    def _state(self) -> dict[str, Tensor]:
        params = {f"params.{name}": p.detach() for name, p in self.stage.named_parameters()}
        return params | self._optimizer.state_dict()

    def _facts(self) -> dict[str, str]:
        return {"spec": self.spec.digest(), "stage": str(self.stage.index)}

    def _check_step(self, step: int) -> None:
        if step != self.step:
            raise Conflict(f"step {step} is not open on stage {self.stage.index}: step {self.step} is")

    def _tokens(self, ids: Any) -> Tensor:
        return check_ids(ids, self.spec).to(self.device)

    def _receive(self, payload: bytes | None, batch: int, length: int) -> Tensor | None:
        return receive(self.stage, self._wire, payload, batch, length)

    def _gradient(self, payload: bytes | None, shape: tuple[int, int]) -> Tensor:
        if payload is None:
            raise Invalid(f"stage {self.stage.index} needs the gradient from stage {self.stage.index + 1}")
        return self._wire.unpack(payload, *shape).to(self.device)

    def _learn(self, logits: Tensor, tokens: Tensor) -> None:
        loss = _loss_sum(logits, tokens)
        value = float(loss.detach())
        if not abs(value) < float("inf"):
            raise Invalid("the loss is not finite: the training diverged, lower its rates")
        torch.autograd.backward(loss)
        self._loss_sum += value
        self._loss_tokens += tokens[:, 1:].numel()

    def _keep(self, index: int, item: _InFlight) -> None:
        self._open[index] = item
        self._seen.add(index)

    def _forget(self) -> None:
        self._open.clear()
        self._seen.clear()
        self._loss_sum, self._loss_tokens = 0.0, 0


def receive(stage: Stage, wire: Wire, payload: bytes | None, batch: int, length: int) -> Tensor | None:
    """The message that enters `stage`, None on stage 0. Raises: Invalid: one too many, one missing, or a wrong one."""
    if stage.first:
        if payload is not None:
            raise Invalid("stage 0 takes token ids alone: no payload expected")
        return None
    if payload is None:
        raise Invalid(f"stage {stage.index} needs the message of stage {stage.index - 1}")
    return wire.unpack(payload, batch, length).to(stage.device)


def check_ids(ids: Any, spec: ModelSpec) -> Tensor:
    """Token ids [B, T+1] as int64. Raises: Invalid: other shapes, types, lengths or values than the model takes."""
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Invalid(f"token ids are integers [B, T+1]: {error}") from error
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise Invalid(f"token ids are integers [B, T+1], not {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.size(0) < 1 or not 2 <= tokens.size(1) <= spec.model.context + 1:
        raise Invalid(f"token ids of shape {tuple(tokens.shape)}: expected 2 to {spec.model.context + 1} columns")
    tokens = tokens.to(torch.int64)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= spec.model.vocab_size:
        raise Invalid(f"token ids from {low} to {high}: expected 0 to {spec.model.vocab_size - 1}")
    return tokens


def _loss_sum(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
