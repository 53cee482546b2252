"""What a worker calls to train its stage: bytes in, bytes out, one optimiser step at a time.

    stage 0   forward(ids) ─▶ bytes ─▶ ... ─▶ last stage: loss and its backward at once
    stage 0   backward(bytes) ◀─ ... ◀─ bytes ◀─ backward(None) on the last stage
    finish_step on every stage; with replicas, gradient() on each and finish_step_with(all of them)

Invariants: the same calls with the same bytes give the same bytes (rounding noise is named by run seed, step,
microbatch and boundary), so a step can be replayed and audited. Gradients are sums over tokens until a step divides
them by the tokens that they are sums over, whatever was planned: a microbatch that got lost weighs nothing. A refused
call changes nothing. Not safe for use from two threads at once, except `check_gradient` and `check_partition`.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tessera.core.errors import Conflict, Invalid, Missing
from tessera.models.checkpoint import read_checkpoint, write_checkpoint
from tessera.models.config import AveragingConfig, ModelSpec
from tessera.models.engine import Alone, Engine, LocalEngine
from tessera.models.gradients import GradientForm
from tessera.models.memory import MAX_IN_FLIGHT
from tessera.models.partitions import Partitions
from tessera.models.rotation import check_rotation
from tessera.models.stage import Stage
from tessera.models.wire import Wire

__all__ = ["StageTrainer", "check_ids", "receive"]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A microbatch between its forward and its backward, as far as the trainer knows it."""

    shape: tuple[int, int]
    codes: tuple[Tensor, bytes | None] | None  # ids and what was received, when the backward has to recompute


class StageTrainer:
    """One stage in training.

    Args:
        steps: of the whole run; rates decay to zero at its end.
        device: a torch device, see `pick_device`.
        graphs: how many microbatches in flight may keep their graph. The others keep their codes only, and run their
            forward once more in the backward: the same bytes, a third more work, a fraction of the memory.
        engine: computes instead of this process alone, `device` is its own then; see `tessera.models.parallel`.
        averaging: how this stage's replicas stay together; None: the defaults.

    Raises: Invalid: no such stage, no steps, or fewer than no graphs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stage: int,
        *,
        steps: int,
        device: str = "cpu",
        graphs: int = MAX_IN_FLIGHT,
        engine: Engine | None = None,
        averaging: AveragingConfig | None = None,
    ) -> None:
        if graphs < 0:
            raise Invalid(f"a stage keeps the graphs of 0 or more microbatches, not of {graphs}")
        self.spec, self.graphs = spec, graphs
        self.averaging = averaging or AveragingConfig()
        self._engine: Engine = engine or LocalEngine(Alone(Stage(spec, stage).to(device), steps))
        self.stage = self._engine.stage
        self.device = self.stage.device
        self.step = 0  # the step that is open: finished ones count 0 ... step - 1
        self._wire = Wire(spec)
        self._open: dict[int, _InFlight] = {}
        self._seen: set[int] = set()
        self._loss_sum, self._tokens = 0.0, 0  # of the microbatches whose gradients are in the sums
        self._losses: dict[int, float] = {}

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
        tokens = check_ids(ids, self.spec)
        shape = (tokens.size(0), tokens.size(1) - 1)
        message = receive(self.stage, self._wire, payload, *shape)
        keep = self.stage.last or sum(item.codes is None for item in self._open.values()) < self.graphs
        out = self._engine.forward(index, tokens, message, keep=keep)
        data = self._leave(index, out, tokens)
        self._open[index] = _InFlight(shape, None if keep else (tokens, payload))
        self._seen.add(index)
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
        again = None
        if item.codes is not None:
            tokens, received = item.codes
            again = tokens, receive(self.stage, self._wire, received, *item.shape)
        gradient = self._engine.backward(index, self._gradient(payload, item.shape), again)
        del self._open[index]
        if not self.stage.last:  # there, the forward has counted them
            self._tokens += item.shape[0] * item.shape[1]
        if gradient is None:
            return None
        boundary = self.stage.index - 1
        return self._wire.pack(gradient, ("gradient", self.spec.seed, step, index, boundary))

    def drop(self, step: int, index: int) -> None:
        """Gives up a microbatch in flight, whose gradient will not come. It may start again, except on the last stage,
        which has learned from it in its forward.

        Raises: Missing: no such microbatch is in flight.  Conflict: another step is open.
        """
        self._check_step(step)
        if index not in self._open:
            raise Missing(f"microbatch {index} of step {step} is not in flight on stage {self.stage.index}")
        self._engine.drop(index)
        del self._open[index]
        if not self.stage.last:
            self._seen.remove(index)

    def finish_step(self, step: int, tokens: int) -> float | None:
        """Moves the parameters by the mean gradient over the tokens that came, of at most `tokens`.

        Returns: the mean loss in nats per token on the last stage, None elsewhere.

        Raises: Conflict: another step is open, microbatches are in flight, none or more came, or the run is over.
        """
        self._check_complete(step)
        if tokens < 1:
            raise Invalid(f"a step has at least one token, not {tokens}")
        if self._tokens > tokens:
            raise Conflict(f"step {step} is said to have {tokens} tokens, but {self._tokens} came")
        if not self._tokens:
            raise Conflict(f"no microbatch went through stage {self.stage.index} in step {step}")
        loss = self._loss_sum / self._tokens if self.stage.last else None
        self._engine.finish(step, self._tokens)
        self._next_step()
        return loss

    def skip_step(self, step: int) -> None:
        """Passes to the next step without moving: nothing came here.

        Raises: Conflict: another step is open, or something came.
        """
        self._check_complete(step)
        if self._tokens:
            raise Conflict(f"{self._tokens} tokens came to stage {self.stage.index} in step {step}")
        self._next_step()

    def loss_of(self, index: int) -> float | None:
        """The sum of losses in nats over a microbatch of the open step; None away from the last stage."""
        return self._losses.get(index)

    # --- replicas: gradients, each step -----------------------------------------------------------------------------

    def gradient(self) -> bytes:
        """This replica's part of the open step: zeros, if nothing came here. More microbatches may follow, which make
        another part.

        Raises: Conflict: microbatches are in flight.  Invalid: training diverged.
        """
        self._check_complete(self.step)
        return self._gradients.pack(self._tokens, self._loss_sum, self._engine.sums())

    def sums(self) -> dict[str, Tensor]:
        """The gradients of the open step so far, by parameter; zeros where none is."""
        return self._engine.sums()

    def check_gradient(self, data: bytes, tokens: int) -> int:
        """The tokens in a replica's part, at most `tokens`. Raises: Invalid for bytes that no `gradient` gives."""
        return self._gradients.unpack(data, tokens).tokens

    @property
    def gradient_bytes(self) -> int:
        """Exact size of what `gradient` gives."""
        return self._gradients.size_bytes

    def finish_step_with(self, step: int, parts: Sequence[bytes]) -> float | None:
        """As `finish_step`, from all replicas' parts: this one's own only counts if it is among them.

        Replicas that are given the same parts in the same order stay equal, to the bit on machines of one kind; also
        one that took no part in the step and comes from a checkpoint.

        Raises: Invalid: a wrong part.  Conflict: as `finish_step`.
        """
        self._check_complete(step)
        read = [self._gradients.unpack(part) for part in parts]
        tokens, loss, sums = self._gradients.total(read, robust=self.averaging.robust)
        self._engine.finish_with(step, tokens, sums)
        self._next_step()
        return loss if self.stage.last else None

    # --- replicas: a part of the state, each round ------------------------------------------------------------------

    def partition(self, round_: int) -> bytes:
        """This replica's entries in round `round_`'s part of the state. Keep them for `merge`.

        Raises: Invalid: training diverged.
        """
        return self._partitions.pack(round_, self._engine.state())

    def check_partition(self, round_: int, data: bytes) -> None:
        """Raises: Invalid for bytes that no `partition` of that round gives."""
        self._partitions.check(round_, data)

    def partition_bytes(self, round_: int) -> int:
        """Exact size of what `partition` gives."""
        return self._partitions.size_bytes(round_)

    def merge(self, round_: int, own: bytes, others: Sequence[bytes]) -> None:
        """Moves the state by what the other replicas' entries, and our `own` of the same round, differ on average from
        `own`. Steps may have been made since; call it between two of them.

        Raises: Conflict: microbatches are in flight, or wait for their step.  Invalid: wrong bytes, or an average that
        is not finite; nothing has changed then.
        """
        if self._open or self._seen:
            raise Conflict(f"step {self.step} is under way: its microbatches must meet one set of parameters")
        state = self._engine.state()
        self._partitions.merge(round_, state, own, others, robust=self.averaging.robust)
        self._engine.load(state)

    # ----------------------------------------------------------------------------------------------------------------

    def reset_step(self) -> None:
        """Drops everything of the open step: it can start again from its first microbatch."""
        self._engine.clear()
        self._forget()

    def rotate(self, *, entering: Tensor | None = None, leaving: Tensor | None = None) -> None:
        """Turns the boundary before this stage, the one after it, or both; `tessera.models.rotation` says what that is.

        The neighbours turn theirs by the same matrix between the same two steps, or no message is understood any more.

        Args:
            entering, leaving: orthogonal float64 matrices [k, k].

        Raises: Invalid: no such boundary, no learned codec, or no rotation.  Conflict: the open step has begun.
        """
        turns = {end: turn for end, turn in (("decode", entering), ("encode", leaving)) if turn is not None}
        if turns and self.spec.codec.kind != "codec":
            raise Invalid(f"only the kind codec has an encoder and a decoder to turn, not {self.spec.codec.kind}")
        if (self.stage.first and entering is not None) or (self.stage.last and leaving is not None):
            raise Invalid(f"stage {self.stage.index} of {self.spec.stages} has no boundary there to turn")
        for turn in turns.values():
            check_rotation(turn, self.spec.codec.k)
        if self._seen:
            raise Conflict(f"step {self.step} has begun: its gradients belong to the boundary as it was")
        self._engine.rotate(turns)

    def evaluate(self, ids: Any, payload: bytes | None) -> bytes | tuple[float, int]:
        """As `forward`, but learns nothing: the message, or (sum of losses in nats, tokens) on the last stage."""
        tokens = check_ids(ids, self.spec)
        message = receive(self.stage, self._wire, payload, tokens.size(0), tokens.size(1) - 1)
        out = self._engine.evaluate(tokens, message)
        return self._wire.pack(out) if isinstance(out, Tensor) else (out, tokens[:, 1:].numel())

    def payload_limit(self, batch: int, length: int) -> int:
        """Bytes of a message of `batch` × `length` tokens, in either direction: exactly that many are accepted."""
        return self._wire.size(batch, length)

    def whole_stage(self) -> Stage:
        """The stage with all its parameters on one device, for decoding. Live, unless several devices share them."""
        return self._engine.whole_stage()

    def save(self) -> bytes:
        """Parameters, optimiser and step, as a safetensors file. In-flight microbatches are not part of it."""
        return write_checkpoint(self._engine.state(), {**self._facts(), "step": str(self.step)})

    def load(self, data: bytes) -> None:
        """Takes over what `save` wrote, on however many devices. Drops the open step.

        Raises: Invalid: corrupt, or of another model, stage or seed; nothing has changed then.
        """
        tensors, facts = read_checkpoint(data, self._engine.layout(), self._facts())
        step = facts.get("step", "")
        if not (step.isascii() and step.isdecimal() and len(step) < 10):
            raise Invalid(f"the checkpoint's step is {step[:40]!r}, expected a number")
        self.reset_step()
        self._engine.load(tensors)
        self.step = int(step)

    @cached_property
    def _gradients(self) -> GradientForm:
        shapes = {
            n.removeprefix("params."): t.shape for n, t in self._engine.layout().items() if n.startswith("params.")
        }
        return GradientForm(shapes, self.averaging.gradient)

    @cached_property
    def _partitions(self) -> Partitions:
        a = self.averaging
        return Partitions(self._engine.layout(), self.spec.seed, a.partitions, a.state, moments=a.moments)

    def _facts(self) -> dict[str, str]:
        return {"spec": self.spec.digest(), "stage": str(self.stage.index)}

    def _check_step(self, step: int) -> None:
        if step != self.step:
            raise Conflict(f"step {step} is not open on stage {self.stage.index}: step {self.step} is")

    def _check_complete(self, step: int) -> None:
        self._check_step(step)
        if self._open:
            raise Conflict(f"microbatches {sorted(self._open)} of step {step} are still in flight")

    def _gradient(self, payload: bytes | None, shape: tuple[int, int]) -> Tensor | None:
        if self.stage.last:
            if payload is not None:
                raise Invalid("the last stage computes its gradient itself: no payload expected")
            return None
        if payload is None:
            raise Invalid(f"stage {self.stage.index} needs the gradient from stage {self.stage.index + 1}")
        return self._wire.unpack(payload, *shape)

    def _leave(self, index: int, out: Tensor | float, tokens: Tensor) -> bytes | None:
        """What goes to the next stage, or the loss into the sum. A message that cannot be packed is not kept."""
        if isinstance(out, float):
            self._loss_sum += out
            self._losses[index] = out
            self._tokens += tokens[:, 1:].numel()
            return None
        try:
            return self._wire.pack(out)
        except Invalid:
            self._engine.drop(index)
            raise

    def _next_step(self) -> None:
        self.step += 1
        self._forget()

    def _forget(self) -> None:
        self._open.clear()
        self._seen.clear()
        self._losses.clear()
        self._loss_sum, self._tokens = 0.0, 0


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
